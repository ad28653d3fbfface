"""Samples to embedding batches, padded or packed, with loss on the report's tokens only.

The order is a pure function of (seed, stage, epoch), so a resumed run sees the same batches. It is
a plain shuffle: batches of similar lengths would pad less, but packed ones pad nothing, and a step
on short reports only pulls another way than one on long ones.

Does not cover: attention within a packed row (`packing.py`), how a step is split (`engine.py`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rx_edge.errors import InputError
from rx_edge.model.report_model import IGNORE, ReportModel
from rx_edge.prompting import encode, fitted_indication, takes_indication
from rx_edge.train.data import Sample
from rx_edge.train.data.sentences import split_sentences
from rx_edge.train.features import Features


@dataclass(frozen=True)
class Example:
    """A sample as the model is given it.

    Attributes:
        ids: (T,) of the target, which carry loss, the end included if known.
        indication: fitted to the prompt; "" where there is none or the prompt has no slot for it.
    """

    sample: Sample
    ids: tuple[int, ...]
    indication: str = ""


@dataclass(frozen=True)
class Batch:
    """Sequences right-padded in rows of their own, or one after the other in a single row.

    Attributes:
        embeds: (B, T, D) inputs.
        mask: (B, T) 1 where real.
        targets: (B, T) the id that position t must predict, or IGNORE.
        lengths: tokens of each sample of a packed row, whose B is 1; None where padded.
        shared: tokens at the start of a packed row, before the first sample, with which each of
            them begins.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...] | None = None
    shared: int = 0

    @property
    def positions(self) -> torch.Tensor | None:
        """(1, T) positions: every sample goes on after the shared start; None where padded."""
        if self.lengths is None:
            return None
        device, start = self.embeds.device, self.shared
        rest = [torch.arange(start, start + n, device=device) for n in self.lengths]
        return torch.cat([torch.arange(start, device=device), *rest])[None]


def examples(model: ReportModel, samples: Sequence[Sample], max_tokens: int) -> list[Example]:
    """Tokenise targets; those longer than `max_tokens` are cut at a sentence end.

    Raises:
        InputError: an indication spells out a special token; the message names the study.
    """
    tokenizer, end = model.tokenizer, model.prompt.end
    told = takes_indication(model.recipe.prompt)
    return [
        Example(
            sample,
            target_ids(tokenizer, end, sample, max_tokens),
            _indication(tokenizer, sample) if told else "",
        )
        for sample in samples
    ]


def _indication(tokenizer: Any, sample: Sample) -> str:
    try:
        return fitted_indication(tokenizer, sample.indication)[0]
    except InputError as error:
        raise InputError(f"study {sample.id!r}: {error}") from error


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
    """Batches of one epoch: the items shuffled, the last batch short where they do not divide."""
    rng = random.Random(f"{seed}/{stage}/{epoch}")
    order = list(items)
    rng.shuffle(order)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def sequence_length(model: ReportModel, example: Example) -> int:
    """Tokens that a sample takes in a batch: the last id is only predicted, never fed."""
    prompt = model.prompt_for(example.indication)
    soft = model.projector.tokens * len(example.sample.images)
    return len(prompt.before) + soft + len(prompt.after) + len(example.ids) - 1


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
        softs: soft prompts (V N, D) to use instead of those of the items' own images.
        packed: all items in one row, without padding; the constant start of the prompt once.
    """
    if softs is None:
        softs = soft_prompts(model, items, features)
    start = model.embed(model.prompt.before)
    rows, targets = [], []
    for example, soft in zip(items, softs, strict=True):
        prompt = model.prompt_embeddings(soft, example.indication)
        row = torch.cat([prompt, model.embed(example.ids[:-1])])
        target = torch.full((len(row),), IGNORE)
        target[len(prompt) - 1 :] = torch.tensor(example.ids)
        cut = len(start) if packed else 0
        rows.append(row[cut:])
        targets.append(target[cut:])
    lengths = tuple(len(row) for row in rows)
    if packed:
        rows = [torch.cat([start, *rows])]
        targets = [torch.cat([torch.full((len(start),), IGNORE), *targets])]
    device = rows[0].device
    mask = [torch.ones(len(r), dtype=torch.long) for r in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(
        embeds=pad(rows, batch_first=True),
        mask=pad(mask, batch_first=True).to(device),
        targets=pad(targets, batch_first=True, padding_value=IGNORE).to(device),
        lengths=lengths if packed else None,
        shared=len(start) if packed else 0,
    )


def soft_prompts(
    model: ReportModel, items: Sequence[Example], features: Features | None
) -> list[torch.Tensor | None]:
    """One of each item: those of its V images (N, D) one after the other, (V N, D)."""
    paths = [path for example in items for path in example.sample.images]
    if features is None or not paths:
        return [None] * len(items)
    device = next(model.projector.parameters()).device
    of_images = model.projector(features(paths).to(device))  # (images, N, D)
    views = [len(example.sample.images) for example in items]
    return [of_study.flatten(0, 1) for of_study in of_images.split(views)]
