"""Waiting for workers ends when nothing moves, and not before."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rx_edge.errors import BackendError
from rx_edge.runtime.stalling import moving


def test_a_run_in_which_nothing_moves_ends(tmp_path: Path) -> None:
    hanging = threading.Event()

    def outcomes() -> Iterator[int]:
        yield 0
        for study in range(6):  # longer than patience, but studies begin
            time.sleep(0.4)
            (tmp_path / str(study)).touch()
        yield 1
        hanging.wait()

    found = moving(outcomes(), tmp_path, 1.0)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(BackendError, match=r"no study was begun or ended for 1 s"):
        next(found)
    hanging.set()


def test_ends_and_errors_are_those_of_the_workers(tmp_path: Path) -> None:
    def refusing() -> Iterator[int]:
        yield 0
        raise BackendError("no worker")

    assert list(moving(iter([1, 2]), tmp_path, 60.0)) == [1, 2]
    with pytest.raises(BackendError, match="no worker"):
        list(moving(refusing(), tmp_path, 60.0))
