"""BLEU-1..4, ROUGE-L and CIDEr as pycocoevalcap computes them, one reference a study.

Written from the formulas, without its package: only sums over studies are needed, and they make
intervals cheap (`bootstrap.py`). The tests hold the values to pycocoevalcap's own. They take
*tokens*: pycocoevalcap's PTB tokeniser needs Java and is replaced by the protocol's
(`protocols.py`), which every published figure must name.

BLEU: Papineni et al. 2002, no smoothing but pycocoevalcap's 1e-15 / 1e-9. ROUGE-L: Lin 2004,
beta 1.2. CIDEr: Vedantam et al. 2015 with clipping and length penalty (CIDEr-D), document
frequencies from the references at hand: it cannot be compared between test sets.

Does not cover: METEOR (`meteor.py`), several references.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from rx_edge.metrics.bootstrap import Figure, Table

Tokens: TypeAlias = Sequence[str]
Grams: TypeAlias = Counter[tuple[str, ...]]

MAX_N = 4
_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's guards against 0 / 0
_BETA_SQUARED = 1.2**2
_SIGMA_SQUARED = 6.0**2


def bleu_sums(reference: Tokens, draft: Tokens) -> list[float]:
    """Matched n-grams, the draft's n-grams (n = 1..4 each), the draft's length, the reference's."""
    wanted, found = grams(reference), grams(draft)
    matched = [
        float(sum(min(c, wanted[n].get(g, 0)) for g, c in found[n].items())) for n in range(MAX_N)
    ]
    total = [float(max(0, len(draft) - n)) for n in range(MAX_N)]
    return [*matched, *total, float(len(draft)), float(len(reference))]


def bleu(n: int) -> Figure:
    """BLEU-n in [0, 1] from the sums of `bleu_sums` (R, 10)."""

    def figure(sums: Table) -> Table:
        precision = (sums[:, :n] + _TINY) / (sums[:, MAX_N : MAX_N + n] + _SMALL)
        length = (sums[:, 8] + _TINY) / (sums[:, 9] + _SMALL)
        with np.errstate(under="ignore"):
            brevity = np.exp(np.minimum(0.0, 1.0 - 1.0 / length))
            out: Table = precision.prod(1) ** (1.0 / n) * brevity
        return out

    return figure


def rouge_l(reference: Tokens, draft: Tokens) -> float:
    """ROUGE-L F with beta 1.2, in [0, 1]; 0 for an empty draft."""
    common = longest_common(reference, draft)
    if not common:
        return 0.0
    precision, recall = common / len(draft), common / len(reference)
    return (1 + _BETA_SQUARED) * precision * recall / (recall + _BETA_SQUARED * precision)


def longest_common(one: Tokens, other: Tokens) -> int:
    """Length of the longest common subsequence.

    Bit-parallel (Hyyrö 2004): a zero bit of `state` marks where the length of the best match
    with a prefix of `one` grows.
    """
    places: dict[str, int] = {}
    for at, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << at
    full = (1 << len(one)) - 1
    state = full
    for token in other:
        hits = state & places.get(token, 0)
        state = ((state + hits) | (state - hits)) & full
    return len(one) - state.bit_count()


def cider(references: Sequence[Tokens], drafts: Sequence[Tokens]) -> list[float]:
    """CIDEr of every study, in [0, 10]; their mean is the corpus figure.

    A single study has no document frequencies: its score is 0.
    """
    wanted = [grams(r) for r in references]
    frequency = Counter(gram for study in wanted for counts in study for gram in counts)
    log_studies = math.log(len(references)) if references else 0.0

    def weights(counts: Grams) -> dict[tuple[str, ...], float]:
        return {g: c * (log_studies - math.log(max(1, frequency[g]))) for g, c in counts.items()}

    return [
        _cider_one([weights(c) for c in a], [weights(c) for c in grams(d)], _bigrams(r, d))
        for a, r, d in zip(wanted, references, drafts, strict=True)
    ]


def _cider_one(
    wanted: list[dict[tuple[str, ...], float]],
    found: list[dict[tuple[str, ...], float]],
    longer: int,
) -> float:
    total = 0.0
    for one, other in zip(wanted, found, strict=True):
        norms = _norm(one.values()) * _norm(other.values())
        if norms:
            shared = sum(min(w, one[g]) * one[g] for g, w in other.items() if g in one)
            total += shared / norms
    return 10.0 * total / MAX_N * math.exp(-(longer**2) / (2.0 * _SIGMA_SQUARED))


def _bigrams(reference: Tokens, draft: Tokens) -> int:
    """How many more bigrams the draft has: what pycocoevalcap takes for a length."""
    return max(0, len(draft) - 1) - max(0, len(reference) - 1)


def _norm(values: Iterable[float]) -> float:
    return math.sqrt(sum(v * v for v in values))


def grams(tokens: Tokens) -> list[Grams]:
    """Counts of the n-grams for n = 1..4."""
    return [
        Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        for n in range(1, MAX_N + 1)
    ]
