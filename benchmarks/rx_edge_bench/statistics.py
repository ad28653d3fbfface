"""Is B slower than A? Two witnesses must agree before anybody is woken.

The data are block medians: one process = one block = one number a stage, because what varies on a
real machine (memory layout, clock, neighbours) varies between processes more than between repeats.
Witness one is the size of the effect: the 95 % interval of the ratio B / A, by a bootstrap over
pairs of blocks. Witness two is the order: the Mann-Whitney U test, which a single wild block cannot
move. Only both together are a regression; one alone is suspicious.

Does not cover: where the blocks come from (`interleaved.py`), and means of non-blocked repeats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rx_edge.errors import UsageError

Verdict: TypeAlias = Literal["regression", "suspicious", "none", "insufficient data"]
Numbers: TypeAlias = NDArray[np.float64]

# Two equal versions of the demo model on a shared two-core machine differ by up to 3 % a run; a
# radiologist does not notice 5 % of a two-second draft. Smaller losses are for Tier 0, which is
# exact.
TOLERANCE = 1.05
P_LIMIT = 0.002  # asv's
BLIND = 1.1  # of the tolerance: where the interval reaches further, "none" would be a guess
# With 6 blocks a side even complete separation has p = 2 / C(12, 6) = 0.0022: never below the limit
MIN_BLOCKS = 7
RESAMPLES, SEED, INTERVAL = 10_000, 0, 0.95
EXACT_UP_TO = 50  # blocks a side; above, or with ties, the normal approximation


@dataclass(frozen=True)
class Judgement:
    """The comparison of one stage.

    Attributes:
        ratio: B / A, the exponential of the median log-ratio; above 1 = B is slower. NaN when
            there is nothing to compare, as are `low` and `high`, the ends of its 95 % interval.
        p: two-sided Mann-Whitney p-value.
    """

    verdict: Verdict
    ratio: float
    low: float
    high: float
    p: float
    blocks: int  # of the smaller side


def judge(
    a: Sequence[float], b: Sequence[float], *, tolerance: float = TOLERANCE, paired: bool = True
) -> Judgement:
    """Compare block medians in seconds; A is the reference.

    Args:
        paired: a[i] and b[i] were measured side by side; otherwise the sides are independent.

    Raises:
        UsageError: a time that is not a positive number, a tolerance below 1, or pairs that do
            not match.
    """
    one, two = _checked(a), _checked(b)
    if not tolerance >= 1.0:
        raise UsageError(f"tolerance is {tolerance}; 1.05 allows 5 % more time, and 1 is the least")
    if paired and len(one) != len(two):
        raise UsageError(f"{len(one)} blocks of A and {len(two)} of B are no pairs")
    blocks = min(len(one), len(two))
    if not blocks:
        return Judgement("insufficient data", math.nan, math.nan, math.nan, math.nan, 0)
    ratio, low, high = ratio_interval(one, two, paired=paired)
    p = mann_whitney(one, two)
    verdict: Verdict = "insufficient data"
    if blocks >= MIN_BLOCKS:
        verdict = decide(ratio, low, high, p, tolerance)
    return Judgement(verdict, ratio, low, high, p, blocks)


def decide(ratio: float, low: float, high: float, p: float, tolerance: float) -> Verdict:
    """The rule. Only a slower B is of interest, whatever the p-value.

    No witness and an interval that reaches far beyond the tolerance is no pass: the machine was
    too noisy, or the blocks too few, to see a slowdown that matters.
    """
    witnesses = (low > tolerance) + (p < P_LIMIT and ratio > 1.0)
    if not witnesses and high > BLIND * tolerance:
        return "insufficient data"
    verdicts: tuple[Verdict, ...] = ("none", "suspicious", "regression")
    return verdicts[witnesses]


def ratio_interval(a: Numbers, b: Numbers, *, paired: bool = True) -> tuple[float, float, float]:
    """B / A with the ends of its 95 % interval, by 10,000 seeded resamples of blocks.

    Paired: the median of log(b[i] / a[i]) over resampled pairs, so that a drift which both halves
    of a pair share cancels. Unpaired: the difference of the medians of the logs.
    """
    rng = np.random.default_rng(SEED)
    log_a, log_b = np.log(a), np.log(b)
    if paired:
        differences = log_b - log_a
        drawn = rng.integers(0, len(differences), (RESAMPLES, len(differences)))
        centre, many = np.median(differences), np.median(differences[drawn], axis=1)
    else:
        rows_a = rng.integers(0, len(a), (RESAMPLES, len(a)))
        rows_b = rng.integers(0, len(b), (RESAMPLES, len(b)))
        centre = np.median(log_b) - np.median(log_a)
        many = np.median(log_b[rows_b], axis=1) - np.median(log_a[rows_a], axis=1)
    outside = (1.0 - INTERVAL) / 2.0
    low, high = np.quantile(many, [outside, 1.0 - outside])
    return float(np.exp(centre)), float(np.exp(low)), float(np.exp(high))


def mann_whitney(a: Numbers, b: Numbers) -> float:
    """Two-sided p-value of the Mann-Whitney U test.

    Exact without ties and up to 50 values a side; otherwise the normal approximation with
    corrections for ties and continuity.
    """
    values = np.concatenate([a, b])
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2.0)[group]
    m, n = len(a), len(b)
    u = float(ranks[:m].sum()) - m * (m + 1) / 2.0
    smaller = min(u, m * n - u)
    if len(counts) == m + n and max(m, n) <= EXACT_UP_TO:
        ways = _u_counts(m, n)
        return min(1.0, 2.0 * sum(ways[: int(smaller) + 1]) / math.comb(m + n, m))
    total = m + n
    ties = float((counts**3 - counts).sum()) / (total * (total - 1)) if total > 1 else 0.0
    deviation = math.sqrt(m * n / 12.0 * (total + 1 - ties))
    if deviation == 0.0:
        return 1.0
    return min(1.0, math.erfc((m * n / 2.0 - smaller - 0.5) / deviation / math.sqrt(2.0)))


def quantiles_allowed(n: int) -> tuple[float, ...]:
    """Quantiles that `n` samples can carry: p90 from 64 on, p99 from 662 on.

    The numbers are MLPerf's early-stopping minima for a 99 % confidence in the quantile.
    """
    return (0.25, 0.5, 0.75, *((0.9,) if n >= 64 else ()), *((0.99,) if n >= 662 else ()))


def _u_counts(m: int, n: int) -> list[int]:
    """In how many of the C(m + n, m) orders U is 0, 1, ... m * n.

    They are the coefficients of the Gaussian binomial: the product of (1 - q^(n + i)) / (1 - q^i).
    """
    ways = [1] + [0] * (m * n)
    for i in range(1, m + 1):
        for u in range(m * n, n + i - 1, -1):
            ways[u] -= ways[u - n - i]
        for u in range(i, m * n + 1):
            ways[u] += ways[u - i]
    return ways


def _checked(seconds: Sequence[float]) -> Numbers:
    values = np.asarray(seconds, np.float64)
    if not (np.isfinite(values) & (values > 0)).all():
        raise UsageError(f"block medians are {list(seconds)}; each must be a positive time")
    return values
