"""The rule of the latency gate against published values and seeded simulations; no clock."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rx_edge.errors import UsageError
from rx_edge_bench import statistics
from rx_edge_bench.comparison import Comparison, time_verdict, undecided
from rx_edge_bench.statistics import (
    MIN_BLOCKS,
    P_LIMIT,
    Judgement,
    decide,
    judge,
    mann_whitney,
    quantiles_allowed,
    ratio_interval,
)


def verdicts(effect: float, noise: float, blocks: int, seed: int, runs: int = 200) -> list[str]:
    """Verdicts over simulated runs: log-normal block noise, and a drift that a pair shares."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(runs):
        drift = rng.normal(0.0, 0.02, blocks).cumsum()
        a = np.exp(drift + rng.normal(0.0, noise, blocks))
        b = effect * np.exp(drift + rng.normal(0.0, noise, blocks))
        found.append(judge(a.tolist(), b.tolist()).verdict)
    return found


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)  # hundreds of simulated runs


@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize(("noise", "blocks"), [(0.03, MIN_BLOCKS), (0.05, 10), (0.10, 10)])
def test_equal_sides_raise_no_false_alarm(noise: float, blocks: int) -> None:
    found = verdicts(1.0, noise, blocks, seed=1)
    assert found.count("regression") / len(found) <= 0.05


@pytest.mark.usefixtures("fewer_resamples")
def test_a_wild_block_raises_no_false_alarm() -> None:
    rng, found = np.random.default_rng(2), []
    for _ in range(200):
        a, b = np.exp(rng.normal(0.0, 0.03, (2, 10)))
        b[rng.integers(10)] *= 5.0  # a neighbour woke up during one block
        found.append(judge(a.tolist(), b.tolist()).verdict)
    assert found.count("regression") / len(found) <= 0.05


@pytest.mark.usefixtures("fewer_resamples")
def test_fifteen_percent_is_caught() -> None:
    rng = np.random.default_rng(3)
    found = []
    for _ in range(200):
        a, b = np.exp(rng.normal(0.0, 0.03, (2, MIN_BLOCKS)))
        found.append(judge(a.tolist(), (1.15 * b).tolist()).verdict)
    assert found.count("regression") / len(found) >= 0.95


@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize(
    ("effect", "verdict", "least"), [(1.15, "regression", 0.99), (1.0, "none", 0.98)]
)
def test_more_looks_see_past_neighbours(effect: float, verdict: str, least: float) -> None:
    """One block in eight beside a neighbour, as measured on a shared machine: 10 pairs, 20, 30."""
    rng, found = np.random.default_rng(6), []
    for _ in range(200):
        busy = rng.uniform(0.11, 0.23, (2, 30)) * (rng.random((2, 30)) < 1 / 8)
        a, b = np.exp(rng.normal(0.0, 0.02, (2, 30)) + busy)
        for pairs in (10, 20, 30):
            times = {"total": judge(a[:pairs].tolist(), (effect * b[:pairs]).tolist())}
            look = Comparison(time_verdict((), times), stages=times)
            if not undecided(look):
                break
        found.append(look.verdict)
    assert found.count(verdict) / len(found) >= least


@pytest.mark.parametrize(
    ("stage", "ratio", "again"),
    [("total", 1.08, True), ("total", 1.04, False), ("vision", 1.08, False)],
)
def test_a_pass_above_the_tolerance_is_looked_at_again(
    stage: str, ratio: float, again: bool
) -> None:
    """The miss of a study: best estimate 1.08, interval up to 1.146, and no witness against it."""
    times = {stage: Judgement("none", ratio, 0.99, 1.146, 0.06, 10)}
    assert undecided(Comparison("none", stages=times)) is again


def test_pairs_cancel_a_drift_that_would_hide_the_effect() -> None:
    drift = np.linspace(0.0, 0.1, 10)
    a, b = np.exp(drift), 1.2 * np.exp(drift)
    apart = judge(a.tolist(), b.tolist(), paired=False)
    together = judge(a.tolist(), b.tolist(), paired=True)
    assert together.low == pytest.approx(1.2)
    assert apart.low < together.low
    assert together.verdict == "regression"


def brute_force(m: int, n: int, u: int) -> float:
    """P(min(U, mn - U) <= u) over all orders of m + n distinct values."""
    hits = total = 0
    for ranks in itertools.combinations(range(m + n), m):
        found = sum(ranks) - m * (m - 1) // 2
        hits += min(found, m * n - found) <= u
        total += 1
    return hits / total


