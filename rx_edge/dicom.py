"""A DICOM file becomes a `Radiograph`, or a one-line reason why it does not.

The way: limits -> parse -> is it a chest radiograph? -> limits on the image -> decode ->
`rx_edge.grayscale`. Limits come before the parser or codec that they protect. Only single-frame
grey projection radiographs (CR, DX, RG) pass; a wrong modality or body part is refused by name.

No value that a person may have typed leaves this module: pydicom's warnings, log lines and
exception texts quote values, so they are silenced and counted, and causes are not chained.

Does not cover: hostile codestreams that crash or exhaust a codec (a server runs this in a child
process with rlimits), 12-bit JPEG (no free decoder), overlays, presentation states.
"""

from __future__ import annotations

import io
import logging
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from rx_edge.errors import DicomError, InputError, NotChestRadiographError, RxEdgeError
from rx_edge.grayscale import render
from rx_edge.image import MAX_PIXELS, pixel_sha256
from rx_edge.types import Radiograph

MAX_FILE_BYTES = 512 * 2**20  # also the bound on an inflated data set

MODALITIES = ("CR", "DX", "RG")
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
FOR_PROCESSING = "1.2.840.10008.5.1.4.1.1.1.1.1"
SOP_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.1",  # Computed Radiography
    "1.2.840.10008.5.1.4.1.1.1.1",  # Digital X-Ray for presentation
    FOR_PROCESSING,
    SECONDARY_CAPTURE,  # digitised film; needs Modality CR, DX or RG
)

CHEST_WORDS = ("CHEST", "THORA", "THORX", "TORAX", "LUNG", "PULMO")
NOT_CHEST = re.compile(
    r"\b(ABDOM|ANKLE|ARM|BREAST|CALCAN|CLAVIC|DENTAL|ELBOW|EXTREM|FACE|FEET|FEMUR|FIBULA|FINGER|FOOT"
    r"|FOREARM|HAND|HEAD|HEEL|HIP|HUMERUS|JAW|KNEE|KUB|LEG|MANDIB|MASTOID|NECK|ORBIT|PATELLA|PELVI"
    r"|RADIUS|SCAPULA|SHOULDER|SINUS|SKULL|TEETH|THIGH|THUMB|TIBIA|TOE|TOOTH|ULNA|WRIST)"
)

VIEWS = ("AP", "PA", "LL", "RL", "LLD", "RLD", "LLO", "RLO", "LATERAL")  # C.8.11.5, C.8.1.1
VIEW_CODES = {  # PS3.16 CID 4010 in SNOMED CT and in the older SNOMED-RT identifiers
    "399348003": "AP",
    "R-10206": "AP",
    "272479007": "PA",
    "R-10214": "PA",
    "399173006": "LL",
    "R-10236": "LL",
    "399198007": "RL",
    "R-10232": "RL",
}

_PYDICOM = threading.Lock()  # warning filters and log levels belong to the process


def looks_like(head: bytes) -> bool:
    """Whether a file's first 132 bytes are DICOM: the Part 10 prefix, or a bare data set.

    A bare (pre-1996, or badly exported) one starts with a low element of group 0002 or 0008.
    """
    bare = head[:2] in (b"\x02\0", b"\x08\0") and head[3:4] == b"\0"
    return head[128:132] == b"DICM" or bare


def read(path: Path) -> Radiograph:
    """Read one chest radiograph.

    Returns:
        A `Radiograph` with float32 (H, W) pixels in [0, 1] in display polarity.

    Raises:
        InputError: not a DICOM file, or unreadable.
        DicomError: broken, truncated, oversized, multi-frame, in colour or of an unsupported
            transfer syntax.
        NotChestRadiographError: another modality or body part.
    """
    name = repr(str(path))
    with _PYDICOM, _silenced() as deviations:
        try:
            return _read(path, deviations)
        except RxEdgeError as error:
            raise type(error)(f"{name}: {error}") from None
        except RecursionError:
            raise DicomError(f"{name}: sequences are nested too deeply; refused") from None
        except MemoryError:
            raise DicomError(f"{name}: not enough memory to decode it") from None
        except OSError as error:
            reason = error.strerror or "it is damaged"
            raise InputError(f"{name}: cannot be read: {reason}") from None
        except Exception as error:  # pydicom raises whatever a malformed value leads to
            raise DicomError(
                f"{name}: malformed DICOM ({type(error).__name__}); export it again from the PACS"
            ) from None


