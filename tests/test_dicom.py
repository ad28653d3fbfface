"""DICOM -> Radiograph: the pixel path, what is refused, and that no patient data gets out."""

from __future__ import annotations

import io
import logging
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from rx_edge import dicom
from rx_edge.errors import DicomError, InputError, NotChestRadiographError, RxEdgeError
from tests.demo_studies import demo_study
from tests.shared_data import shared
from tests.synthetic_dicom import PHI, chest_like, dataset, encapsulated, lut, save, write

LOSSLESS = [RLELossless, JPEG2000Lossless, JPEGLSLossless]
KINDS = [*LOSSLESS, ExplicitVRBigEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian]
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def _as(syntax: UID, ds: Dataset) -> Dataset:
    if syntax in LOSSLESS:
        ds.compress(syntax, generate_instance_uid=False)
    else:
        if syntax == ExplicitVRBigEndian:
            ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
        ds.file_meta.TransferSyntaxUID = syntax
    return ds


# ---- transfer syntaxes


@pytest.mark.parametrize("syntax", KINDS, ids=lambda u: u.keyword)
def test_every_lossless_transfer_syntax_gives_the_same_pixels(tmp_path: Path, syntax: UID) -> None:
    path = tmp_path / "a.dcm"
    save_kwargs = dataset(chest_like(), bits=12, WindowCenter=2048, WindowWidth=4096)
    ds = _as(syntax, save_kwargs)
    ds.save_as(path, enforce_file_format=True)
    radiograph = dicom.read(path)
    assert radiograph.provenance["TransferSyntaxUID"] == syntax
    np.testing.assert_allclose(radiograph.pixels, chest_like() / 4095.0, atol=2e-7)


def test_jpeg_baseline(tmp_path: Path) -> None:
    grey = (chest_like(64, 64, top=255)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=95)
    ds = encapsulated(dataset(grey, bits=8), buffer.getvalue(), JPEGBaseline8Bit)
    pixels = dicom.read(save(tmp_path / "a.dcm", ds)).pixels
    assert np.abs(pixels * 255.0 - grey).mean() < 2.0


CT_SYNTAXES = {
    "ExplicitVRBig": "BigEndianExplicitTransferSyntax_1.2.840.10008.1.2.2",
    "Deflated": "DeflatedExplicitVRLittleEndianTransferSyntax_1.2.840.10008.1.2.1.99",
    "J2KLossless": "JPEG2000LosslessOnlyTransferSyntax_1.2.840.10008.1.2.4.90",
    "JPEGLSLossless": "JPEGLSLosslessTransferSyntax_1.2.840.10008.1.2.4.80",
    "Process14": "JPEGProcess14TransferSyntax_1.2.840.10008.1.2.4.57",
    "Process14SV1": "JPEGProcess14SV1TransferSyntax_1.2.840.10008.1.2.4.70",
    "RLE": "RLELosslessTransferSyntax_1.2.840.10008.1.2.5",
}


def _real_ct_as_chest(name: str, out: Path) -> Path:
    """A real file of another modality, relabelled so that its codestream reaches the decoder."""
    ds = pydicom.dcmread(shared("data/dicom/ct_syntaxes") / name)
    ds.SOPClassUID, ds.Modality, ds.BodyPartExamined = "1.2.840.10008.5.1.4.1.1.1", "CR", "CHEST"
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.save_as(out)
    return out


@pytest.mark.parametrize("name", CT_SYNTAXES.values(), ids=CT_SYNTAXES.keys())
def test_a_real_codestream_of_each_syntax_equals_the_uncompressed_one(
    tmp_path: Path, name: str
) -> None:
    plain = dicom.read(_real_ct_as_chest("CTImage.dcm", tmp_path / "plain.dcm"))
    coded = dicom.read(_real_ct_as_chest(f"CTImage.dcm_{name}.dcm", tmp_path / "coded.dcm"))
    assert np.ptp(plain.pixels) > 0.5
    np.testing.assert_array_equal(coded.pixels, plain.pixels)


@pytest.mark.parametrize("process", ["6_8", "10_12"])
def test_a_retired_12_bit_jpeg_is_refused_by_name(tmp_path: Path, process: str) -> None:
    uid = {"6_8": "1.2.840.10008.1.2.4.53", "10_12": "1.2.840.10008.1.2.4.55"}[process]
    name = f"CTImage.dcm_JPEGProcess{process}TransferSyntax_{uid}.dcm"
    with pytest.raises(DicomError, match=r"transfer syntax JPEG .*not supported; ask the PACS"):
        dicom.read(_real_ct_as_chest(name, tmp_path / "a.dcm"))


# ---- grayscale pipeline (oracle: PS3.3 formulas written out in the test)


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
        ds = _as(ExplicitVRBigEndian, ds)
    radiograph = dicom.read(save(tmp_path / "a.dcm", ds))
    np.testing.assert_allclose(radiograph.pixels.ravel(), entries / 255.0, atol=1e-6)
    assert radiograph.provenance["VOI"] == "LUT"


