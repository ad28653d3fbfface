"""DICOM -> Radiograph: transfer syntaxes, which images pass, and that no patient data gets out."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, JPEGBaseline8Bit

from rx_edge import dicom
from rx_edge.errors import DicomError, InputError, NotChestRadiographError
from tests.demo_studies import demo_study
from tests.shared_data import shared
from tests.synthetic_dicom import (
    KINDS,
    PHI,
    RAMP,
    chest_like,
    dataset,
    encapsulated,
    encode,
    save,
    write,
)

# ---- transfer syntaxes


@pytest.mark.parametrize("syntax", KINDS, ids=lambda u: u.keyword)
def test_every_lossless_transfer_syntax_gives_the_same_pixels(tmp_path: Path, syntax: UID) -> None:
    path = tmp_path / "a.dcm"
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    save(path, encode(syntax, dataset(chest_like(), bits=12, **window)))
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
    ("name", "message"),
    [
        ("JLSL_16_15_1_1F.dcm", "Modality is blank"),
        ("emri_small_jpeg_2k_lossless_too_short.dcm", "no complete data set: truncated"),
        ("bad_sequence.dcm", "Modality CT"),
    ],
)
def test_malformed_real_files_are_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        dicom.read(shared(f"data/dicom/malformed/{name}"))
    assert "\n" not in str(caught.value)


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
