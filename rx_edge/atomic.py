"""A file appears under its name whole or not at all.

Does not cover: several files at once (a bundle's manifest is written last for that).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rx_edge.errors import ExportError


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yield a temporary path next to `out`; on success fsync it and rename it to `out`.

    The body may raise: the temporary file is removed and an older `out` stays as it was.

    Raises:
        ExportError: the directory is missing, not writable or full.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{out.name}-", dir=out.parent)
        os.close(handle)
    except OSError as error:
        raise ExportError(f"{str(out)!r} cannot be written: {error.strerror}") from error
    part = Path(name)
    try:
        yield part
        part.chmod(0o644)  # mkstemp makes it private; a bundle is meant to be read
        fsync(part)
        part.replace(out)
        fsync(out.parent)  # the rename itself survives a power cut
    except OSError as error:
        raise ExportError(f"{str(out)!r} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
