"""The grayscale pipeline against PS3.3's formulas, written out here, and against dcmtk."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRBigEndian,
)

from rx_edge import dicom
from rx_edge.errors import DicomError
from tests.demo_studies import demo_study
from tests.shared_data import shared
from tests.synthetic_dicom import (
    RAMP,
    chest_like,
    dataset,
    encode,
    lut,
    save,
    write,
)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 15, 16])
@pytest.mark.parametrize("voi", [{}, {"WindowCenter": 100, "WindowWidth": 151}])
def test_monochrome1_and_2_of_the_same_picture_display_equally(
    tmp_path: Path, bits: int, voi: dict[str, int]
) -> None:
    top = 2**bits - 1
    stored = chest_like(top=top).astype(np.uint8 if bits == 8 else np.uint16)
    two = dicom.read(write(tmp_path / "2.dcm", stored, bits=bits, **voi))
    mirrored = dict(voi)
    if voi:  # LINEAR maps c-0.5 to the middle, so top - stored needs the centre top - c + 1
        mirrored["WindowCenter"] = top - voi["WindowCenter"] + 1
    one = dicom.read(
        write(
            tmp_path / "1.dcm",
            (top - stored).astype(stored.dtype),
            bits=bits,
            PhotometricInterpretation="MONOCHROME1",
            PresentationLUTShape="INVERSE",
            **mirrored,
        )
    )
    np.testing.assert_allclose(one.pixels, two.pixels, atol=1e-6)
    assert two.pixels.max() == 1.0
    assert two.pixels.min() == 0.0


def test_inverse_shape_is_not_a_second_inversion_and_is_ignored_with_monochrome2(
    tmp_path: Path,
) -> None:
    shapes = {}
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        for shape in (None, "INVERSE"):
            path = write(
                tmp_path / "a.dcm",
                RAMP,
                bits=12,
                PhotometricInterpretation=photometric,
                PresentationLUTShape=shape,
            )
            shapes[photometric, shape] = dicom.read(path)
    np.testing.assert_array_equal(
        shapes["MONOCHROME1", None].pixels, shapes["MONOCHROME1", "INVERSE"].pixels
    )
    np.testing.assert_array_equal(
        shapes["MONOCHROME2", None].pixels, shapes["MONOCHROME2", "INVERSE"].pixels
    )
    assert any("INVERSE" in note for note in shapes["MONOCHROME2", "INVERSE"].notes)
    assert not shapes["MONOCHROME1", "INVERSE"].notes


def test_scale_does_not_depend_on_the_image(tmp_path: Path) -> None:
    """The same stored value displays equally whether or not the picture is full range."""
    full = dicom.read(write(tmp_path / "a.dcm", RAMP, bits=12))
    part = dicom.read(write(tmp_path / "b.dcm", RAMP.clip(1000, 3500), bits=12))
    np.testing.assert_array_equal(full.pixels[30], part.pixels[30])


def test_without_voi_an_overstated_bits_stored_is_noted(tmp_path: Path) -> None:
    radiograph = dicom.read(write(tmp_path / "a.dcm", chest_like(top=4095), bits=16))
    assert radiograph.pixels.max() == pytest.approx(4095 / 65535)
    assert any("less than half of BitsStored" in note for note in radiograph.notes)


@pytest.mark.parametrize(
    ("function", "width"),
    [
        ("LINEAR", 1000),
        ("LINEAR", 1),
        ("LINEAR_EXACT", 1000),
        ("LINEAR_EXACT", 0.5),
        ("SIGMOID", 1000),
        ("SIGMOID", 1),
        (None, 301),
    ],
)
def test_window_functions(tmp_path: Path, function: str | None, width: float) -> None:
    path = write(
        tmp_path / "a.dcm",
        RAMP,
        bits=12,
        WindowCenter=[2000, 10],
        WindowWidth=[width, 20],
        VOILUTFunction=function,
    )
    expected = [_window(float(x), 2000.0, width, function or "LINEAR") for x in RAMP.ravel()]
    pixels = dicom.read(path).pixels.ravel()
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    assert dicom.read(path).provenance["VOI"] == (function or "LINEAR")


def _window(x: float, c: float, w: float, function: str) -> float:
    if function == "SIGMOID":
        exponent = -4.0 * (x - c) / w
        return 0.0 if exponent > 700 else float(1.0 / (1.0 + np.exp(exponent)))
    if function == "LINEAR_EXACT":
        if x <= c - w / 2:
            return 0.0
        return 1.0 if x > c + w / 2 else (x - c) / w + 0.5
    if x <= c - 0.5 - (w - 1) / 2:
        return 0.0
    return 1.0 if x > c - 0.5 + (w - 1) / 2 else (x - (c - 0.5)) / (w - 1) + 0.5


@pytest.mark.parametrize(("width", "function"), [(0, None), (-5, "SIGMOID"), (100, "CUBIC")])
def test_an_invalid_window_is_ignored_with_a_note(
    tmp_path: Path, width: int, function: str | None
) -> None:
    path = write(
        tmp_path / "a.dcm",
        RAMP,
        bits=12,
        WindowCenter=1,
        WindowWidth=width,
        VOILUTFunction=function,
    )
    radiograph = dicom.read(path)
    assert any("window's function or width is invalid" in note for note in radiograph.notes)
    np.testing.assert_allclose(radiograph.pixels, RAMP / 4095.0, atol=1e-6)


def test_rescale_feeds_the_window_and_signed_pixels_keep_their_sign(tmp_path: Path) -> None:
    stored = RAMP.astype(np.int16) - 2048
    path = write(
        tmp_path / "a.dcm",
        stored,
        bits=12,
        RescaleSlope=2,
        RescaleIntercept=100,
        WindowCenter=100.5,
        WindowWidth=1001,
    )
    expected = ((stored * 2.0 + 100.0 - 100.0) / 1000.0 + 0.5).clip(0, 1)
    np.testing.assert_allclose(dicom.read(path).pixels, expected, atol=1e-6)


def test_signed_pixels_without_voi_span_the_nominal_range(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", RAMP.astype(np.int16) - 2048, bits=12, RescaleSlope=-1)
    np.testing.assert_allclose(dicom.read(path).pixels, 1.0 - RAMP / 4095.0, atol=1e-6)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "word"])
@pytest.mark.parametrize("big_endian", [False, True])
def test_8_bit_lut_on_12_bit_input_does_not_wrap(
    tmp_path: Path, packed: bool, big_endian: bool
) -> None:
    entries = (255 - np.arange(4096) // 16).astype(np.uint8)
    word = ">u2" if big_endian else "<u2"
    words = entries.view("<u2") if packed else entries
    ds = dataset(RAMP, bits=12, VOILUTSequence=lut([4096, 0, 8], words.astype(word).tobytes()))
    if big_endian:
        ds = encode(ExplicitVRBigEndian, ds)
    radiograph = dicom.read(save(tmp_path / "a.dcm", ds))
    np.testing.assert_allclose(radiograph.pixels.ravel(), entries / 255.0, atol=1e-6)
    assert radiograph.provenance["VOI"] == "LUT"


@pytest.mark.parametrize("vr", ["US", "OW"])
@pytest.mark.parametrize("bits", [9, 10, 12, 16])
def test_lut_entries_of_any_depth_and_input_outside_the_table(
    tmp_path: Path, bits: int, vr: str
) -> None:
    entries = np.rint(np.linspace(0, 0.8, 1000) ** 2 * (2**bits - 1)).astype("<u2")  # short of peak
    data = entries.tobytes() if vr == "OW" else entries.tolist()
    path = write(
        tmp_path / "a.dcm",
        RAMP,
        bits=12,
        VOILUTSequence=lut([1000, 1500, bits], data, vr=vr),
        WindowCenter=1,
        WindowWidth=2,  # the LUT comes first
    )
    expected = entries[(RAMP.astype(int) - 1500).clip(0, 999)] / (2**bits - 1)
    np.testing.assert_allclose(dicom.read(path).pixels, expected, atol=1e-6)


def test_a_lut_of_65536_entries_and_a_negative_first_value(tmp_path: Path) -> None:
    entries = np.arange(65536, dtype="<u2")
    signed = (RAMP.astype(np.int32) * 16 - 32768).astype(np.int16)
    wide = write(
        tmp_path / "a.dcm",
        signed,
        bits=16,
        VOILUTSequence=lut([0, -32768, 16], entries.tobytes()),
    )
    np.testing.assert_allclose(dicom.read(wide).pixels, RAMP * 16 / 65535.0, atol=1e-6)


def test_modality_lut_sets_the_nominal_range(tmp_path: Path) -> None:
    entries = (np.arange(4096) // 4).astype("<u2")  # 10-bit output
    path = write(
        tmp_path / "a.dcm", RAMP, bits=12, ModalityLUTSequence=lut([4096, 0, 10], entries.tobytes())
    )
    np.testing.assert_allclose(dicom.read(path).pixels, (RAMP // 4) / 1023.0, atol=1e-6)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (lut([4096, 0, 12], bytes(100)), "LUTData is shorter"),
        (lut([4096, 0, 20], bytes(8192)), "fewer than 8 or more than 16"),
        (lut([4096, 0], bytes(8192)), "has not three values"),
    ],
)
def test_a_broken_lut_is_refused(tmp_path: Path, sequence: Sequence, message: str) -> None:
    with pytest.raises(DicomError, match=message):
        dicom.read(write(tmp_path / "a.dcm", RAMP, bits=12, VOILUTSequence=sequence))


def test_slope_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DicomError, match="RescaleSlope is 0"):
        dicom.read(write(tmp_path / "a.dcm", RAMP, bits=12, RescaleSlope=0))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_in_either_polarity(tmp_path: Path, photometric: str) -> None:
    path = tmp_path / "a.dcm"
    ds = dataset(RAMP, bits=12, PhotometricInterpretation=photometric)
    unpadded = dicom.read(save(path, ds)).pixels
    ds.PixelPaddingValue, ds.PixelPaddingRangeLimit = 4000, 4095
    radiograph = dicom.read(save(path, ds))
    assert (radiograph.pixels[RAMP >= 4000] == 0.0).all()
    np.testing.assert_array_equal(radiograph.pixels[RAMP < 4000], unpadded[RAMP < 4000])
    assert any("PixelPaddingValue" in note for note in radiograph.notes)


def test_negative_padding_value_written_as_unsigned(tmp_path: Path) -> None:
    ds = dataset(RAMP.astype(np.int16) - 2048, bits=16)
    ds.add_new("PixelPaddingValue", "US", 65536 - 1000)
    pixels = dicom.read(save(tmp_path / "a.dcm", ds)).pixels
    assert pixels[RAMP == 1048] == 0.0
    assert pixels[RAMP == 1047] > 0.4


# ---- dcmtk as an independent implementation


@pytest.mark.parametrize(("name", "kind"), [("mlut_18.dcm", "modality"), ("vlut_04.dcm", "voi")])
def test_real_lut_files_match_the_oracle(tmp_path: Path, name: str, kind: str) -> None:
    ds = pydicom.dcmread(shared(f"data/dicom/malformed/{name}"))
    ds.Modality = "CR"
    ds.save_as(tmp_path / "a.dcm")
    option = ["+Wl", "1"] if kind == "voi" else ["-W"]
    expected = _dcm2pnm(tmp_path / "a.dcm", tmp_path, *option)
    assert np.abs(dicom.read(tmp_path / "a.dcm").pixels * 255 - expected).max() < 1.0


def _dcm2pnm(path: Path, tmp_path: Path, *options: str) -> np.ndarray:
    """float (H, W) grey levels 0..255 of dcmtk's renderer."""
    tool = shutil.which("dcm2pnm")
    if tool is None:
        pytest.skip("the oracle dcm2pnm is absent: apt-get install dcmtk")
    out = tmp_path / "oracle.pgm"
    subprocess.run([tool, *options, "+opb", path, out], check=True, capture_output=True)
    kind, width, height, top, *values = out.read_bytes().split()  # ASCII PGM
    assert kind == b"P2"
    assert top == b"255"
    return np.array(values, dtype=np.float64).reshape(int(height), int(width))