def test_mann_whitney_exactly() -> None:
    a, b = np.arange(7.0), np.arange(7.0) + 100
    assert mann_whitney(a, b) == pytest.approx(2 / 3432)
    rng = np.random.default_rng(0)
    for m, n in ((4, 5), (6, 6), (3, 8)):
        one, two = rng.normal(size=m), rng.normal(0.7, 1.0, n)
        u = int(sum(x > y for x in one for y in two))
        expected = brute_force(m, n, min(u, m * n - u))
        assert mann_whitney(one, two) == pytest.approx(min(1.0, expected)), (m, n)


def test_mann_whitney_of_a_textbook() -> None:
    """Conover 1999, as in scipy's documentation of `mannwhitneyu`: U = 17, p = 0.1111."""
    males, females = np.array([19.0, 22, 16, 29, 24]), np.array([20.0, 11, 17, 12])
    assert mann_whitney(males, females) == pytest.approx(1 / 9, abs=1e-4)
    # scipy 1.17.1: mannwhitneyu(one, two, method="exact"), and one with ties, "asymptotic"
    one = np.array([-0.802, -1.324, -0.248, 0.42, 1.136, 0.11, -0.553, -0.785, 0.749, 1.635])
    two = np.array([1.073, -0.433, -0.158, 2.4, 1.003, -0.932, 0.716, -0.363, 0.171, 0.312])
    assert mann_whitney(one, two) == pytest.approx(0.5288488601, abs=1e-9)
    tied = mann_whitney(np.array([1.0, 2, 2, 4]), np.array([2.0, 3, 5, 6]))
    assert tied == pytest.approx(0.1831502032, abs=1e-9)
    assert mann_whitney(np.ones(9), np.ones(9)) == 1.0


def test_the_least_blocks_follow_from_the_p_value() -> None:
    for blocks, can_decide in ((MIN_BLOCKS - 1, False), (MIN_BLOCKS, True)):
        apart = mann_whitney(np.arange(float(blocks)), np.arange(float(blocks)) + 100)
        assert (apart < P_LIMIT) == can_decide
    few = judge([1.0] * (MIN_BLOCKS - 1), [2.0] * (MIN_BLOCKS - 1))
    assert few.verdict == "insufficient data"
    assert judge([], []).verdict == "insufficient data"


@pytest.mark.parametrize(
    ("ratio", "low", "high", "p", "verdict"),
    [
        (1.20, 1.10, 1.30, 0.0005, "regression"),
        (1.20, 1.10, 1.30, 0.01, "suspicious"),
        (1.03, 1.02, 1.04, 0.0005, "suspicious"),
        (1.02, 0.99, 1.06, 0.2, "none"),
        (1.10, 0.90, 1.30, 0.2, "insufficient data"),  # too noisy to exclude what matters
        (0.80, 0.75, 0.85, 0.0005, "none"),  # clearly faster: the p-value has no direction
    ],
)
def test_both_witnesses_must_agree(
    ratio: float, low: float, high: float, p: float, verdict: str
) -> None:
    assert decide(ratio, low, high, p, tolerance=1.05) == verdict


@pytest.mark.usefixtures("fewer_resamples")
def test_a_noisy_machine_is_told_and_not_passed() -> None:
    """At 20 % noise between blocks +15 % cannot be seen: "none" would be a guess."""
    found = verdicts(1.15, 0.2, 10, seed=5)
    assert found.count("none") / len(found) <= 0.05


@pytest.mark.usefixtures("fewer_resamples")
def test_a_quiet_machine_gets_a_verdict() -> None:
    found = verdicts(1.0, 0.03, 10, seed=6)
    assert found.count("none") / len(found) >= 0.95


def test_the_interval_is_the_same_every_time_and_covers() -> None:
    rng = np.random.default_rng(4)
    a, b = np.exp(rng.normal(0.0, 0.03, (2, 12)))
    for paired in (True, False):
        first = ratio_interval(a, 1.1 * b, paired=paired)
        assert first == ratio_interval(a, 1.1 * b, paired=paired)
        assert first[1] <= first[0] <= first[2]
        assert first[1] < 1.1 < first[2]


@pytest.mark.parametrize(
    "arguments", [([1.0, 0.0], [1.0, 1.0]), ([1.0], [1.0, 1.0]), ([np.nan], [1.0])]
)
def test_nonsense_is_refused(arguments: tuple[list[float], list[float]]) -> None:
    with pytest.raises(UsageError):
        judge(*arguments)
    with pytest.raises(UsageError, match="tolerance"):
        judge([1.0], [1.0], tolerance=0.5)


def test_no_percentile_without_the_samples_for_it() -> None:
    assert max(quantiles_allowed(63)) == 0.75
    assert max(quantiles_allowed(64)) == 0.9
    assert max(quantiles_allowed(661)) == 0.9
    assert max(quantiles_allowed(662)) == 0.99
