"""Small, valid DICOM radiographs that a test bends one attribute at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

CR = UID("1.2.840.10008.5.1.4.1.1.1")
LOSSLESS = [RLELossless, JPEG2000Lossless, JPEGLSLossless]
KINDS = [*LOSSLESS, ExplicitVRBigEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian]
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)
PHI = "ZEBEDEE"  # in every identifying attribute; must never leave the reader


def dataset(stored: np.ndarray, *, bits: int, **attributes: Any) -> Dataset:
    """A CR of the chest; a keyword set to None is left out of the file.

    Args:
        stored: (H, W) integers; their dtype decides PixelRepresentation and BitsAllocated.
    """
    allocated = stored.dtype.itemsize * 8
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    values: dict[str, Any] = {
        "SOPClassUID": CR,
        "SOPInstanceUID": generate_uid(),
        "PatientName": f"{PHI}^ANN",
        "PatientID": f"{PHI}-1",
        "Modality": "CR",
        "BodyPartExamined": "CHEST",
        "ViewPosition": "PA",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "BitsAllocated": allocated,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
        "PixelData": stored.astype(stored.dtype.newbyteorder("<")).tobytes(),
    }
    for keyword, value in (values | attributes).items():
        if value is not None:
            setattr(ds, keyword, value)
    if "PixelData" in ds:
        ds["PixelData"].VR = "OW" if allocated == 16 else "OB"
    return ds


def save(path: Path, ds: Dataset) -> Path:
    ds.save_as(path, enforce_file_format=True)
    return path


def write(path: Path, stored: np.ndarray, *, bits: int, **attributes: Any) -> Path:
    """`dataset`, saved."""
    return save(path, dataset(stored, bits=bits, **attributes))


def encapsulated(ds: Dataset, frame: bytes, syntax: UID) -> Dataset:
    """`ds` with one ready-made compressed frame."""
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate([frame])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    return ds


def lut(descriptor: list[int], data: bytes | list[int], *, vr: str = "OW") -> Sequence:
    """A Modality or VOI LUT Sequence of one item."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US" if descriptor[1] >= 0 else "SS", descriptor)
    item.add_new("LUTData", vr, data)
    return Sequence([item])


def chest_like(height: int = 40, width: int = 32, *, top: int = 4095) -> np.ndarray:
    """uint16 (H, W): dark sides, a bright column in the middle, 0 and `top` both present."""
    x = np.linspace(-1.0, 1.0, width)
    column = np.exp(-4.0 * x**2)[None, :] * np.linspace(0.6, 1.0, height)[:, None]
    column -= column.min()
    return np.rint(column / column.max() * top).astype(np.uint16)


def encode(syntax: UID, ds: Dataset) -> Dataset:
    """`ds` in another transfer syntax of `KINDS`, without loss."""
    if syntax in LOSSLESS:
        ds.compress(syntax, generate_instance_uid=False)
    else:
        if syntax == ExplicitVRBigEndian:
            ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
        ds.file_meta.TransferSyntaxUID = syntax
    return ds