def _read(path: Path, deviations: list[warnings.WarningMessage]) -> Radiograph:
    notes: list[str] = []
    ds = _parse(path, notes)
    _check_kind(ds, notes)
    _check_layout(ds)
    view = _view(ds, notes)
    rendering = render(_decode(ds), ds)
    notes.extend(rendering.notes)
    if deviations:
        notes.append(f"the file deviates from the DICOM standard ({len(deviations)} warnings)")
    return Radiograph(
        pixels=rendering.pixels,
        pixel_sha256=pixel_sha256(rendering.pixels),
        view=view,
        source_format="dicom",
        notes=tuple(notes),
        provenance={
            "TransferSyntaxUID": str(ds.file_meta.TransferSyntaxUID),
            "SOPClassUID": str(ds.get("SOPClassUID") or ""),
            "PhotometricInterpretation": str(ds.PhotometricInterpretation),
            "BitsStored": str(ds.BitsStored),
            "VOI": rendering.voi,
        },
    )


@contextmanager
def _silenced() -> Iterator[list[warnings.WarningMessage]]:
    """Keep pydicom's warnings and log lines, which quote values, off every output."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally:
        logger.setLevel(level)


def _parse(path: Path, notes: list[str]) -> Dataset:
    """The data set with a file_meta that holds TransferSyntaxUID."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise DicomError(f"has {size} bytes; the limit is {MAX_FILE_BYTES}")
    with path.open("rb") as file:
        head = file.read(132)
    if not looks_like(head):
        raise InputError("not a DICOM file (no DICM prefix)")
    part10 = head[128:] == b"DICM"
    if part10:
        meta = read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            ds = dcmread(io.BytesIO(_inflate(path, meta)), force=True)
            ds.file_meta = meta
            return ds
    ds = dcmread(path, force=not part10)
    if part10 and not len(ds):  # pydicom drops everything when an encapsulated frame has no end
        raise DicomError("holds no complete data set: truncated; copy it again from the PACS")
    if not part10 and "SOPClassUID" not in ds and "Rows" not in ds:
        raise InputError("not a DICOM file (no DICM prefix, and no image in it)")
    if "TransferSyntaxUID" not in ds.file_meta:
        implicit, little = ds.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
        notes.append("the file states no TransferSyntaxUID; uncompressed pixels are assumed")
    return ds


def _inflate(path: Path, meta: Dataset) -> bytes:
    """PS3.5 A.5: what follows the meta information is one raw deflate stream."""
    length = meta.get("FileMetaInformationGroupLength")
    if length is None:
        raise DicomError("FileMetaInformationGroupLength is missing; export it again")
    start = 128 + 4 + 12 + int(length)  # preamble, DICM, the group length element itself
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = stream.decompress(path.read_bytes()[start:], MAX_FILE_BYTES)
    except zlib.error:
        raise DicomError("its deflate stream is damaged; export it again") from None
    if stream.unconsumed_tail:
        raise DicomError(f"inflates to more than {MAX_FILE_BYTES} bytes; refused")
    if not stream.eof:
        raise DicomError("its deflate stream is truncated; export it again")
    return data


def _check_kind(ds: Dataset, notes: list[str]) -> None:
    """Refuse what is not a projection radiograph of the chest."""
    modality, sop_class = str(ds.get("Modality") or ""), str(ds.get("SOPClassUID") or "")
    if sop_class and sop_class not in SOP_CLASSES:
        kind = modality if re.fullmatch(r"[A-Z]{2,4}", modality) else "not stated"
        title = UID(sop_class).name if UID(sop_class).name != sop_class else "unknown"
        raise NotChestRadiographError(
            f"not a projection radiograph (Modality {kind}, SOP class {title}); "
            f"accepted: {', '.join(MODALITIES)}"
        )
    if modality not in MODALITIES:
        shown = modality if re.fullmatch(r"[A-Z]{2,4}", modality) else "blank or not a known term"
        if modality or sop_class in ("", SECONDARY_CAPTURE):
            raise NotChestRadiographError(f"Modality is {shown}; accepted: {', '.join(MODALITIES)}")
        notes.append("Modality is blank; the SOP class says radiograph")
    if sop_class == SECONDARY_CAPTURE:
        notes.append("a secondary capture: its grey values may have been altered before")
    if sop_class == FOR_PROCESSING:
        notes.append("a FOR PROCESSING image: raw detector values, not meant for display")
    _check_body_part(str(ds.get("BodyPartExamined") or "").upper(), notes)


def _check_body_part(body_part: str, notes: list[str]) -> None:
    """Refuse a body part that is clearly not the chest, by word; the value itself is not shown."""
    if not body_part.strip():
        notes.append("BodyPartExamined is blank; the chest is assumed")
        return
    if "SPINE" in body_part:  # TSPINE and THORACIC SPINE are not the chest
        raise NotChestRadiographError("BodyPartExamined is SPINE..., not the chest")
    if any(word in body_part for word in CHEST_WORDS):
        return
    if other := NOT_CHEST.search(re.sub(r"[^A-Z]", " ", body_part)):
        raise NotChestRadiographError(f"BodyPartExamined is {other[1]}..., not the chest")
    notes.append("BodyPartExamined is not a known term; the chest is assumed")


