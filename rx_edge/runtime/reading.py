"""The files of a study become what the model sees, and what a reader of the draft must know.

It needs the bundle's recipe and no engine, so that it can run anywhere: here, or in a process of
its own (`read_ahead.py`).

Does not cover: the indication, and whether the model reads a study's second image (`pipeline.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rx_edge import guards, image
from rx_edge.config import ImageRecipe, PromptConfig
from rx_edge.radiograph import open_radiograph
from rx_edge.types import FloatArray, Radiograph

ONE_VIEW = "drafted without a lateral image"


@dataclass(frozen=True)
class StudyImages:
    """The V images of a study, frontal first.

    Attributes:
        pixels: float32 (V, 3, S, S), the encoder's input.
        flags: assumptions of the readers, and what the guards say.
        pixel_sha256: of each image (`Radiograph.pixel_sha256`).
        source_format: of the first: "dicom", "png" or "jpeg".
        read_seconds: files to radiographs, guards included.
        prepare_seconds: radiographs to `pixels`.
    """

    pixels: FloatArray
    flags: tuple[str, ...]
    pixel_sha256: tuple[str, ...]
    source_format: str
    read_seconds: float
    prepare_seconds: float


def read_images(paths: Sequence[Path], prompt: PromptConfig, recipe: ImageRecipe) -> StudyImages:
    """Read, check and prepare the images of one study.

    Raises:
        UsageError, InputError: a file is no usable chest radiograph.
    """
    started = time.perf_counter()
    radiographs = [open_radiograph(path) for path in paths]
    flags = _flags(prompt, radiographs)
    read = time.perf_counter()
    pixels = tensors(radiographs, recipe)
    return StudyImages(
        pixels=pixels,
        flags=tuple(flags),
        pixel_sha256=tuple(radiograph.pixel_sha256 for radiograph in radiographs),
        source_format=radiographs[0].source_format,
        read_seconds=read - started,
        prepare_seconds=time.perf_counter() - read,
    )


def tensors(radiographs: Sequence[Radiograph], recipe: ImageRecipe) -> FloatArray:
    """The images of a study, in their order -> (V, 3, S, S)."""
    views = [image.prepare(radiograph, recipe) for radiograph in radiographs]
    return views[0] if len(views) == 1 else np.concatenate(views)


def _flags(prompt: PromptConfig, radiographs: Sequence[Radiograph]) -> list[str]:
    """Image by image."""
    if prompt.views == "one":
        return [*radiographs[0].notes, *guards.check_image(radiographs[0])]
    frontal, lateral = radiographs[0], next(iter(radiographs[1:]), None)
    flags = [*frontal.notes, *guards.check_image(frontal, "the frontal image")]
    if lateral is not None:
        flags += [f"lateral image: {note}" for note in lateral.notes]
        flags += guards.check_image(lateral, "the lateral image")
    flags += guards.check_views(frontal.view, lateral.view if lateral is not None else None)
    return flags if lateral is not None else [*flags, ONE_VIEW]
