"""Many studies: each worker drafts whole studies on its share of the cores.

A draft on one core wastes nothing: no thread waits for another at every layer, and reading one
study's file overlaps with decoding another's. Workers share the checked bundle, and where the
backend maps its file also the weights. Results come in the order of the studies; a study that
fails is a result with an error, and the others go on.

Does not cover: drafts that share passes (`worklist_slots.py`), writing results and resuming
(`worklist_store.py`), workers that are processes, on one machine or several (`worklist_ray.py`).
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from rx_edge.backends import registry
from rx_edge.errors import RxEdgeError
from rx_edge.machine import physical_cores
from rx_edge.runtime import worklist_slots
from rx_edge.runtime.pipeline import draft
from rx_edge.runtime.session import Session, open_checked
from rx_edge.types import Report, Result

AHEAD = 2  # studies per worker (or encoded ones, with slots) that are done or begun, unread yet


def draft_all(
    session: Session,
    studies: Sequence[Path],
    *,
    workers: int = 0,
    slots: int = 1,
    ahead: int = AHEAD,
) -> Iterator[Result]:
    """Draft every study; results in the order of `studies`.

    Args:
        workers: studies drafted at the same time; 0 = one per core where everything runs on the
            CPU and the weights are shared, else 1.
        slots: more than 1 = drafts that share passes instead, in one worker.
        ahead: studies per worker that may be done or begun before they are asked for.

    Raises:
        BackendError: an engine cannot be opened for a worker, or has no slots.
    """
    if slots > 1:
        yield from _in_order(worklist_slots.drafts(session, studies, slots=slots, ahead=ahead))
        return
    count = min(workers or default_workers(session), max(1, len(studies)))
    with ExitStack() as stack:
        free: queue.SimpleQueue[Session] = queue.SimpleQueue()
        if count == 1:
            free.put(session)
        else:
            for _ in range(count):
                free.put(stack.enter_context(_worker(session, count)))
        pool = stack.enter_context(ThreadPoolExecutor(count, "rx-edge-worker"))
        begun: deque[Future[Result]] = deque()
        stack.callback(lambda: [future.cancel() for future in begun])
        for index, study in enumerate(studies):
            begun.append(pool.submit(_draft, free, index, study))
            if len(begun) >= count * ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def draft_one(session: Session, index: int, study: Path) -> Result:
    """One study to its end; what is wrong with it is a result too."""
    try:
        return Result(index, study, report=_to_end(session, study))
    except RxEdgeError as error:
        return Result(index, study, error=error)


def default_workers(session: Session) -> int:
    """One per core where everything runs on the CPU and the weights are shared, else 1."""
    on_cpu = session.vision.device == session.language.device == "cpu"
    mapped = getattr(registry.load(session.artifact.format), "SHARES_WEIGHTS", False)
    return physical_cores() if on_cpu and mapped else 1


def _draft(free: queue.SimpleQueue[Session], index: int, study: Path) -> Result:
    session = free.get()
    try:
        return draft_one(session, index, study)
    finally:
        free.put(session)


def _to_end(session: Session, study: Path) -> Report:
    chunks = draft(session, study)
    while True:
        try:
            next(chunks)
        except StopIteration as end:
            report: Report = end.value
            return report


def _worker(session: Session, workers: int) -> Session:
    """The same bundle, artefacts and settings, on a share of the cores."""
    cores = session.generate.threads or physical_cores()
    return open_checked(
        session.bundle,
        vision=session.vision_artifact,
        language=session.artifact,
        max_new_tokens=session.generate.max_new_tokens,
        threads=max(1, cores // workers),
        runtime=session.runtime,
    )


def _in_order(found: Iterator[Result]) -> Iterator[Result]:
    results: dict[int, Result] = {}
    following = 0
    for result in found:
        results[result.index] = result
        while following in results:
            yield results.pop(following)
            following += 1