def test_rg1_matches_dcmtk_within_one_grey_level(tmp_path: Path) -> None:
    path = demo_study("RG1_UNCR.dcm")
    difference = dicom.read(path).pixels * 255 - _dcm2pnm(path, tmp_path, "+Wi", "1")
    assert np.abs(difference).max() <= 1.0


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("options", "attributes"),
    [
        (("-W",), {}),
        (("+Wi", "1"), {"WindowCenter": 1500, "WindowWidth": 2000}),
        (("+Wi", "1"), {"WindowCenter": 1500, "WindowWidth": 900, "VOILUTFunction": "SIGMOID"}),
        (("+Wl", "1"), {"VOILUTSequence": lut([1000, 1500, 12], bytes(range(250)) * 8)}),
    ],
    ids=["none", "linear", "sigmoid", "lut"],
)
def test_synthetic_files_match_dcmtk(
    tmp_path: Path, photometric: str, options: tuple[str, ...], attributes: dict[str, object]
) -> None:
    if "VOILUTSequence" in attributes:
        curve = np.rint(np.linspace(0, 1, 1000) ** 0.5 * 4095).astype("<u2").tobytes()
        attributes = {"VOILUTSequence": lut([1000, 1500, 12], curve)}
    path = tmp_path / "a.dcm"
    write(path, RAMP, bits=12, PhotometricInterpretation=photometric, **attributes)
    difference = dicom.read(path).pixels * 255 - _dcm2pnm(path, tmp_path, *options)
    assert np.abs(difference).max() < 1.05  # dcmtk truncates, and its inverted scale is 1..255
