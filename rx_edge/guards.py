"""Plain checks on what goes into the model and on what comes out of it.

A flag is a sentence for the reader of the draft; it never changes the image or the text. The
thresholds are few and were set on data: 404 real chest radiographs (frontal and lateral, from
copies of covid-chestxray-dataset), none of which raises a flag, and the 3,425 findings of Open-i,
of which six do: they repeat themselves.

Does not cover: whether the picture is a chest, whether the text is true. A draft without flags
is still a draft.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from rx_edge.errors import InputError
from rx_edge.types import FloatArray, Radiograph

BLANK = 1.0 / 255.0  # less than one 8-bit grey level between the darkest and brightest pixel
SHORT_SIDE = 128  # pixels; the encoder's input is 224
GRID = 512  # rows or columns that say enough about contrast; all of them where there are fewer
CONTRAST = 0.15  # 1st to 99th percentile; the least of the 404 was 0.28
ASPECT = 2.5  # long side / short side; the most extreme of the 404 was 2.23
POLARITY = -0.1  # middle minus upper corners; 0 of the 404 below, 97 % of them when inverted

FRONTAL, LATERAL = ("PA", "AP"), ("LL", "RL", "LATERAL")  # ViewPosition, PS3.3 C.8.11.5

NGRAM = 5  # words
NGRAM_TIMES = 3  # occurrences


def check_image(radiograph: Radiograph, name: str = "the image") -> tuple[str, ...]:
    """Flags on an image that the model is about to see.

    Args:
        name: what a flag calls it.

    Raises:
        InputError: the image is blank, so that any draft would be invented.
    """
    pixels = radiograph.pixels
    if float(pixels.max()) - float(pixels.min()) < BLANK:
        raise InputError(f"{name} is blank: all pixels are equal; check the file and its window")
    flags = []
    short, long = sorted(pixels.shape)
    if short < SHORT_SIDE:
        flags.append(f"{name} is small: {short} pixels on its short side")
    if long > ASPECT * short:
        flags.append(f"{name}'s shape is unusual: {long} x {short} pixels")
    step = max(1, short // GRID)
    low, high = np.percentile(pixels[::step, ::step], (1, 99))
    if high - low < CONTRAST:
        flags.append(f"{name} has very low contrast; check its window")
    if _middle_minus_corners(pixels) < POLARITY:
        flags.append(f"{name} may be inverted: its middle is darker than its upper corners")
    return tuple(flags)


def check_views(frontal: str | None, lateral: str | None) -> tuple[str, ...]:
    """Flags where a file states another view than it is given as; nothing is guessed or swapped.

    Args:
        frontal, lateral: `Radiograph.view` of the images given as such; None = not stated, or no
            such image.
    """
    given = (("frontal", frontal, LATERAL), ("lateral", lateral, FRONTAL))
    return tuple(f"the image given as {name} says it is {v}" for name, v, no in given if v in no)


def check_text(text: str, *, finish: str) -> tuple[str, ...]:
    """Flags on a draft.

    Args:
        finish: "end" when the model ended the draft, "length" when the limit did, "loop" when it
            was stopped because it repeats itself.
    """
    flags = []
    if finish == "length":
        flags.append("the draft was cut by the length limit")
    if finish == "loop":
        flags.append("the draft was cut where it only repeats itself")
    words = re.findall(r"\w+", text.lower())
    if not words:
        flags.append("the draft is empty")
    elif _repeats_sentence(text):
        flags.append("the draft repeats a sentence")
    elif _loops(words):
        flags.append("the draft repeats the same words")
    return tuple(flags)


def _middle_minus_corners(pixels: FloatArray) -> float:
    """Mean of the mediastinum's column minus mean of both upper corners (air beside the neck)."""
    height, width = pixels.shape
    middle = pixels[height // 4 : height - height // 4, int(0.42 * width) : int(0.58 * width) + 1]
    top, side = max(1, height // 10), max(1, width // 5)
    corners = np.concatenate([pixels[:top, :side], pixels[:top, -side:]], axis=1)
    return float(middle.mean()) - float(corners.mean())


def _repeats_sentence(text: str) -> bool:
    """Whether a sentence of at least three words occurs twice, case and punctuation aside."""
    sentences = (" ".join(re.findall(r"\w+", part)) for part in re.split(r"[.!?\n]+", text.lower()))
    counts = Counter(sentence for sentence in sentences if sentence.count(" ") >= 2)
    return any(count > 1 for count in counts.values())


def _loops(words: list[str]) -> bool:
    """Whether any run of NGRAM words occurs NGRAM_TIMES times: a decoding loop."""
    runs = Counter(tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1))
    return any(count >= NGRAM_TIMES for count in runs.values())
