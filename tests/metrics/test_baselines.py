"""The constant report and the nearest training image."""

from __future__ import annotations

import numpy as np

from rx_edge.metrics import baselines
from rx_edge.metrics.baselines import constant, nearest
from tests.metrics.reports import words


def test_the_constant_report_is_the_most_typical_one() -> None:
    reports = words(
        "a nodule in the left lobe",
        "the heart is normal",
        "the heart is normal and the lungs are clear",
        "the heart is normal and lungs are clear",
        "the lungs are clear",
    )
    assert constant(list("abcde"), reports) in (2, 3)


def test_the_constant_report_does_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    ids = [f"study-{n}" for n in range(300)]  # more than are compared
    reports = [[str(w) for w in rng.integers(0, 9, 12)] for _ in ids]
    first = ids[constant(ids, reports)]
    for _ in range(6):
        order = rng.permutation(len(ids))
        again = constant([ids[i] for i in order], [reports[i] for i in order])
        assert ids[order[again]] == first
    assert len(ids) > baselines.CANDIDATES


def test_the_nearest_is_by_direction_not_by_length() -> None:
    train = np.asarray([[1, 0], [0, 1], [5, 5], [0, 0]], np.float32)
    images = np.asarray([[9, 0.1], [0.001, 0.02], [1, 1]], np.float32)
    assert nearest(train, images) == [0, 1, 2]
