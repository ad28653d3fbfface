"""Many studies: each worker drafts several at once on its share of the cores.

On one core no thread waits for another at every layer. The drafts of a worker share its passes, and
processes read the next studies meanwhile. Workers share the checked bundle, and where the backend
maps its file also the weights. Results come in the order of the studies; a study that fails is a
result with an error, and the others go on.

Does not cover: how drafts share passes (`worklist_slots.py`), reading ahead (`read_ahead.py`),
writing results and resuming (`worklist_store.py`), workers that are processes, on one machine or
several (`worklist_ray.py`).
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rx_edge.backends import registry
from rx_edge.backends.base import Parallel
from rx_edge.errors import BackendError, RxEdgeError
from rx_edge.machine import memory_free, physical_cores
from rx_edge.runtime import worklist_slots
from rx_edge.runtime.pipeline import draft
from rx_edge.runtime.read_ahead import ReadAhead, Source, Waiting
from rx_edge.runtime.reading import StudyImages
from rx_edge.runtime.session import Session, open_checked
from rx_edge.types import Report, Result, StudyInput

SLOTS = 16  # drafts of a worker
GPU_SLOTS = 8  # memory is scarcer there; no number was measured on a GPU yet
# A process that reads takes a third of a second of a core to start, so it must have enough to read.
STUDIES_PER_READER, MOST_READERS = 16, 8
AHEAD = 2  # results per slot that may wait to be asked for


def draft_all(
    session: Session,
    studies: Sequence[StudyInput | Path],
    *,
    workers: int = 0,
    slots: int = 0,
    ahead: int = AHEAD,
    readers: int | None = None,
) -> Iterator[Result]:
    """Draft every study; results in the order of `studies`.

    Args:
        workers: threads that draft, each on its share of the cores; 0 = `default_workers`.
        slots: drafts of a worker that share its passes; 1 = one after the other, with proposals;
            0 = `default_slots`.
        ahead: results per slot that may wait to be asked for.
        readers: processes that read studies ahead; 0 = every worker reads its own, None =
            `default_readers`.

    Raises:
        BackendError: an engine failed or cannot be opened for a worker, or has no slots.
    """
    _check_slots(session, slots)
    count = min(workers or default_workers(session), max(1, len(studies)))
    slots = slots or default_slots(session, count)
    with ExitStack() as stack:
        source = _source(session, studies, readers)
        stack.callback(source.stop)
        opened = partial(_worker, session, count) if count > 1 else partial(nullcontext, session)
        found: queue.Queue[Result | BaseException | None] = queue.Queue(count * slots * ahead)
        threads = [
            threading.Thread(
                target=_work,
                args=(opened, slots, source, found),
                name="rx-edge-worker",
                daemon=True,
            )
            for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        stack.callback(_end, source, found, threads)
        yield from _in_order(_collected(found, count))


def draft_one(
    session: Session, index: int, study: StudyInput, images: StudyImages | None = None
) -> Result:
    """One study to its end; what is wrong with it is a result too."""
    try:
        return Result(index, study.image, report=_to_end(session, study, images))
    except RxEdgeError as error:
        return Result(index, study.image, error=error)


def default_slots(session: Session, workers: int) -> int:
    """Of each worker: `SLOTS`, or as many as fit into half of the free memory; 1 where the backend
    has none.
    """
    language = session.language
    if not isinstance(language, Parallel):
        return 1
    if language.device != "cpu":
        return GPU_SLOTS
    room = memory_free() // 2 // workers // language.sequence_bytes - 1  # the model's own sequence
    return max(1, min(SLOTS, room))


def default_workers(session: Session) -> int:
    """One per core and as fit into half of the free memory, where everything runs on the CPU and
    the weights are shared; else 1.
    """
    language = session.language
    on_cpu = session.vision.device == language.device == "cpu"
    mapped = getattr(registry.load(session.artifact.format), "SHARES_WEIGHTS", False)
    if not (on_cpu and mapped and isinstance(language, Parallel)):
        return 1
    tower = session.bundle.manifest.files[session.vision_artifact.file].bytes
    # its own sequence and the slots'; the engine keeps weights and packed weights of the tower
    each = language.sequence_bytes * (1 + SLOTS) + 2 * tower
    return max(1, min(physical_cores(), memory_free() // 2 // each))


def default_readers(studies: int) -> int:
    """As many as the cores can feed, for lists that are long enough to pay for starting them."""
    if not sys.executable:  # Python is part of another program
        return 0
    return min(studies // STUDIES_PER_READER, physical_cores(), MOST_READERS)


def _check_slots(session: Session, slots: int) -> None:
    if slots > 1 and not isinstance(session.language, Parallel):
        raise BackendError(
            f"{session.artifact.name} decodes one draft at a time; leave slots out, or choose "
            "a GGUF language model"
        )


class _Studies:
    """The studies, each handed out once."""

    def __init__(self, studies: Sequence[StudyInput]) -> None:
        self._rest = iter(enumerate(studies))
        self._lock = threading.Lock()
        self.stopped = False

    def next(self) -> Waiting | None:
        with self._lock:
            found = None if self.stopped else next(self._rest, None)
        return Waiting(*found) if found else None

    def stop(self) -> None:
        self.stopped = True


def _source(session: Session, studies: Sequence[StudyInput | Path], readers: int | None) -> Source:
    """The studies, read ahead where that pays or was asked for."""
    given = _Studies([StudyInput.of(study) for study in studies])
    readers = default_readers(len(studies)) if readers is None else min(readers, len(studies))
    if not readers:
        return given
    manifest = session.bundle.manifest
    return ReadAhead(given, manifest.prompt, manifest.image, readers=readers)


def _work(
    opened: Callable[[], AbstractContextManager[Session]],
    slots: int,
    source: Source,
    found: queue.Queue[Result | BaseException | None],
) -> None:
    """A worker: results, or what ended it, and None at the end."""
    try:
        with opened() as session:
            for result in _drafts(session, slots, source):
                found.put(result)
    except BaseException as error:
        found.put(error)
    finally:
        found.put(None)


def _drafts(session: Session, slots: int, source: Source) -> Iterator[Result]:
    if slots > 1 and isinstance(session.language, Parallel):
        with session.language.parallel(slots) as language:
            yield from worklist_slots.drafts(session, language, source)
        return
    while (one := source.next()) is not None:
        if one.error:
            yield Result(one.index, one.study.image, error=one.error)
        else:
            yield draft_one(session, one.index, one.study, one.images)


def _collected(found: queue.Queue[Result | BaseException | None], workers: int) -> Iterator[Result]:
    """What the workers found, until the last of them ends."""
    while workers:
        item = found.get()
        if isinstance(item, BaseException):
            raise item
        if item is None:
            workers -= 1
        else:
            yield item


def _end(source: Source, found: queue.Queue[Any], threads: Sequence[threading.Thread]) -> None:
    source.stop()
    for thread in threads:
        while thread.is_alive():  # it may wait for room in the queue
            with suppress(queue.Empty):
                found.get_nowait()
            thread.join(0.01)


def _to_end(session: Session, study: StudyInput, images: StudyImages | None) -> Report:
    chunks = draft(session, study, images=images)
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
