"""Import an optional dependency, or say exactly which extra brings it.

Covers only the import; whether a device can use the package is the backend's own question.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from rx_edge.errors import MissingExtraError


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`.

    Raises:
        MissingExtraError: it is not installed; the message holds the pip command. An import
            that fails *inside* an installed package is not hidden behind that message.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        raise MissingExtraError(
            f'this needs {top!r}, which is not installed: pip install "rx-edge[{extra}]"'
        ) from error
