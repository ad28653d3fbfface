"""Engines that take turns in one process, and what one costs beside another.

Does not cover: blocks in fresh processes (`interleaved.py`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias, TypeVar

import numpy as np

from rx_edge_bench.latency import median
from rx_edge_bench.statistics import ratio_interval

REST = 0.25  # seconds before a turn

T = TypeVar("T")
E = TypeVar("E")
Rounds: TypeAlias = list[list[T]]  # [study][repeat]


def take_turns(
    engines: Mapping[str, E],
    turn: Callable[[E, int, int], T],
    studies: int,
    repeats: int,
    tick: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Rounds[T]]:
    """`turn(engine, study, repeat)` of every engine before the next study, after a rest each.

    The order is drawn anew for every study: no engine always follows the same one.
    """
    names, done, chance = list(engines), 0, random.Random(0)
    found: dict[str, Rounds[T]] = {name: [[] for _ in range(studies)] for name in names}
    for repeat in range(repeats):
        for study in range(studies):
            for name in chance.sample(names, len(names)):
                time.sleep(REST)
                found[name][study].append(turn(engines[name], study, repeat))
            done += 1
            tick(done, repeats * studies)
    return found


def ratio(base: Rounds[float], other: Rounds[float]) -> dict[str, float]:
    """Seconds of `other` / seconds of `base`: median over studies, and its 95 % interval."""
    one, two = (np.asarray([median(r) for r in rounds], np.float64) for rounds in (base, other))
    centre, low, high = ratio_interval(one, two)
    return {"ratio": centre, "low": low, "high": high, "studies": len(one)}
