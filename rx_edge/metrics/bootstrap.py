"""How sure a figure is: intervals over studies, and whether two systems differ.

Every metric here is a function of sums over studies: `figure(sums (R, k)) -> (R,)`. A resample is
then a row of counts, so that corpus metrics (BLEU, METEOR, F1) are recomputed exactly in each of
thousands of resamples instead of being averaged over studies.

Intervals: percentile bootstrap over studies (Efron 1979), the same resamples for both systems.
p-values: paired approximate randomisation (Noreen 1989): under the null hypothesis it does not
matter which system wrote which of the two drafts of a study.

Does not cover: several radiographs of one patient, which make studies dependent and intervals
too narrow; corrections for many metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rx_edge.config import EvaluateConfig

Table: TypeAlias = NDArray[np.float64]  # (studies, sums) or (resamples, sums)
Figure: TypeAlias = Callable[[Table], Table]  # sums (R, k) -> figures (R,); NaN where undefined

RESAMPLES, SEED = EvaluateConfig().resamples, 0
INTERVAL, ENDS = 0.95, (0.025, 0.975)


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None


def resampled(studies: int, resamples: int = RESAMPLES, seed: int = SEED) -> Table:
    """How often each study occurs in each resample, (resamples, studies); the same every time."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(studies, np.full(studies, 1.0 / studies), size=resamples)
    return drawn.astype(np.float64)


def interval(values: Table) -> tuple[float | None, float | None]:
    """95 % percentile interval; None where no resample has a value."""
    defined = values[np.isfinite(values)]
    if not len(defined):
        return None, None
    low, high = np.quantile(defined, ENDS)
    return float(low), float(high)


@dataclass(frozen=True)
class Sampled:
    """A figure of all studies, and of each resample (R,); NaN where undefined."""

    value: float
    many: Table

    def estimate(self) -> Estimate:
        """With its interval."""
        return Estimate(finite(self.value), *interval(self.many))

    def minus(self, other: Sampled) -> Estimate:
        """The difference, paired: both must come from the same resamples of the same studies."""
        return Estimate(finite(self.value - other.value), *interval(self.many - other.many))


def sampled(figure: Figure, table: Table, counts: Table) -> Sampled:
    """The figure of `table` (studies, k) over the resamples `counts` (R, studies)."""
    return Sampled(whole(figure, table), figure(counts @ table))


def swaps(studies: int, rounds: int = RESAMPLES, seed: int = SEED) -> Table:
    """Which studies change hands in each round: 0 or 1, (rounds, studies); always the same."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2, (rounds, studies)).astype(np.float64)


def p_value(figure: Figure, one: Table, other: Table, swapped: Table) -> float | None:
    """Two-sided p of the difference; None where it is undefined.

    Args:
        one, other: (studies, k), the same studies in the same order.
        swapped: from `swaps`.
    """
    observed = abs(whole(figure, other) - whole(figure, one))
    if not np.isfinite(observed):
        return None
    first = one.sum(0) + swapped @ (other - one)
    second = other.sum(0) - swapped @ (other - one)
    shuffled = np.abs(figure(second) - figure(first))
    shuffled = shuffled[np.isfinite(shuffled)]
    # rounding must not make an equal difference smaller; the observed order is one of the orders
    extreme = int((shuffled >= observed - 1e-12).sum())
    return (extreme + 1) / (len(shuffled) + 1)


def whole(figure: Figure, table: Table) -> float:
    """The figure of all studies; NaN where it is undefined."""
    return float(figure(table.sum(0, keepdims=True))[0])


def finite(value: float) -> float | None:
    """None for what JSON cannot hold."""
    return float(value) if np.isfinite(value) else None


def ratio(sums: Table) -> Table:
    """First column over the second: a mean, where the second counts studies."""
    with np.errstate(divide="ignore", invalid="ignore"):
        out: Table = sums[:, 0] / sums[:, 1]
    return out
