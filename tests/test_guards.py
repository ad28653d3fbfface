"""Flags on images and drafts: each one fires on its own fault, and none on real data."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rx_edge import image
from rx_edge.errors import InputError
from rx_edge.guards import check_image, check_text
from rx_edge.types import Radiograph
from tests.shared_data import shared
from tests.synthetic_dicom import chest_like

NORMAL = (
    "The heart is normal in size. The mediastinum is unremarkable. The lungs are clear. "
    "There is no pleural effusion. There is no pneumothorax."
)


def _radiograph(pixels: np.ndarray) -> Radiograph:
    pixels = pixels.astype(np.float32)
    return Radiograph(pixels=pixels, pixel_sha256=image.pixel_sha256(pixels))


def _chest(height: int = 300, width: int = 256) -> np.ndarray:
    return chest_like(height, width) / 4095.0


@pytest.mark.parametrize(("height", "width"), [(300, 256), (1800, 1536)])
def test_a_good_image_has_no_flag(height: int, width: int) -> None:
    assert check_image(_radiograph(_chest(height, width))) == ()


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_a_blank_image_is_refused(level: float) -> None:
    with pytest.raises(InputError, match="blank"):
        check_image(_radiograph(np.full((300, 256), level)))


@pytest.mark.parametrize(
    ("pixels", "word"),
    [
        (_chest(127, 150), "small: 127 pixels"),
        (_chest(900, 300), "shape is unusual: 900 x 300"),
        (0.4 + 0.1 * _chest(), "very low contrast"),
        (0.4 + 0.1 * _chest(1800, 1536), "very low contrast"),
        (1.0 - _chest(), "may be inverted"),
    ],
)
def test_each_fault_raises_its_own_flag(pixels: np.ndarray, word: str) -> None:
    flags = check_image(_radiograph(pixels))
    assert len(flags) == 1
    assert word in flags[0]


def test_tiny_images_do_not_break_the_checks() -> None:
    for shape in ((1, 2), (2, 1), (3, 3)):
        pixels = np.linspace(0, 1, shape[0] * shape[1]).reshape(shape)
        assert any("small" in flag for flag in check_image(_radiograph(pixels)))


def test_no_real_radiograph_is_flagged_and_most_inverted_ones_are() -> None:
    folder = shared("data/cxr_pairs")
    lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    names = [json.loads(line)["image"] for line in lines][::8]
    inverted = 0
    for name in names:
        radiograph = image.read(folder / "images" / name)
        assert check_image(radiograph) == (), name
        flags = check_image(_radiograph(1.0 - radiograph.pixels))
        inverted += any("inverted" in flag for flag in flags)
    assert len(names) > 40
    assert inverted / len(names) > 0.9


def test_a_normal_report_has_no_flag() -> None:
    assert check_text(NORMAL, finish="end") == ()


@pytest.mark.parametrize(
    ("text", "finish", "words"),
    [
        ("", "end", ["empty"]),
        (" .\n", "length", ["length limit", "empty"]),
        (NORMAL, "length", ["length limit"]),
        (NORMAL + " THE LUNGS ARE CLEAR!", "end", ["repeats a sentence"]),
        ("clear lungs and " * 6, "end", ["repeats the same words"]),
        ("no " * 7, "length", ["length limit", "repeats the same words"]),
    ],
)
def test_flags_on_text(text: str, finish: str, words: list[str]) -> None:
    flags = check_text(text, finish=finish)
    assert len(flags) == len(words)
    assert all(word in flag for word, flag in zip(words, flags, strict=True))


def test_short_formulas_may_recur() -> None:
    text = "Right lung: clear. Left lung: clear. Normal. Heart: normal. Normal."
    assert check_text(text, finish="end") == ()
