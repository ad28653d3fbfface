"""Which backends exist, and whether each can be used here.

One module per format, named by a string, so that nothing is imported before it is chosen. Each
module holds:

    REQUIRES         names of the packages it imports
    is_available()   None, or the reason why it cannot be used, in words for the user
    devices()        what it can run on here, best first: "cuda", "cpu"
    open(...)        a `VisionBackend` or `LanguageBackend` (see `base.py`)
    SHARES_WEIGHTS   True where a file that is opened twice takes memory once (may be absent)

Does not cover: choosing. The caller names a backend; nothing here falls back to another one.
"""

from __future__ import annotations

import difflib
import importlib
from types import ModuleType

from rx_edge.errors import BackendError

BACKENDS = {
    "vision_onnx": "rx_edge.backends.vision_onnx",
    "vision_tensorrt": "rx_edge.backends.vision_tensorrt",
    "llm_gguf": "rx_edge.backends.llm_gguf",
    "llm_onnx": "rx_edge.backends.llm_onnx",
}


def load(name: str) -> ModuleType:
    """Import the backend module `name`; its engine is imported only by `open`.

    Raises:
        BackendError: no such backend; the nearest name is given.
    """
    path = BACKENDS.get(name)
    if path is None:
        near = difflib.get_close_matches(name, BACKENDS, n=1, cutoff=0.0)
        raise BackendError(
            f"unknown backend {name!r}; did you mean {near[0]!r}? valid: {', '.join(BACKENDS)}"
        )
    return importlib.import_module(path)


def describe() -> dict[str, str | None]:
    """Every backend and why it is unusable here, or None where it is usable.

    This imports every engine that is installed: for `doctor`, not for the way to a report.
    """
    return {name: load(name).is_available() for name in BACKENDS}
