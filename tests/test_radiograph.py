"""open_radiograph: the content decides, and every wrong file gets one clear line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rx_edge.errors import InputError, NotChestRadiographError, UsageError
from rx_edge.radiograph import open_radiograph
from tests.synthetic_dicom import chest_like, write

GREY = (chest_like(64, 48, top=255)).astype(np.uint8)


def test_the_content_decides_not_the_extension(tmp_path: Path) -> None:
    for file_format, name in (("PNG", "a.dcm"), ("JPEG", "b.png")):
        Image.fromarray(GREY).save(tmp_path / name, file_format)
        assert open_radiograph(tmp_path / name).source_format == file_format.lower()
    write(tmp_path / "c.jpg", GREY, bits=8)
    assert open_radiograph(tmp_path / "c.jpg").source_format == "dicom"


def test_dicom_and_png_of_the_same_picture_have_the_same_hash(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.png")
    write(tmp_path / "a", GREY, bits=8)
    png, dicom = open_radiograph(tmp_path / "a.png"), open_radiograph(tmp_path / "a")
    np.testing.assert_allclose(png.pixels, dicom.pixels, atol=1e-7)
    assert png.pixel_sha256 == dicom.pixel_sha256


def test_a_missing_file_and_a_directory_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent' does not exist"):
        open_radiograph(tmp_path / "absent")
    with pytest.raises(UsageError, match="is a directory"):
        open_radiograph(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"%PDF-1.7 ...", "accepted: DICOM .*, PNG and JPEG"),
        (b"II*\0" + bytes(300), "accepted: DICOM"),
        (b"\x89PNG\r\n\x1a\n", "truncated, damaged"),
        (b"\xff\xd8\xff\xe0", "truncated, damaged"),
        (bytes(128) + b"DICM", "a.bin': "),
        (bytes(128) + b"DICM" + b"\xff" * 500, "a.bin': "),
    ],
)
def test_wrong_content_is_an_input_error_in_one_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        open_radiograph(path)
    assert "\n" not in str(caught.value)


def test_a_path_through_a_file_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(InputError, match="cannot be read"):
        open_radiograph(tmp_path / "a" / "b")


def test_the_readers_refusals_pass_through(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", GREY, bits=8, Modality="CT")
    with pytest.raises(NotChestRadiographError, match="Modality is CT"):
        open_radiograph(path)
