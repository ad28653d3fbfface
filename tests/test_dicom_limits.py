"""DICOM -> Radiograph: limits, truncation and damage end in one line, never in a traceback."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import generate_frames
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from rx_edge import dicom
from rx_edge.errors import DicomError, InputError, RxEdgeError
from tests.synthetic_dicom import (
    KINDS,
    LOSSLESS,
    PHI,
    RAMP,
    dataset,
    encapsulated,
    encode,
    lut,
    save,
    write,
)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"NumberOfFrames": 2}, "NumberOfFrames is 2"),
        ({"SamplesPerPixel": 3}, "SamplesPerPixel is 3"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PhotometricInterpretation is neither"),
        ({"Rows": 60000, "Columns": 60000}, "the limit is 64000000 pixels"),
        ({"Rows": 0}, "Rows x Columns is 0"),
        ({"Rows": None}, "Rows is missing"),
        ({"Rows": 65}, "PixelData cannot be decoded"),
        ({"BitsAllocated": 32}, "in BitsAllocated 32 is not supported"),
        ({"BitsStored": 17}, "BitsStored 17"),
        ({"HighBit": 15}, "HighBit is 15"),
        ({"PixelData": None}, "PixelData is missing"),
    ],
)
def test_impossible_layouts_are_refused(
    tmp_path: Path, attributes: dict[str, object], message: str
) -> None:
    with pytest.raises(DicomError, match=message):
        dicom.read(write(tmp_path / "a.dcm", RAMP, bits=12, **attributes))


@pytest.mark.parametrize("syntax", [None, *KINDS], ids=lambda u: u.keyword if u else "Explicit")
@pytest.mark.parametrize("part", [0.5, 0.97])
def test_a_truncated_file_is_refused(tmp_path: Path, syntax: UID | None, part: float) -> None:
    ds = dataset(np.random.default_rng(0).integers(0, 4096, (64, 64), np.uint16), bits=12)
    path = save(tmp_path / "a.dcm", encode(syntax, ds) if syntax else ds)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(DicomError):
        dicom.read(path)


@pytest.mark.parametrize("syntax", [*LOSSLESS, JPEGBaseline8Bit], ids=lambda u: u.keyword)
@pytest.mark.parametrize("cut", [2000, 20])
def test_a_truncated_frame_is_refused(tmp_path: Path, syntax: UID, cut: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    ds = dataset(noise, bits=8)
    if syntax == JPEGBaseline8Bit:
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "JPEG", quality=95)
        frame = buffer.getvalue()
    else:
        frame = next(generate_frames(encode(syntax, ds).PixelData, number_of_frames=1))
    encapsulated(ds, frame[: (len(frame) - cut) // 2 * 2], syntax)
    with pytest.raises(DicomError, match=r"PixelData .*truncated"):
        dicom.read(save(tmp_path / "a.dcm", ds))


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless], ids=lambda u: u.keyword)
def test_a_codestream_of_another_size_is_refused_before_it_is_decoded(
    tmp_path: Path, syntax: UID, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = encode(syntax, dataset(RAMP, bits=12))
    ds.Rows = 63
    monkeypatch.setattr(dicom, "pixel_array", None)
    with pytest.raises(DicomError, match="own size"):
        dicom.read(save(tmp_path / "a.dcm", ds))


def test_a_bloated_rle_frame_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = encapsulated(dataset(RAMP, bits=12), bytes(200_000), RLELossless)
    monkeypatch.setattr(dicom, "pixel_array", None)
    with pytest.raises(DicomError, match="far longer"):
        dicom.read(save(tmp_path / "a.dcm", ds))


def test_a_deflate_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = encode(DeflatedExplicitVRLittleEndian, dataset(RAMP, bits=12))
    ds.add_new(0x00091001, "OB", bytes(8_000_000))
    path = save(tmp_path / "a.dcm", ds)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(dicom, "MAX_FILE_BYTES", 1_000_000)
    with pytest.raises(DicomError, match="inflates to more than 1000000 bytes"):
        dicom.read(path)


def test_a_damaged_deflate_stream_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.dcm", encode(DeflatedExplicitVRLittleEndian, dataset(RAMP, bits=12)))
    data = bytearray(path.read_bytes())
    start = 144 + pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength
    data[start : start + 8] = b"\xff" * 8  # block type 3 does not exist
    path.write_bytes(data)
    with pytest.raises(DicomError, match="deflate stream is damaged"):
        dicom.read(path)


def test_a_file_over_the_limit_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.dcm", RAMP, bits=12)
    monkeypatch.setattr(dicom, "MAX_FILE_BYTES", 1000)
    with pytest.raises(DicomError, match="the limit is 1000"):
        dicom.read(path)


def test_deeply_nested_sequences_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", RAMP, bits=12, PixelData=None)
    depth = 2000
    start = struct.pack("<HH2sHI", 0x7FE1, 0x1010, b"SQ", 0, 0xFFFFFFFF)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    ends = struct.pack("<HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    path.write_bytes(path.read_bytes() + (start + item) * depth + ends * depth)
    with pytest.raises(DicomError, match="nested too deeply"):
        dicom.read(path)


def test_not_dicom(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(b"hello" * 100)
    with pytest.raises(InputError, match="not a DICOM file"):
        dicom.read(path)
    path.write_bytes(b"\x08\0\x08\0" + bytes(400))  # looks bare, holds no image
    with pytest.raises(InputError):
        dicom.read(path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        dicom.read(tmp_path / "absent.dcm")


def test_a_bare_data_set_without_the_part_10_prefix_is_read(tmp_path: Path) -> None:
    ds = dataset(RAMP, bits=12)
    expected = dicom.read(save(tmp_path / "a.dcm", ds)).pixels
    del ds.file_meta
    ds.save_as(tmp_path / "b.dcm", implicit_vr=True, little_endian=True)
    radiograph = dicom.read(tmp_path / "b.dcm")
    np.testing.assert_array_equal(radiograph.pixels, expected)
    assert any("TransferSyntaxUID" in note for note in radiograph.notes)


@pytest.mark.parametrize("syntax", [None, *LOSSLESS], ids=lambda u: u.keyword if u else "Explicit")
def test_no_damage_escapes_as_a_traceback(tmp_path: Path, syntax: UID | None) -> None:
    ds = dataset(RAMP, bits=12, VOILUTSequence=lut([16, 0, 8], bytes(range(16))), WindowWidth=9)
    path = save(tmp_path / "a.dcm", encode(syntax, ds) if syntax else ds)
    data, rng = path.read_bytes(), np.random.default_rng(1)
    header = len(data) - 1000 if syntax else len(data) - RAMP.nbytes
    refused: list[str] = []
    for _ in range(60):
        damaged = bytearray(data)
        for at in rng.integers(132, max(header, 700), 6):
            damaged[at] = int(rng.integers(0, 256))
        path.write_bytes(damaged)
        try:
            pixels = dicom.read(path).pixels
        except RxEdgeError as error:
            refused.append(str(error))
        else:
            assert np.isfinite(pixels).all()
            assert 0.0 <= pixels.min() <= pixels.max() <= 1.0
    assert len(refused) > 10
    assert not [message for message in refused if "\n" in message or PHI in message]
