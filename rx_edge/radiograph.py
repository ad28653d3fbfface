"""Open one radiograph, whatever its format: the content decides, never the file's extension.

Does not cover: directories, archives or several files at once; the caller lists those.
"""

from __future__ import annotations

from pathlib import Path

from rx_edge import dicom, image
from rx_edge.errors import InputError, UsageError
from rx_edge.types import Radiograph

ACCEPTED = "DICOM (CR, DX or RG of the chest), PNG and JPEG"


def open_radiograph(path: Path) -> Radiograph:
    """Read a chest radiograph from a DICOM, PNG or JPEG file.

    Raises:
        UsageError: there is no such file, or it is a directory.
        InputError: it is empty, unreadable, of another format, damaged, or (the subclasses
            DicomError and NotChestRadiographError) not a usable DICOM chest radiograph.
    """
    name = repr(str(path))
    if path.is_dir():
        raise UsageError(f"{name} is a directory; name an image file: {ACCEPTED}")
    try:
        with path.open("rb") as file:
            head = file.read(132)  # preamble and prefix of PS3.10 7.1
    except FileNotFoundError:
        raise UsageError(f"{name} does not exist; name an image file: {ACCEPTED}") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from error
    if not head:
        raise InputError(f"{name} is empty; copy it again")
    if head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")):
        return image.read(path)
    if dicom.looks_like(head):
        return dicom.read(path)
    raise InputError(f"{name} is not an image that rx-edge reads; accepted: {ACCEPTED}")
