"""Faults planted into the exporter's code while it exports (`test_mutations.py`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rx_edge.bundle import StageResult
from rx_edge.errors import VerificationError
from rx_edge_export import (
    artifacts,
    gguf_architectures,
    gguf_quantize,
    llm_gguf,
    merge_lora,
    vision_onnx,
)
from rx_edge_export.export import export
from tests.export.planting import LEAN, SMALL, Plant


def update_scaled(factor: float) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        faithful = merge_lora._update
        patch.setattr(merge_lora, "_update", lambda *a: factor * faithful(*a))

    return plant


def adapter_lost_after_merging(patch: pytest.MonkeyPatch) -> None:
    """As if the base's directory had been converted in place of the merged one."""
    update_scaled(0.0)(patch)
    patch.setattr(merge_lora, "_compare", lambda *_: StageResult("merge", passed=True))


def q_and_k_not_permuted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(llm_gguf, "_permuted", lambda weight, heads: weight)


def numbers_changed(**changes: float) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        faithful = gguf_architectures.read

        def read(path: Path) -> Any:
            found = faithful(path)
            return replace(found, numbers={**found.numbers, **changes})

        patch.setattr(gguf_architectures, "read", read)

    return plant


def weights_changed(target: str, change: Callable[[Any], Any]) -> Plant:
    """Change one tensor of the GGUF between reading and writing."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        faithful = llm_gguf._load

        def load(tensor: Any, file: Path, kind: Any) -> Any:
            array = faithful(tensor, file, kind)
            return np.ascontiguousarray(change(array)) if tensor.target == target else array

        patch.setattr(llm_gguf, "_load", load)

    return plant


def tensors_swapped(patch: pytest.MonkeyPatch) -> None:
    """gate and up have the same shape."""
    faithful = gguf_architectures.read

    def read(path: Path) -> Any:
        found = faithful(path)
        names = {"ffn_gate": "ffn_up", "ffn_up": "ffn_gate"}
        swapped = [
            replace(t, target=re.sub(r"ffn_gate|ffn_up", lambda m: names[m.group()], t.target))
            for t in found.tensors
        ]
        return replace(found, tensors=tuple(swapped))

    patch.setattr(gguf_architectures, "read", read)


def vision_wrapped(wrap: Callable[[Any], Any]) -> Plant:
    """Export another module than the trained encoder; the writer's own check sees no difference."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        faithful = vision_onnx.write

        def write(module: Any, *rest: Any, **named: Any) -> Any:
            return faithful(wrap(module), *rest, **named)

        patch.setattr(vision_onnx, "write", write)

    return plant


class Rolled(torch.nn.Module):
    """The soft prompt, off by one token."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: Any) -> Any:
        return self.inner(pixel_values).roll(1, dims=1)


def norm_skipped(module: Any) -> Any:
    module.projector.net[0] = torch.nn.Identity()
    return module


def patches_reversed(module: Any) -> Any:
    table = next(p for n, p in module.vision.named_parameters() if "position_embeddings" in n)
    with torch.no_grad():
        table[:, 1:] = table[:, 1:].flip(1)
    return module


def quantised_too_far(patch: pytest.MonkeyPatch) -> None:
    """A 4-bit file under an 8-bit name."""
    faithful = artifacts.gguf_quantize.quantize

    def quantize(src: Path, out: Path, *, file_type: str, **rest: Any) -> Any:
        return faithful(src, out, file_type="IQ4_NL", **rest)

    patch.setattr(gguf_quantize, "quantize", quantize)


def ranges_of_other_images(patch: pytest.MonkeyPatch) -> None:
    """int8 ranges calibrated on images that are nearly black."""
    faithful = artifacts.vision_quantize.to_int8

    def to_int8(src: Path, out: Path, *, images: Any, **rest: Any) -> Any:
        return faithful(src, out, images=[i * 0.01 - 2.0 for i in images], **rest)

    patch.setattr(artifacts.vision_quantize, "to_int8", to_int8)


AT_EXPORT: dict[str, tuple[Plant, str]] = {
    "adapter dropped": (update_scaled(0.0), "merge"),
    "adapter merged twice": (update_scaled(2.0), "merge"),
    "adapter lost after merging": (adapter_lost_after_merging, "prefill_logits"),
    "q and k not permuted": (q_and_k_not_permuted, "prefill_logits"),
    "rope base 10000": (numbers_changed(rope_freq_base=10000.0), "prefill_logits"),
    "wrong RMS eps": (numbers_changed(layer_norm_rms_eps=0.1), "prefill_logits"),
    "embedding rows shifted": (
        weights_changed("token_embd.weight", lambda w: np.roll(w, 1, axis=0)),
        "prefill_logits",
    ),
    "norm weights of the LM halved": (
        weights_changed("blk.1.ffn_norm.weight", lambda w: w * 0.5),
        "prefill_logits",
    ),
    "one attention output negated": (
        weights_changed("blk.0.attn_output.weight", lambda w: -w),
        "prefill_logits",
    ),
    "key heads in another order": (
        weights_changed("blk.0.attn_k.weight", lambda w: np.roll(w, len(w) // 2, axis=0)),
        "prefill_logits",
    ),
    "gate and up swapped": (tensors_swapped, "prefill_logits"),
    "4-bit file under an 8-bit name": (quantised_too_far, "prefill_logits"),
    "soft prompt off by one patch": (vision_wrapped(Rolled), "soft_prompt"),
    "layer norm of the projector skipped": (vision_wrapped(norm_skipped), "soft_prompt"),
    "position embedding reversed": (vision_wrapped(patches_reversed), "soft_prompt"),
    "int8 ranges of other images": (ranges_of_other_images, "soft_prompt"),
}


@pytest.mark.parametrize("fault", AT_EXPORT)
def test_a_fault_of_the_exporter_is_refused(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    plant, stage = AT_EXPORT[fault]
    plant(monkeypatch)
    with pytest.raises(VerificationError, match=rf"stage {stage} of"):
        export(
            tiny_run, tmp_path / "out", config=SMALL if "bit" in fault or "int8" in fault else LEAN
        )
    assert list(tmp_path.iterdir()) == []  # neither a bundle nor anything half-made
