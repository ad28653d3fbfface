"""Studies for calibration and for comparing drafts: real ones, or variations of the canaries.

Two disjoint sets: `fit` is what int8 ranges and importance matrices are computed from, `check`
is what whole drafts are compared on. From a corpus, `fit` comes from its training split and
`check` from the others. Without a corpus both are made from the canary studies by small seeded
changes (a few degrees, percent and grey levels): real pixels, but not many patients, and the
manifest says so. A variation has no indication, and as its lateral image, where the model reads
one, another variation: what matters is that both are in their places.

Does not cover: reference drafts (`reference.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rx_edge import image
from rx_edge.bundle import describe
from rx_edge.config import CorpusConfig, ImageRecipe, PromptConfig
from rx_edge.errors import ExportError, RxEdgeError
from rx_edge.prompting import takes_indication
from rx_edge.radiograph import open_radiograph
from rx_edge.train.data import Sample, pairs_jsonl
from rx_edge.types import FloatArray, ImageTensor, Radiograph
from rx_edge_export import phantom

MINIMUM = 50  # studies to compare drafts on; fewer cannot show a rare flip
_PLAIN = PromptConfig()


@dataclass(frozen=True)
class Study:
    """One calibration study; `report` is "" where nobody wrote one."""

    name: str
    pixels: ImageTensor  # (V, 3, S, S)
    report: str
    indication: str = ""


@dataclass(frozen=True)
class Calibration:
    """Two disjoint sets of studies, and where they came from."""

    fit: tuple[Study, ...]
    check: tuple[Study, ...]
    origin: str
    sha256: str


def load(
    source: Path | None,
    canaries: Sequence[Path],
    recipe: ImageRecipe,
    count: int,
    prompt: PromptConfig = _PLAIN,
) -> Calibration:
    """Read or make `count` studies for each set.

    Args:
        source: a pairs.jsonl or its directory; None = variations of `canaries`, or of synthetic
            phantoms where there are none.
        prompt: of the model, which says what of a study it reads.

    Raises:
        ExportError: fewer than `MINIMUM` asked for, or too few in the corpus.
        ConfigError, InputError: the corpus, or an image in it, cannot be read.
    """
    if count < MINIMUM:
        raise ExportError(f"studies is {count}; at least {MINIMUM} are needed to compare drafts on")
    if source is None:
        return _varied(canaries, recipe, count, prompt)
    return _from_corpus(source, recipe, count, prompt)


def _from_corpus(
    source: Path, recipe: ImageRecipe, count: int, prompt: PromptConfig
) -> Calibration:
    config = CorpusConfig() if prompt.views == "one" else CorpusConfig(views=prompt.views)
    corpus = pairs_jsonl.read(source, config)
    splits = (("train",), ("val", "test"))
    sets: list[tuple[Study, ...]] = []
    for names in splits:
        samples = [s for name in names for s in corpus.split(name) if s.image is not None]
        # spread over the corpus, and the same ones every time
        samples.sort(key=lambda s: hashlib.sha256(s.id.encode()).hexdigest())
        if len(samples) < MINIMUM:
            raise ExportError(
                f"{str(source)!r} has {len(samples)} studies in {' + '.join(names)}; "
                f"at least {MINIMUM} are needed: add some, or leave --calibration out"
            )
        sets.append(tuple(_study(sample, recipe, prompt) for sample in samples[:count]))
    file = source / "pairs.jsonl" if source.is_dir() else source
    fit, check = sets
    origin = f"corpus of {len(corpus.samples)} studies"
    return Calibration(fit, check, origin, describe(file).sha256)


def _study(sample: Sample, recipe: ImageRecipe, prompt: PromptConfig) -> Study:
    try:
        pixels = [image.prepare(open_radiograph(path), recipe) for path in sample.images]
    except RxEdgeError as error:
        raise ExportError(f"calibration study {sample.id!r}: {error}") from error
    indication = sample.indication if takes_indication(prompt) else ""
    return Study(sample.id, np.concatenate(pixels), sample.target, indication)


def _varied(
    canaries: Sequence[Path], recipe: ImageRecipe, count: int, prompt: PromptConfig
) -> Calibration:
    originals = [open_radiograph(path).pixels for path in canaries]
    origin = f"variations of {len(originals)} real canary studies"
    if not originals:
        originals = [phantom.display(seed) for seed in range(3, 9)]
        origin = "variations of synthetic phantoms: no real study was given"
    digest = hashlib.sha256()
    for pixels in originals:
        digest.update(image.pixel_sha256(pixels).encode())

    def variation(seed: int) -> ImageTensor:
        pixels = vary(originals[seed % len(originals)], seed=seed)
        return image.prepare(Radiograph(pixels, image.pixel_sha256(pixels)), recipe)

    laterals = () if prompt.views == "one" else (2 * count + 1,)
    studies = []
    for number in range(2 * count):
        views = [variation(number + apart) for apart in (0, *laterals)]
        studies.append(Study(f"variation-{number}", np.concatenate(views), ""))
    return Calibration(tuple(studies[:count]), tuple(studies[count:]), origin, digest.hexdigest())


def vary(pixels: FloatArray, *, seed: int) -> FloatArray:
    """Another exposure of the same chest: float32 (H, W) in [0, 1] -> the same shape.

    Rotation to 6 degrees, zoom to 10 %, shift to 5 %, gamma 0.7 to 1.4, 1 % noise. Never a mirror
    image: sides must stay what they are.
    """
    rng = np.random.default_rng(seed)
    height, width = pixels.shape
    angle, zoom = np.deg2rad(rng.uniform(-6, 6)), rng.uniform(0.9, 1.1)
    dy, dx = rng.uniform(-0.05, 0.05, 2) * (height, width)
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    cy, cx = height / 2, width / 2
    matrix = (
        cos, sin, cx - cos * (cx + dx) - sin * (cy + dy),
        -sin, cos, cy + sin * (cx + dx) - cos * (cy + dy),
    )  # fmt: skip
    moved = Image.fromarray(pixels).transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    out = np.asarray(moved, np.float32).clip(0.0, 1.0) ** rng.uniform(0.7, 1.4)
    out = out + rng.normal(0.0, 0.01, out.shape)
    varied: FloatArray = out.clip(0.0, 1.0).astype(np.float32)
    return varied
