"""Samples to padded embedding batches, with loss on the report's tokens only.

The order is a pure function of (seed, stage, epoch), so a resumed run sees the same batches.
Batches hold samples of similar length, to waste little on padding. Sequence packing comes later.
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
from rx_edge.train.features import FeatureCache


@dataclass(frozen=True)
class Example:
    """A sample whose target is tokenised: ids (T,) that carry loss, the end included if known."""

    sample: Sample
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences.

    Attributes:
        embeds: (B, T, D) inputs.
        mask: (B, T) 1 where real.
        targets: (B, T) the id that position t must predict, or IGNORE.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor


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


def collate(
    model: ReportModel,
    items: Sequence[Example],
    features: FeatureCache | None,
    softs: Sequence[torch.Tensor | None] | None = None,
) -> Batch:
    """Build the batch; gradients flow into the projector through the soft prompts.

    Args:
        features: of the items' images; None for text only.
        softs: soft prompts (N, D) to use instead of those of the items' own images.
    """
    if softs is None:
        softs = _soft_prompts(model, items, features)
    rows, targets = [], []
    for example, soft in zip(items, softs, strict=True):
        prompt = model.prompt_embeddings(soft)
        # the last id is only predicted, never fed
        rows.append(torch.cat([prompt, model.embed(example.ids[:-1])]))
        target = torch.full((len(rows[-1]),), IGNORE)
        target[len(prompt) - 1 :] = torch.tensor(example.ids)
        targets.append(target)
    return Batch(
        embeds=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        mask=torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(r), dtype=torch.long) for r in rows], batch_first=True
        ),
        targets=torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORE),
    )


def _soft_prompts(
    model: ReportModel, items: Sequence[Example], features: FeatureCache | None
) -> list[torch.Tensor | None]:
    paths = [e.sample.image for e in items]
    if features is None or paths[0] is None:
        return [None] * len(items)
    stacked = torch.stack([features[p] for p in paths if p is not None])
    return list(model.projector(stacked))
