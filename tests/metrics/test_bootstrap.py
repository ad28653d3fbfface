"""Intervals cover what they should; p is uniform without a difference and small with one."""

from __future__ import annotations

import numpy as np
import pytest

from rx_edge.metrics import bootstrap
from rx_edge.metrics.bootstrap import (
    Sampled,
    Table,
    p_value,
    ratio,
    resampled,
    sampled,
    swaps,
    whole,
)


def means(values: Table) -> Table:
    return np.stack([values, np.ones(len(values))], axis=1)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """400 simulated corpora of 60 skewed scores: 95 % nominal, a little less for so few."""
    rng, counts, hits = np.random.default_rng(1), resampled(60, 600), 0
    for _ in range(400):
        found = sampled(ratio, means(rng.beta(2, 5, 60)), counts).estimate()
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 2 / 7 <= found.high
    assert 0.91 <= hits / 400 <= 0.98


def test_the_interval_of_a_corpus_metric_covers_too() -> None:
    """A ratio of sums, such as BLEU's precisions or F1: study sizes differ."""
    rng, counts, hits = np.random.default_rng(2), resampled(80, 600), 0
    for _ in range(400):
        sizes = rng.integers(5, 60, 80)
        table = np.stack([rng.binomial(sizes, 0.3), sizes], axis=1).astype(np.float64)
        found = sampled(ratio, table, counts).estimate()
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.3 <= found.high
    assert 0.91 <= hits / 400 <= 0.98


def test_the_difference_is_paired() -> None:
    """Studies differ a lot, systems by exactly 0.1: an unpaired interval would be wide."""
    hard = np.random.default_rng(0).uniform(0, 1, 40)
    counts = resampled(40)
    one, other = (sampled(ratio, means(hard + by), counts) for by in (0.0, 0.1))
    found = other.minus(one)
    assert [found.value, found.low, found.high] == pytest.approx([0.1, 0.1, 0.1])


def test_resamples_are_of_studies_and_always_the_same() -> None:
    counts = resampled(17, 50)
    assert counts.shape == (50, 17)
    assert (counts.sum(1) == 17).all()
    assert (counts == resampled(17, 50)).all()
    assert not (counts == resampled(17, 50, seed=1)).all()


def test_p_is_uniform_without_a_difference() -> None:
    rng, swapped, found = np.random.default_rng(3), swaps(40, 400), []
    for _ in range(400):
        shared = rng.normal(0, 3, 40)
        one, other = (means(shared + rng.normal(0, 1, 40)) for _ in range(2))
        p = p_value(ratio, one, other, swapped)
        assert p is not None
        found.append(p)
    for limit in (0.05, 0.25, 0.5, 0.75):
        # three standard errors of a share of 400
        assert (
            abs(np.mean(np.asarray(found) <= limit) - limit)
            < 3 * (limit * (1 - limit) / 400) ** 0.5
        )


def test_p_is_small_with_a_difference_and_one_without() -> None:
    rng = np.random.default_rng(4)
    hard = rng.uniform(0, 1, 60)
    one, other = means(hard), means(hard + 0.05 + rng.normal(0, 0.05, 60))
    swapped = swaps(60, 2000)
    assert p_value(ratio, one, other, swapped) == pytest.approx(1 / 2001)
    assert p_value(ratio, other, one, swapped) == pytest.approx(1 / 2001)
    assert p_value(ratio, one, one, swapped) == 1.0


def test_an_undefined_figure_is_none() -> None:
    nothing = np.zeros((5, 2))
    found = sampled(ratio, nothing, resampled(5, 10)).estimate()
    assert (found.value, found.low, found.high) == (None, None, None)
    assert p_value(ratio, nothing, means(np.ones(5)), swaps(5, 10)) is None
    assert np.isnan(whole(ratio, nothing))


def test_resamples_without_a_value_are_left_out() -> None:
    found = Sampled(0.5, np.asarray([0.4, np.nan, 0.6])).estimate()
    assert found.low == pytest.approx(0.405)
    assert bootstrap.interval(np.asarray([np.nan])) == (None, None)