@pytest.mark.parametrize("vr", ["US", "OW"])
@pytest.mark.parametrize("bits", [9, 10, 12, 16])
def test_lut_entries_of_any_depth_and_input_outside_the_table(
    tmp_path: Path, bits: int, vr: str
) -> None:
    entries = np.rint(np.linspace(0, 1, 1000) ** 2 * (2**bits - 1)).astype("<u2")
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


# ---- real files and an independent implementation


def test_rg1_is_equal_in_its_lossless_encodings_and_close_in_the_lossy_one() -> None:
    read = {n: dicom.read(demo_study(f"RG1_{n}.dcm")) for n in ("UNCR", "J2KR", "UNCI", "J2KI")}
    assert read["UNCR"].pixel_sha256 == read["J2KR"].pixel_sha256
    assert read["UNCI"].pixel_sha256 == read["J2KI"].pixel_sha256
    assert np.abs(read["UNCR"].pixels - read["J2KI"].pixels).mean() * 255 < 0.5
    assert read["UNCR"].pixels.shape == (1955, 1841)
    assert read["UNCR"].view == "PA"
    assert not read["UNCR"].notes


def test_rg3_is_an_extremity() -> None:
    with pytest.raises(NotChestRadiographError, match=r"EXTREM\..., not the chest"):
        dicom.read(demo_study("RG3_J2KI.dcm"))


def test_a_real_dx_thorax_with_inverse_shape() -> None:
    path = shared("data/dicom/highdicom_dx_thorax_MONO1.dcm")
    stored = pydicom.dcmread(path).pixel_array
    np.testing.assert_allclose(dicom.read(path).pixels, 1.0 - stored / 255.0, atol=1e-6)


@pytest.mark.parametrize("name", ["OutOfBoundsOverlay.dcm", "ct_syntaxes/CTImage.dcm"])
def test_real_files_of_other_modalities_are_refused(name: str) -> None:
    with pytest.raises(NotChestRadiographError, match=r"Modality (MG|CT), .*accepted: CR, DX, RG"):
        dicom.read(shared(f"data/dicom/{name}"))


@pytest.mark.parametrize(
    "name", ["JLSL_16_15_1_1F.dcm", "emri_small_jpeg_2k_lossless_too_short.dcm", "bad_sequence.dcm"]
)
def test_malformed_real_files_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(InputError) as caught:
        dicom.read(shared(f"data/dicom/malformed/{name}"))
    assert "\n" not in str(caught.value)


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


# ---- what kind of image


@pytest.mark.parametrize("modality", ["CT", "MR", "US", "MG", "XA", "OT"])
def test_other_modalities_are_refused_by_name(tmp_path: Path, modality: str) -> None:
    with pytest.raises(NotChestRadiographError, match=f"Modality is {modality}; accepted"):
        dicom.read(write(tmp_path / "a.dcm", RAMP, bits=12, Modality=modality))


def test_a_ct_sop_class_with_modality_cr_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", RAMP, bits=12, SOPClassUID="1.2.840.10008.5.1.4.1.1.2")
    with pytest.raises(NotChestRadiographError, match="SOP class CT Image Storage"):
        dicom.read(path)


@pytest.mark.parametrize(
    ("sop_class", "modality", "note"),
    [
        ("1.2.840.10008.5.1.4.1.1.1.1", "DX", None),
        ("1.2.840.10008.5.1.4.1.1.1.1.1", "DX", "FOR PROCESSING"),
        ("1.2.840.10008.5.1.4.1.1.7", "RG", "secondary capture"),
        ("1.2.840.10008.5.1.4.1.1.1", None, "Modality is blank"),
    ],
)
def test_accepted_kinds(
    tmp_path: Path, sop_class: str, modality: str | None, note: str | None
) -> None:
    path = write(tmp_path / "a.dcm", RAMP, bits=12, SOPClassUID=sop_class, Modality=modality)
    notes = dicom.read(path).notes
    assert (len(notes) == 1 and note in notes[0]) if note else not notes


def test_a_secondary_capture_without_modality_is_refused(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.dcm", RAMP, bits=12, SOPClassUID="1.2.840.10008.5.1.4.1.1.7", Modality=None
    )
    with pytest.raises(NotChestRadiographError, match="Modality is blank"):
        dicom.read(path)


@pytest.mark.parametrize(
    "part",
    "HAND SKULL ABDOMEN EXTREMETY EXTREMITY TSPINE LSPINE KNEE PELVIS LOWER_LEG BREAST".split(),  # noqa: SIM905
)
def test_other_body_parts_are_refused(tmp_path: Path, part: str) -> None:
    with pytest.raises(NotChestRadiographError, match="not the chest"):
        dicom.read(write(tmp_path / "a.dcm", RAMP, bits=12, BodyPartExamined=part))


