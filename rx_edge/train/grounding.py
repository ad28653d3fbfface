"""Does the image matter? The proof that soft prompts carry information about *this* image.

Three questions on held-out studies: is the view that the first sentence names right, and does
that stop when every image is replaced by the training mean of the soft prompts? Is the reference
report more likely (nats per token) with its own image than with another patient's? If not, the
alignment is broken, however fluent the text.

Of a study with two views both are swapped or replaced at once. The mean soft prompt of a study is
that over the training studies with as many views, or, where there are none, with the usual number.
The indication stays the study's own: the question is what the image adds to it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rx_edge.model.language import hidden_states
from rx_edge.model.report_model import IGNORE, ReportModel
from rx_edge.prompting import encode
from rx_edge.train.batching import Example, collate, soft_prompts
from rx_edge.train.data.pairs_jsonl import VIEW_SENTENCE
from rx_edge.train.features import FeatureCache
from rx_edge.types import FloatArray

FIRST_SENTENCE_TOKENS = 8  # "Frontal chest radiograph." and a little more


def prove(
    model: ReportModel,
    train: Sequence[Example],
    held_out: Sequence[Example],
    features: FeatureCache,
    seed: int,
) -> dict[str, Any]:
    """Measure on `held_out`; `train` gives the mean soft prompt and nothing else.

    Returns:
        JSON-ready figures: view accuracy with the image, with the mean prompt, the majority
        rate, and report NLL with the right, a swapped and the mean image with 95 % intervals of
        the paired differences (bootstrap over studies, 2,000 resamples).
    """
    soft = _soft(model, features, held_out)
    mean = _means(_soft(model, features, train), soft)
    viewed = [i for i, e in enumerate(held_out) if e.sample.view]
    truth = [held_out[i].sample.view for i in viewed]
    named, blind = (
        [named_view(text) for text in _openings(model, held_out, prompts, viewed)]
        for prompts in (soft, mean)
    )
    swapped = [soft[i] for i in _swapped(held_out, seed)]
    right = _nll(model, held_out, soft)
    wrong = _nll(model, held_out, swapped)
    blank = _nll(model, held_out, mean)
    body = {
        name: _nll(model, held_out, prompts, skip_view=True)
        for name, prompts in (("right", soft), ("swapped", swapped))
    }
    majority = max(truth.count(v) for v in set(truth)) / len(truth)
    return {
        "studies": len(held_out),
        "studies_with_view": len(viewed),
        "view_accuracy": _share(named, truth),
        "view_accuracy_mean_prompt": _share(blind, truth),
        "view_majority_rate": majority,
        "lateral_recall": _recall(named, truth, "lateral"),
        "frontal_recall": _recall(named, truth, "frontal"),
        "nll_right": float(np.nanmean(right)),
        "nll_swapped": float(np.nanmean(wrong)),
        "nll_mean_prompt": float(np.nanmean(blank)),
        "nll_swapped_minus_right": _interval(wrong - right, seed),
        "nll_mean_prompt_minus_right": _interval(blank - right, seed),
        "body_nll_swapped_minus_right": _interval(body["swapped"] - body["right"], seed),
        "share_of_studies_better_with_right": float(np.mean(wrong > right)),
    }


def named_view(text: str) -> str | None:
    """The view that the first sentence names: "frontal", "lateral" or None."""
    first = text.partition(".")[0].lower()
    hits = [view for view in VIEW_SENTENCE if view in first]
    return hits[0] if len(hits) == 1 else None


@torch.inference_mode()
def _soft(
    model: ReportModel, features: FeatureCache, items: Sequence[Example]
) -> list[torch.Tensor]:
    """The soft prompt (V N, D) of every item."""
    found = (soft_prompts(model, [item], features)[0] for item in items)
    return [soft for soft in found if soft is not None]


def _means(train: Sequence[torch.Tensor], like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """For each of `like` the mean of the training prompts of its length, or of the usual length."""
    lengths = Counter(len(soft) for soft in train)
    mean = {n: torch.stack([soft for soft in train if len(soft) == n]).mean(0) for n in lengths}
    usual = mean[lengths.most_common(1)[0][0]]
    return [mean.get(len(soft), usual) for soft in like]


def _openings(
    model: ReportModel,
    items: Sequence[Example],
    prompts: Sequence[torch.Tensor],
    chosen: Sequence[int],
) -> list[str]:
    """What is said first about each of `chosen`."""
    said: dict[tuple[int, str], str] = {}  # the same mean prompt stands for many studies
    for i in chosen:
        key = (id(prompts[i]), items[i].indication)
        if key not in said:
            ids = model.greedy(prompts[i], FIRST_SENTENCE_TOKENS, items[i].indication)
            said[key] = model.tokenizer.decode(ids)
    return [said[id(prompts[i]), items[i].indication] for i in chosen]


def _swapped(items: Sequence[Example], seed: int) -> list[int]:
    """For each study the index of another patient's, so that no study keeps its image."""
    rng = random.Random(seed)
    patients = [e.sample.patient for e in items]
    return [rng.choice([j for j, q in enumerate(patients) if q != p]) for p in patients]


@torch.inference_mode()
def _nll(
    model: ReportModel,
    items: Sequence[Example],
    soft: Sequence[torch.Tensor],
    *,
    skip_view: bool = False,
) -> FloatArray:
    """Mean nats per report token of each study, (n,); NaN where nothing is left to score."""
    out = []
    for example, prompt in zip(items, soft, strict=True):
        batch = collate(model, [example], None, softs=[prompt])
        targets = batch.targets.clone()
        if skip_view and example.sample.view:
            opening = len(encode(model.tokenizer, VIEW_SENTENCE[example.sample.view]))
            start = int((targets[0] != IGNORE).nonzero()[0])
            targets[0, start : start + opening] = IGNORE
        wanted = targets != IGNORE
        hidden = hidden_states(model.lm, batch.embeds, batch.mask)
        logits = model.lm.get_output_embeddings()(hidden[wanted])
        losses = torch.nn.functional.cross_entropy(logits, targets[wanted], reduction="none")
        out.append(float(losses.mean()) if losses.numel() else float("nan"))
    return np.asarray(out, np.float32)


def _share(named: Sequence[str | None], truth: Sequence[str | None]) -> float:
    return sum(a == b for a, b in zip(named, truth, strict=True)) / len(truth)


def _recall(named: Sequence[str | None], truth: Sequence[str | None], view: str) -> float | None:
    hits = [a == view for a, b in zip(named, truth, strict=True) if b == view]
    return sum(hits) / len(hits) if hits else None


def _interval(differences: FloatArray, seed: int) -> dict[str, float]:
    """Mean and 95 % percentile-bootstrap interval over studies."""
    kept = differences[np.isfinite(differences)]
    rng = np.random.default_rng(seed)
    means = kept[rng.integers(0, len(kept), (2000, len(kept)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "mean": float(kept.mean()), "low": float(low), "high": float(high), "n": len(kept)
    }  # fmt: skip
