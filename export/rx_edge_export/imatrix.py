"""The importance matrix: how large are the numbers that each column of a weight meets?

llama.cpp's quantiser keeps important columns more precisely. Its own tool feeds text; this model
also reads soft prompts, whose numbers are distributed differently, so the matrix is collected
from what the model really sees: prompt, soft prompt, prompt, report.

Does not cover: the quantisation (`gguf_quantize.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rx_edge.errors import ExportError
from rx_edge.model.hub import transformers
from rx_edge.prompting import PromptIds
from rx_edge.types import FloatArray, SoftPrompt
from rx_edge_export import gguf_architectures


@dataclass(frozen=True)
class Stream:
    """What the model reads of one study.

    Attributes:
        soft: (N, D) inside the prompt, or None for text alone.
        report: its ids, the end token excluded.
    """

    prompt: PromptIds
    soft: SoftPrompt | None
    report: Sequence[int]


@torch.inference_mode()
def collect(
    merged_dir: Path,
    streams: Sequence[Stream],
    tick: Callable[[int], None] = lambda _: None,
) -> dict[str, FloatArray]:
    """Run `streams` through the merged float32 model.

    Args:
        merged_dir: the merged language model, a Hugging Face directory.

    Returns:
        GGUF tensor name -> float32 (columns,): mean of the squared inputs.

    Raises:
        ExportError: no streams, or a layer that never ran.
    """
    if not streams:
        raise ExportError("an importance matrix needs calibration studies; none were given")
    model = transformers().AutoModelForCausalLM.from_pretrained(merged_dir, dtype=torch.float32)
    architecture = gguf_architectures.read(merged_dir / "config.json")
    sums = _Sums(model, architecture)
    table = model.get_input_embeddings()

    def embed(ids: Sequence[int]) -> torch.Tensor:
        out: torch.Tensor = table(torch.tensor(list(ids), dtype=torch.long))
        return out

    for number, one in enumerate(streams):
        prompt, middle = one.prompt, [] if one.soft is None else [torch.from_numpy(one.soft)]
        after = [*prompt.after, *one.report, prompt.end]
        embeds = torch.cat([embed(prompt.before), *middle, embed(after)])
        model(inputs_embeds=embeds[None], use_cache=False)
        tick(number + 1)
    return sums.means()


class _Sums:
    """Hooks on every matrix that the GGUF stores, adding up squared inputs per column."""

    def __init__(self, model: Any, architecture: gguf_architectures.Architecture) -> None:
        targets = {
            t.source.removesuffix(".weight"): t.target
            for t in architecture.tensors
            if t.source.endswith(".weight") and len(t.shape) == 2
        }
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._expected = set()
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Embedding):
                continue
            target = targets.get(name)
            if name == "lm_head" and architecture.tied:
                target = "token_embd.weight"  # one matrix, used as table and as head
            if target is not None:
                self._expected.add(target)
                module.register_forward_pre_hook(self._adder(target))

    def _adder(self, target: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def add(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            before = self._sums.get(target, torch.zeros(rows.shape[1], dtype=torch.float64))
            self._sums[target] = before + rows.pow(2).sum(0)
            self._counts[target] = self._counts.get(target, 0) + len(rows)

        return add

    def means(self) -> dict[str, FloatArray]:
        missing = self._expected - set(self._sums)
        if missing:
            raise ExportError(f"importance matrix: {min(missing)!r} never ran")
        return {
            name: (total / self._counts[name]).numpy().astype(np.float32)
            for name, total in sorted(self._sums.items())
        }