@pytest.mark.parametrize("part", ["CHEST", "PORTABLE CHEST", "THORAX", "chest", "CHESTABDOMEN"])
def test_chest_body_parts_pass_without_a_note(tmp_path: Path, part: str) -> None:
    path = tmp_path / "a.dcm"
    ds = dataset(RAMP, bits=12)
    ds["BodyPartExamined"]._value = part  # pydicom warns of lower case, which files contain
    assert not [n for n in dicom.read(save(path, ds)).notes if "BodyPart" in n]


@pytest.mark.parametrize(("part", "note"), [(None, "is blank"), ("RIBS", "not a known term")])
def test_an_unknown_body_part_is_noted(tmp_path: Path, part: str | None, note: str) -> None:
    notes = dicom.read(write(tmp_path / "a.dcm", RAMP, bits=12, BodyPartExamined=part)).notes
    assert any("BodyPartExamined" in n and note in n for n in notes)


@pytest.mark.parametrize(
    ("position", "code", "view"),
    [
        ("AP", None, "AP"),
        ("LL", None, "LL"),
        (None, "272479007", "PA"),
        (None, "R-10236", "LL"),
        (None, None, None),
        ("SIDEWAYS", None, None),
    ],
)
def test_view(tmp_path: Path, position: str | None, code: str | None, view: str | None) -> None:
    item = Dataset()
    item.CodeValue = code
    sequence = Sequence([item]) if code else None
    path = write(
        tmp_path / "a.dcm", RAMP, bits=12, ViewPosition=position, ViewCodeSequence=sequence
    )
    radiograph = dicom.read(path)
    assert radiograph.view == view
    assert any("ViewPosition" in n for n in radiograph.notes) == (view is None)


# ---- limits and damage


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
    path = save(tmp_path / "a.dcm", _as(syntax, ds) if syntax else ds)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(DicomError):
        dicom.read(path)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless], ids=lambda u: u.keyword)
def test_a_codestream_of_another_size_is_refused_before_it_is_decoded(
    tmp_path: Path, syntax: UID, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = _as(syntax, dataset(RAMP, bits=12))
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
    ds = _as(DeflatedExplicitVRLittleEndian, dataset(RAMP, bits=12))
    ds.add_new(0x00091001, "OB", bytes(8_000_000))
    path = save(tmp_path / "a.dcm", ds)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(dicom, "MAX_FILE_BYTES", 1_000_000)
    with pytest.raises(DicomError, match="inflates to more than 1000000 bytes"):
        dicom.read(path)


def test_a_damaged_deflate_stream_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.dcm", _as(DeflatedExplicitVRLittleEndian, dataset(RAMP, bits=12)))
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
    path = save(tmp_path / "a.dcm", _as(syntax, ds) if syntax else ds)
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


# ---- patient data


def test_patient_data_reaches_no_output(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Malformed values of identifying attributes make pydicom warn and log them."""
    caplog.set_level(logging.DEBUG)
    path = write(tmp_path / "a.dcm", RAMP, bits=12, StudyDescription=PHI)
    data = path.read_bytes()
    assert data.count(PHI.encode()) == 3
    path.write_bytes(data.replace(b"PA", b"\xff\xfe").replace(b"CHEST ", b"chest "))
    radiograph = dicom.read(path)
    output = capfd.readouterr()
    for text in (repr(radiograph), caplog.text, output.out, output.err):
        assert PHI not in text
    assert radiograph.notes


def test_pydicoms_warning_is_counted_not_quoted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    ds = dataset(RAMP, bits=12, SpecificCharacterSet="ISO_IR 100")
    path = save(tmp_path / "a.dcm", ds)
    path.write_bytes(path.read_bytes().replace(b"ISO_IR 100", PHI.encode().ljust(10)))
    with pytest.warns(UserWarning, match=PHI):  # what pydicom alone would say
        _ = pydicom.dcmread(path).PatientName
    caplog.clear()
    capfd.readouterr()
    radiograph = dicom.read(path)
    output = capfd.readouterr()
    for text in (repr(radiograph), caplog.text, output.out, output.err):
        assert PHI not in text
    assert any("deviates from the DICOM standard" in note for note in radiograph.notes)


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (b"2048", b"Z,Z2", "WindowCenter is not a number"),
        (b"CS\x02\0PA", b"ZZ\x02\0PA", "malformed DICOM"),
    ],
)
def test_an_error_names_no_value_and_hides_its_cause(
    tmp_path: Path, good: bytes, bad: bytes, message: str
) -> None:
    path = write(tmp_path / "a.dcm", RAMP, bits=12, WindowCenter=2048, WindowWidth=4096)
    assert path.read_bytes().count(good) == 1
    path.write_bytes(path.read_bytes().replace(good, bad))
    with pytest.raises(DicomError, match=message) as caught:
        dicom.read(path)
    assert caught.value.__suppress_context__
    assert "Z" not in str(caught.value).replace(str(path), "")


def test_pydicoms_logger_is_left_as_it_was(tmp_path: Path) -> None:
    level = logging.getLogger("pydicom").level
    dicom.read(write(tmp_path / "a.dcm", RAMP, bits=12))
    assert logging.getLogger("pydicom").level == level
