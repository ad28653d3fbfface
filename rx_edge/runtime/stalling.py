"""An end to waiting: what comes from workers elsewhere, while they show that work goes on.

Does not cover: why nothing moves, and starting workers (`worklist_ray.py`).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from rx_edge.errors import BackendError

T = TypeVar("T")
POLL = 1.0  # seconds


def moving(outcomes: Iterator[T], marks: Path, patience: float) -> Iterator[T]:
    """`outcomes`, while they come or files in `marks` come and go.

    Args:
        marks: a directory where workers leave a file while they are at a study.
        patience: seconds.

    Raises:
        BackendError: nothing moved for so long.
    """
    arrived: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
    ended = threading.Event()

    def pull() -> None:
        try:
            for outcome in outcomes:
                arrived.put((outcome,))
                if ended.is_set():
                    return
            arrived.put(None)
        except BaseException as error:  # for the caller's thread
            arrived.put(error)

    threading.Thread(target=pull, name="outcomes", daemon=True).start()
    seen, since = 0, time.monotonic()
    try:
        while True:
            with suppress(queue.Empty):
                found = arrived.get(timeout=min(POLL, patience / 4))
                if found is None:
                    return
                if isinstance(found, BaseException):
                    raise found
                yield found[0]
                since = time.monotonic()
            with suppress(OSError):  # shared storage may be away for a while
                if (moved := marks.stat().st_mtime_ns) != seen:
                    seen, since = moved, time.monotonic()
            if time.monotonic() - since > patience:
                raise BackendError(
                    f"no study was begun or ended for {patience:.0f} s: a worker hangs, or none is "
                    "started; what is drafted is kept, run it again to go on"
                )
    finally:
        ended.set()
