"""Every metric of an evaluation, as a function of sums over studies, and one system's sums.

An empty draft is a failure: it matches nothing, so it scores 0 in every text metric and misses
every finding of its reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rx_edge.metrics import label_scores, nlg
from rx_edge.metrics.bootstrap import Figure, Table, ratio
from rx_edge.metrics.label_scores import FIVE, Policy
from rx_edge.metrics.meteor import Meteor
from rx_edge.metrics.nlg import Tokens


@dataclass(frozen=True)
class Metric:
    """One figure; higher is better for all of them.

    Attributes:
        sums: which columns of `columns` it is a function of.
        figure: sums (R, k) -> (R,); on one study's row it is that study's own value.
    """

    name: str
    sums: str
    figure: Figure


@dataclass(frozen=True)
class Texts:
    """The same studies' texts twice: as written, for labels, and as the protocol's tokens."""

    raw: Sequence[str]
    tokens: Sequence[Tokens]


def metrics(meteor: Meteor | None) -> tuple[Metric, ...]:
    """All metrics, in the order in which they are shown."""
    return (
        *(Metric(f"bleu_{n}", "bleu", nlg.bleu(n)) for n in range(1, nlg.MAX_N + 1)),
        Metric("bleu_2_mean", "bleu_2_mean", ratio),
        Metric("rouge_l", "rouge_l", ratio),
        *([Metric("meteor", "meteor", meteor.figure)] if meteor else []),
        Metric("cider", "cider", ratio),
        Metric("label_f1_micro_14", "labels", label_scores.micro()),
        Metric("label_f1_macro_14", "labels", label_scores.macro()),
        Metric("label_f1_micro_5", "labels", label_scores.micro(FIVE)),
        Metric("label_f1_macro_5", "labels", label_scores.macro(FIVE)),
    )


def columns(
    references: Texts, drafts: Texts, policy: Policy, meteor: Meteor | None
) -> dict[str, Table]:
    """What the metrics sum over studies: name -> (studies, k)."""
    pairs = list(zip(references.tokens, drafts.tokens, strict=True))
    bleu = np.asarray([nlg.bleu_sums(r, d) for r, d in pairs], np.float64)
    found = {
        "bleu": bleu,
        "bleu_2_mean": _mean(nlg.bleu(2)(bleu)),
        "rouge_l": _mean([nlg.rouge_l(r, d) for r, d in pairs]),
        "cider": _mean(nlg.cider(references.tokens, drafts.tokens)),
        "labels": np.asarray(
            [
                label_scores.label_sums(r, d, policy)
                for r, d in zip(references.raw, drafts.raw, strict=True)
            ],
            np.float64,
        ),
    }
    if meteor:
        found["meteor"] = meteor.sums(references.tokens, drafts.tokens)
    return found


def _mean(values: Sequence[float] | Table) -> Table:
    """Columns (studies, 2) whose ratio of sums is the mean."""
    out: Table = np.stack([np.asarray(values, np.float64), np.ones(len(values))], axis=1)
    return out
