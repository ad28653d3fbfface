"""Everything rx-edge raises on purpose, in one tree.

    RxEdgeError
    ├── UsageError               what was asked for makes no sense            (exit 2)
    │   └── ConfigError          a recipe or setting is wrong
    ├── MissingExtraError        an optional dependency is not installed      (exit 1)
    ├── InputError               this file cannot become a radiograph         (exit 1)
    │   ├── DicomError           broken, unsupported or oversized DICOM
    │   └── NotChestRadiographError   a readable image of the wrong kind
    ├── ModelError               base weights are missing, wrong or unsupported (exit 1)
    │   └── FetchError           a download failed or its sha256 is wrong
    ├── TrainingError            training cannot go on (NaN loss, bad resume) (exit 1)
    ├── ExportError              an artefact cannot be written faithfully     (exit 1)
    ├── BackendError             an inference engine refused or failed        (exit 1)
    │   └── DeviceMemoryError    the GPU has too little memory for it
    ├── BundleError              a bundle is refused                          (exit 3)
    └── VerificationError        a bundle is not the trained model            (exit 3)

A message says what is wrong, with which value, and what to do next, in one line.
It never contains patient data: name files by path, DICOM attributes by keyword only.
The exit codes live in `rx_edge.cli`, the only module that exits.
"""


class RxEdgeError(Exception):
    """Base of every error that rx-edge raises on purpose."""


class UsageError(RxEdgeError):
    """The request itself is wrong; nothing was started."""


class ConfigError(UsageError):
    """A recipe key or value is unknown or out of range."""


class MissingExtraError(RxEdgeError):
    """An optional dependency is missing; the message holds the pip command."""


class InputError(RxEdgeError):
    """A file cannot be turned into a radiograph."""


class DicomError(InputError):
    """A DICOM file is broken, truncated, oversized or uses an unsupported encoding."""


class NotChestRadiographError(InputError):
    """The file is readable but is not a projection radiograph of the chest."""


class ModelError(RxEdgeError):
    """Base weights or a trained run are missing, wrong or of an unsupported family."""


class FetchError(ModelError):
    """A base model could not be obtained, or is not the pinned one."""


class TrainingError(RxEdgeError):
    """Training cannot start, continue or resume."""


class ExportError(RxEdgeError):
    """An artefact cannot be written so that it equals the trained model."""


class BackendError(RxEdgeError):
    """An inference engine is unavailable, refused its input or returned nonsense."""


class DeviceMemoryError(BackendError):
    """A model or its KV cache does not fit into the GPU's free memory."""


class BundleError(RxEdgeError):
    """A bundle is damaged, mismatched, unverified or too new, and is refused."""


class VerificationError(RxEdgeError):
    """A bundle does not reproduce the trained model within tolerance."""
