"""rx-edge: radiology-report generators on the hospital's own hardware.

A chest radiograph goes in at the top of this package and a verified draft report comes out
at the bottom: `dicom` / `image` -> `backends` (vision) -> `prompting` -> `backends` (LM) ->
`runtime`. Importing `rx_edge` imports none of it.
"""

__version__ = "0.1.0"
