"""Samples to embedding batches, padded or packed, with loss on the report's tokens only.

The order is a pure function of (seed, stage, epoch), so a resumed run sees the same batches.
Batches hold samples of similar length, so that a padded one wastes little.

Does not cover: attention within a packed row (`packing.py`), how a step is split (`engine.py`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rx_edge.model.report_model import IGNORE, ReportModel
from rx_edge.prompting import encode
from rx_edge.train.data import Sample
from rx_edge.train.data.sentences import split_sentences
from rx_edge.train.features import Features


@dataclass(frozen=True)
class Example:
    """A sample whose target is tokenised: ids (T,) that carry loss, the end included if known."""

    sample: Sample
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Sequences right-padded in rows of their own, or one after the other in a single row.

    Attributes:
        embeds: (B, T, D) inputs.
        mask: (B, T) 1 where real.
        targets: (B, T) the id that position t must predict, or IGNORE.
        lengths: tokens of each sample of a packed row, whose B is 1; None where padded.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...] | None = None

    @property
    def positions(self) -> torch.Tensor | None:
        """(1, T) positions, which start again at 0 with every sample; None where padded."""
        if self.lengths is None:
            return None
        device = self.embeds.device
        return torch.cat([torch.arange(n, device=device) for n in self.lengths])[None]


def examples(model: ReportModel, samples: Sequence[Sample], max_tokens: int) -> list[Example]:
    """Tokenise targets; those longer than `max_tokens` are cut at a sentence end."""
    return [
        Example(sample, target_ids(model.tokenizer, model.prompt.end, sample, max_tokens))
        for sample in samples
    ]


def target_ids(tokenizer: Any, end: int, sample: Sample, max_tokens: int) -> tuple[int, ...]:
    """Ids (T,) of a target cut to `max_tokens`; then `end`, unless the target was cut."""
    sentences, complete = split_sentences(sample.target), sample.complete
    ids = encode(tokenizer, " ".join(sentences))
    while len(ids) > max_tokens and len(sentences) > 1:
        sentences, complete = sentences[:-1], False
        ids = encode(tokenizer, " ".join(sentences))
    if len(ids) > max_tokens:
        ids, complete = ids[:max_tokens], False
    return (*ids, end) if complete else tuple(ids)


def epoch_order(
    items: Sequence[Example], batch_size: int, seed: int, stage: str, epoch: int
) -> list[list[Example]]:
    """Batches of one epoch: shuffled, then sorted by length inside windows of 8 batches."""
    rng = random.Random(f"{seed}/{stage}/{epoch}")
    order = list(items)
    rng.shuffle(order)
    window = batch_size * 8
    batches = []
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lambda e: len(e.ids))
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    rng.shuffle(batches)
    return batches


def sequence_length(model: ReportModel, example: Example, soft_tokens: int) -> int:
    """Tokens that a sample takes in a batch: the last id is only predicted, never fed."""
    prompt = len(model.prompt.before) + soft_tokens + len(model.prompt.after)
    return prompt + len(example.ids) - 1


def collate(
    model: ReportModel,
    items: Sequence[Example],
    features: Features | None,
    softs: Sequence[torch.Tensor | None] | None = None,
    *,
    packed: bool = False,
) -> Batch:
    """Build the batch; gradients flow into the projector through the soft prompts.

    Args:
        features: gives those of the items' images; None for text only.
        softs: soft prompts (N, D) to use instead of those of the items' own images.
        packed: all items in one row, without padding.
    """
    if softs is None:
        softs = _soft_prompts(model, items, features)
    rows, targets = [], []
    for example, soft in zip(items, softs, strict=True):
        prompt = model.prompt_embeddings(soft)
        rows.append(torch.cat([prompt, model.embed(example.ids[:-1])]))
        target = torch.full((len(rows[-1]),), IGNORE)
        target[len(prompt) - 1 :] = torch.tensor(example.ids)
        targets.append(target)
    lengths = tuple(len(row) for row in rows)
    if packed:
        rows, targets = [torch.cat(rows)], [torch.cat(targets)]
    device = rows[0].device
    mask = [torch.ones(len(r), dtype=torch.long) for r in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(
        embeds=pad(rows, batch_first=True),
        mask=pad(mask, batch_first=True).to(device),
        targets=pad(targets, batch_first=True, padding_value=IGNORE).to(device),
        lengths=lengths if packed else None,
    )


def _soft_prompts(
    model: ReportModel, items: Sequence[Example], features: Features | None
) -> list[torch.Tensor | None]:
    paths = [e.sample.image for e in items if e.sample.image is not None]
    if features is None or not paths:
        return [None] * len(items)
    device = next(model.projector.parameters()).device
    return list(model.projector(features(paths).to(device)))
