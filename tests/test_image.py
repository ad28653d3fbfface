"""PNG and JPEG -> Radiograph -> encoder input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rx_edge import image
from rx_edge.config import ImageRecipe
from rx_edge.errors import InputError
from rx_edge.types import Radiograph

IDENTITY = ImageRecipe(size=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
GREY = np.linspace(0, 255, 48 * 40).reshape(48, 40).astype(np.uint8)


def _png(path: Path, array: np.ndarray) -> Path:
    Image.fromarray(array).save(path, "PNG")
    return path


def _radiograph(pixels: np.ndarray) -> Radiograph:
    pixels = pixels.astype(np.float32)
    return Radiograph(pixels=pixels, pixel_sha256=image.pixel_sha256(pixels))


# ---- read


def test_8_bit_png(tmp_path: Path) -> None:
    radiograph = image.read(_png(tmp_path / "a.png", GREY))
    assert radiograph.source_format == "png"
    assert radiograph.pixels.dtype == np.float32
    np.testing.assert_allclose(radiograph.pixels, GREY / 255.0, atol=1e-7)
    assert radiograph.pixel_sha256 == image.pixel_sha256(radiograph.pixels)
    assert any("taken as displayed" in note for note in radiograph.notes)


def test_16_bit_png_keeps_its_depth(tmp_path: Path) -> None:
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = image.read(_png(tmp_path / "a.png", deep)).pixels
    np.testing.assert_allclose(pixels, deep / 65535.0, atol=1e-7)
    assert len(np.unique(pixels)) == 65536


def test_bilevel_and_palette_png(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(GREY > 100).save(path)
    np.testing.assert_array_equal(image.read(path).pixels, (GREY > 100).astype(np.float32))
    Image.fromarray(GREY).convert("P").save(path)
    np.testing.assert_allclose(image.read(path).pixels, GREY / 255.0, atol=1e-7)


def test_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(GREY).save(path, quality=95)
    radiograph = image.read(path)
    assert radiograph.source_format == "jpeg"
    assert np.abs(radiograph.pixels - GREY / 255.0).mean() < 0.01


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_equal_channels_are_grey(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(GREY).convert(mode).save(path)
    np.testing.assert_allclose(image.read(path).pixels, GREY / 255.0, atol=1e-7)


def test_a_colour_jpeg_of_a_grey_picture_with_a_small_marker_is_grey(tmp_path: Path) -> None:
    rgb = np.stack([GREY] * 3, axis=-1)
    rgb[:3, :3] = (255, 0, 0)  # 9 of 1920 pixels
    path = tmp_path / "a.jpg"
    Image.fromarray(rgb).save(path, quality=95, subsampling=0)
    assert image.read(path).pixels.shape == GREY.shape


def test_a_colour_picture_is_refused(tmp_path: Path) -> None:
    rgb = np.stack([GREY, GREY, 255 - GREY], axis=-1)
    with pytest.raises(InputError, match="is a colour image"):
        image.read(_png(tmp_path / "a.png", rgb))


def test_transparency_is_refused(tmp_path: Path) -> None:
    rgba = np.stack([GREY, GREY, GREY, GREY], axis=-1)
    with pytest.raises(InputError, match="transparent"):
        image.read(_png(tmp_path / "a.png", rgba))


def test_cmyk_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (20, 20)).save(path)
    with pytest.raises(InputError, match="CMYK"):
        image.read(path)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, shown turned by 90 degrees
    Image.fromarray(GREY).save(path, exif=exif, quality=95)
    pixels = image.read(path).pixels
    assert pixels.shape == (40, 48)
    assert np.abs(pixels - np.rot90(GREY, -1) / 255.0).mean() < 0.01


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, part: float) -> None:
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(InputError, match="truncated, damaged") as caught:
        image.read(path)
    assert "\n" not in str(caught.value)


def test_another_format_and_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(GREY).save(path, "BMP")
    with pytest.raises(InputError, match="cannot be decoded as PNG or JPEG"):
        image.read(path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        image.read(tmp_path / "absent.png")


def test_too_many_pixels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _png(tmp_path / "a.png", GREY)
    monkeypatch.setattr(image, "MAX_PIXELS", GREY.size - 1)
    with pytest.raises(InputError, match="more than 1919 pixels"):
        image.read(path)


@pytest.mark.parametrize("pillow_limit", [1500, 500])  # Pillow warns above, raises above twice
def test_pillows_bomb_guard_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pillow_limit: int
) -> None:
    path = _png(tmp_path / "a.png", GREY)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    with pytest.raises(InputError, match="a radiograph has fewer"):
        image.read(path)


def test_a_text_bomb_is_refused(tmp_path: Path) -> None:
    path, info = tmp_path / "a.png", PngInfo()
    info.add_text("a", "x" * 5_000_000, zip=True)
    Image.fromarray(GREY).save(path, pnginfo=info)
    with pytest.raises(InputError):
        image.read(path)


# ---- pixel_sha256


def test_hash_depends_on_values_and_shape_and_not_on_layout() -> None:
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert image.pixel_sha256(a) == image.pixel_sha256(np.asfortranarray(a))
    assert image.pixel_sha256(a) == image.pixel_sha256(a.astype(">f4"))
    assert image.pixel_sha256(a) != image.pixel_sha256(a.reshape(3, 2))
    assert image.pixel_sha256(a) != image.pixel_sha256(np.nextafter(a, np.float32(9)))


def test_hash_is_pinned() -> None:
    """Caches and golden vectors live across versions: this value may only change knowingly."""
    digest = image.pixel_sha256(np.zeros((2, 3), dtype=np.float32))
    assert digest == "9298a62c7efea8bcbd08a5cbe5d3f686e143a1daaf542820f44cbcb7d2c8c99b"


# ---- prepare


def test_prepare_is_normalised_contiguous_and_deterministic() -> None:
    recipe = ImageRecipe()
    radiograph = _radiograph(GREY / 255.0)
    tensor = image.prepare(radiograph, recipe)
    assert tensor.shape == (1, 3, 224, 224)
    assert tensor.dtype == np.float32
    assert tensor.flags.c_contiguous
    np.testing.assert_array_equal(tensor, image.prepare(radiograph, recipe))
    plain = tensor[0] * np.array(recipe.std)[:, None, None] + np.array(recipe.mean)[:, None, None]
    np.testing.assert_allclose(plain[0], plain[2], atol=1e-6)
    assert plain.min() >= -1e-6
    assert plain.max() <= 1.0 + 1e-6


@pytest.mark.parametrize(
    ("shape", "content"),
    [((64, 32), (slice(0, 32), slice(8, 24))), ((32, 64), (slice(8, 24), slice(0, 32)))],
)
def test_aspect_is_kept_and_the_padding_is_black_and_centred(
    shape: tuple[int, int], content: tuple[slice, slice]
) -> None:
    square = image.prepare(_radiograph(np.ones(shape)), IDENTITY)[0, 0]
    np.testing.assert_allclose(square[content], 1.0, atol=1e-6)
    square[content] = 0.0
    assert not square.any()


def test_the_size_of_the_encoder_is_left_untouched() -> None:
    pixels = np.random.default_rng(0).random((32, 32), dtype=np.float32)
    np.testing.assert_array_equal(image.prepare(_radiograph(pixels), IDENTITY)[0, 1], pixels)


def test_shrinking_is_antialiased() -> None:
    """A one-pixel checkerboard must become its mean, not a moire pattern."""
    board = np.indices((320, 320)).sum(axis=0) % 2
    middle = image.prepare(_radiograph(board), IDENTITY)[0, 0, 2:-2, 2:-2]
    np.testing.assert_allclose(middle, 0.5, atol=0.02)


def test_bicubic_overshoot_is_clipped() -> None:
    step = np.zeros((16, 16))
    step[:, 8:] = 1.0
    square = image.prepare(_radiograph(step), IDENTITY)
    assert square.min() == 0.0
    assert square.max() == 1.0


def test_a_line_of_pixels_survives() -> None:
    assert image.prepare(_radiograph(np.ones((1, 1000))), IDENTITY).sum() > 0