def _check_layout(ds: Dataset) -> None:
    """Bound the decoded image before any codec runs."""
    if (frames := _integer(ds, "NumberOfFrames", 1)) != 1:
        raise DicomError(f"NumberOfFrames is {frames}; one image per file is accepted")
    if (samples := _integer(ds, "SamplesPerPixel", 1)) != 1:
        raise DicomError(f"SamplesPerPixel is {samples}: a colour image, not a radiograph")
    if ds.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        raise DicomError("PhotometricInterpretation is neither MONOCHROME1 nor MONOCHROME2")
    rows, columns = _integer(ds, "Rows"), _integer(ds, "Columns")
    if rows < 1 or columns < 1 or rows * columns > MAX_PIXELS:
        raise DicomError(f"Rows x Columns is {rows} x {columns}; the limit is {MAX_PIXELS} pixels")
    allocated, stored = _integer(ds, "BitsAllocated"), _integer(ds, "BitsStored")
    if allocated not in (8, 16) or not 1 < stored <= allocated:
        raise DicomError(f"BitsStored {stored} in BitsAllocated {allocated} is not supported")
    if (high := _integer(ds, "HighBit", stored - 1)) != stored - 1:
        raise DicomError(f"HighBit is {high}; PS3.5 8.1.1 requires BitsStored - 1 = {stored - 1}")
    if "PixelData" not in ds or not ds.PixelData:
        raise DicomError("PixelData is missing; export the image itself from the PACS")


def _decode(ds: Dataset) -> NDArray[np.integer[Any]]:
    """Stored values (Rows, Columns) int8/uint8/int16/uint16."""
    syntax = ds.file_meta.TransferSyntaxUID
    title = syntax.name if syntax.name != syntax else "a private one"
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise DicomError(
            f"transfer syntax {title} is not supported; "
            "ask the PACS for Explicit VR Little Endian or JPEG 2000"
        )
    if syntax.is_encapsulated:
        _check_codestream(ds, syntax)
    try:
        stored: NDArray[np.integer[Any]] = pixel_array(ds, index=0, raw=True)
    except MemoryError:
        raise
    except Exception as error:  # each codec has exceptions of its own
        raise DicomError(
            f"PixelData cannot be decoded as {title} ({type(error).__name__}): truncated, damaged "
            "or 12-bit JPEG; ask the PACS for Explicit VR Little Endian"
        ) from None
    if stored.shape != (ds.Rows, ds.Columns):
        raise DicomError("PixelData decodes to another size than Rows x Columns; damaged")
    return stored


def _check_codestream(ds: Dataset, syntax: UID) -> None:
    """The codec allocates what the codestream says, so that must be Rows x Columns."""
    frame = next(generate_frames(ds.PixelData, number_of_frames=1), b"")
    if syntax == RLELossless:
        if len(frame) > 2 * ds.Rows * ds.Columns * (ds.BitsAllocated // 8) + 65536:
            raise DicomError("PixelData is far longer than Rows x Columns in RLE; damaged")
        return
    size = _coded_size(frame)
    if size != (ds.Rows, ds.Columns):
        raise DicomError("PixelData's own size is missing or not Rows x Columns; damaged")
    if b"\xff\xd9" not in frame[-32:]:  # EOI, EOC; the codecs notice too, JPEG-LS after 8 s
        raise DicomError("PixelData is truncated (no end marker); export it again from the PACS")


def _coded_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) in the header of a JPEG, JPEG-LS (T.81, T.87) or JPEG 2000 (T.800) stream."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)  # SOC, SIZ; a JP2 box may come before
    if start >= 0 and len(frame) >= start + 24:
        x1, y1, x0, y0 = struct.unpack_from(">4I", frame, start + 8)
        return y1 - y0, x1 - x0
    at = 2
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker, length = struct.unpack_from(">xBH", frame, at)
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns = struct.unpack_from(">HH", frame, at + 5)
            return rows, columns
        at += 2 + length
    return None


def _view(ds: Dataset, notes: list[str]) -> str | None:
    """ViewPosition when it is a known term, else ViewCodeSequence, else None with a note."""
    position = str(ds.get("ViewPosition") or "").strip().upper()
    if position in VIEWS:
        return position
    codes = ds.get("ViewCodeSequence")
    view = VIEW_CODES.get(str(codes[0].get("CodeValue") or "")) if codes else None
    if view is None:
        notes.append(f"ViewPosition is {'not a known term' if position else 'blank'}")
    return view


def _integer(ds: Dataset, keyword: str, default: int | None = None) -> int:
    value = ds.get(keyword)
    if value is None or value == "":
        if default is None:
            raise DicomError(f"{keyword} is missing; the file is damaged")
        return default
    return int(value)
