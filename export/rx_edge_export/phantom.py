"""Synthetic chest-like pictures as DICOM: canary studies that may be shipped to anyone.

The display values are known before any DICOM is written, so the pixel path (VOI, polarity,
resize) is checked against numbers that it did not produce itself: a polarity fault in the reader
cannot hide in its own golden vector. They are not radiographs and look like none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from rx_edge.types import FloatArray

Photometric: TypeAlias = Literal["MONOCHROME1", "MONOCHROME2"]

LEVELS = 4095  # 12 bits stored; display values are multiples of 1 / LEVELS
ROWS, COLUMNS = 480, 400  # not square, so that padding is exercised


def display(seed: int) -> FloatArray:
    """float32 (ROWS, COLUMNS) in [0, 1], multiples of 1/4095; another body per seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:ROWS, 0:COLUMNS].astype(np.float64)
    y, x = y / ROWS, x / COLUMNS
    picture = 0.60 * _ellipse(y, x, 0.55, 0.5, 0.62, 0.46)
    for centre in (0.30, 0.70):
        picture -= 0.42 * _ellipse(y, x, 0.48, centre, 0.33, 0.15)
    picture += 0.06 * np.sin(y * 70.0 + 3.0 * (x - 0.5) ** 2) * (picture > 0.05)  # ribs
    picture += 0.30 * _ellipse(y, x, 0.62, 0.55, 0.17, rng.uniform(0.13, 0.22))  # heart
    picture += 0.25 * _ellipse(y, x, 0.5, 0.5, 0.5, 0.035)  # spine
    for _ in range(int(rng.integers(0, 5))):  # opacities
        picture += 0.25 * _ellipse(
            y, x, rng.uniform(0.3, 0.7), rng.choice([0.3, 0.7]), rng.uniform(0.03, 0.1), 0.06
        )
    picture += rng.normal(0.0, 0.01, picture.shape)
    levels: FloatArray = np.rint(picture.clip(0.0, 1.0) * LEVELS).astype(np.float32)
    return levels / np.float32(LEVELS)


def write_dicom(path: Path, pixels: FloatArray, photometric: Photometric) -> None:
    """Write `pixels` as a CR image whose full window (PS3.3 C.11.2.1.2) maps back to them.

    UIDs and dates are fixed, so that two exports write the same bytes.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

    stored = np.rint(pixels * LEVELS).astype(np.uint16)
    if photometric == "MONOCHROME1":  # low values are bright (PS3.3 C.7.6.3.1.2)
        stored = LEVELS - stored
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["rx-edge phantom", path.name])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=["rx-edge phantom study", path.name])
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=["rx-edge phantom series", path.name])
    dataset.Modality = "CR"
    dataset.BodyPartExamined = "CHEST"
    dataset.ViewPosition = "PA"
    dataset.PatientName = "PHANTOM"
    dataset.PatientID = "PHANTOM"
    dataset.ImageComments = "synthetic canary, not a patient"
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = photometric
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.WindowCenter, dataset.WindowWidth = "2048", "4096"
    dataset.PixelData = stored.astype("<u2").tobytes()
    dataset.save_as(path, enforce_file_format=True)


def _ellipse(
    y: FloatArray, x: FloatArray, cy: float, cx: float, ry: float, rx: float
) -> FloatArray:
    """A disc with a soft edge: 1 inside, 0 outside."""
    distance = np.sqrt(((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2)
    soft: FloatArray = np.clip((1.0 - distance) * 8.0, 0.0, 1.0)
    return soft
