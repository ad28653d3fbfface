"""Faults planted into the runtime's code (`test_mutations.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rx_edge import grayscale, image, prompting
from rx_edge.bundle import open_bundle
from rx_edge.runtime import session as session_module
from rx_edge_export.verify import verify
from tests.export.planting import Plant


def rendered_as(photometric: str) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        faithful = grayscale.render

        def render(stored: Any, dataset: Any) -> Any:
            dataset.PhotometricInterpretation = photometric
            return faithful(stored, dataset)

        patch.setattr("rx_edge.dicom.render", render)

    return plant


def pixels_changed(change: Callable[[Any], Any]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        faithful = image.prepare

        def prepare(radiograph: Any, recipe: Any) -> Any:
            return np.ascontiguousarray(change(faithful(radiograph, recipe)))

        patch.setattr(image, "prepare", prepare)

    return plant


def other_kernel(patch: pytest.MonkeyPatch) -> None:
    faithful = image.Image.Image.resize

    def resize(self: Any, size: Any, _: Any) -> Any:
        return faithful(self, size, image.Image.Resampling.BILINEAR)

    patch.setattr(image.Image.Image, "resize", resize)


def first_token_doubled(patch: pytest.MonkeyPatch) -> None:
    faithful = prompting.prompt_ids

    def prompt_ids(prompt: Any, tokenizer: Any) -> Any:
        ids = faithful(prompt, tokenizer)
        return replace(ids, before=(ids.before[0], *ids.before))

    patch.setattr(session_module, "prompt_ids", prompt_ids)


IN_THE_RUNTIME: dict[str, tuple[Plant, str]] = {
    "inversion missing": (rendered_as("MONOCHROME2"), "pixels"),
    "inversion twice": (rendered_as("MONOCHROME1"), "pixels"),
    "resize kernel changed": (other_kernel, "pixels"),
    "mirrored left to right": (pixels_changed(lambda p: p[..., ::-1]), "pixels"),
    "padded with white": (
        pixels_changed(lambda p: np.where(p == p[..., :1, :1], p.max(), p)),
        "pixels",
    ),
    "scaled to -1..1": (pixels_changed(lambda p: p / np.abs(p).max()), "pixels"),
    "BOS doubled": (first_token_doubled, "prefill_logits"),
}


@pytest.mark.parametrize("fault", IN_THE_RUNTIME)
def test_a_fault_of_the_runtime_is_refused(
    int8_bundle: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    plant, stage = IN_THE_RUNTIME[fault]
    plant(monkeypatch)
    assert stage in {s.stage for s in verify(open_bundle(int8_bundle)).failures()}
