"""Drafts that grow side by side in one llama.cpp context, the next studies encoded meanwhile.

A pass reads the weights once for all of them: where reading weights is what decoding waits for (a
large model, a GPU) this is the way; short drafts of a small model are faster in `worklist.py`'s
workers. One thread reads, prepares and encodes ahead, into a queue of bounded length.

A pass over several drafts rounds otherwise than a pass over one, as in `decoding.py`: only a tie
between two tokens can fall the other way.

Does not cover: the order of results (`worklist.py`).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rx_edge.backends.base import Parallel, Slots
from rx_edge.errors import BackendError, RxEdgeError
from rx_edge.prompting import layout
from rx_edge.runtime.decoding import Draft
from rx_edge.runtime.pipeline import Study, encode, new_draft, open_study, report, text_of
from rx_edge.runtime.session import Session
from rx_edge.types import Result, SoftPrompt


def drafts(
    session: Session, studies: Sequence[Path], *, slots: int, ahead: int
) -> Iterator[Result]:
    """Every study's result, as it comes.

    Args:
        slots: drafts that grow together.
        ahead: most encoded studies that wait for a slot.

    Raises:
        BackendError: the backend decodes one sequence only, or the engine itself failed.
    """
    if not isinstance(session.language, Parallel):
        raise BackendError(
            f"{session.artifact.name} decodes one draft at a time; leave slots at 1, or choose "
            "a GGUF language model"
        )
    with ExitStack() as stack:
        language = stack.enter_context(session.language.parallel(slots))
        waiting = stack.enter_context(_Encoder(session, studies, ahead))
        yield from _Slots(session, language).run(waiting)


@dataclass(frozen=True)
class _Encoded:
    index: int
    path: Path
    study: Study
    soft_prompt: SoftPrompt


class _Encoder:
    """A thread that reads, prepares and encodes studies ahead of their decoding."""

    def __init__(self, session: Session, studies: Sequence[Path], ahead: int) -> None:
        self._session, self._studies = session, studies
        self._queue: queue.Queue[_Encoded | Result | BaseException | None] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rx-edge-encoder", daemon=True)

    def next(self, *, block: bool) -> _Encoded | Result | None:
        """The next study, or its failure; None when there is none (yet, unless `block`).

        Raises:
            BaseException: what ended the thread.
        """
        try:
            found = self._queue.get(block=block)
        except queue.Empty:
            return None
        if found is None:
            self._queue.put(None)  # for whoever asks again
        if isinstance(found, BaseException):
            raise found
        return found

    def __enter__(self) -> _Encoder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while self._thread.is_alive():  # it may wait for room in the queue
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _run(self) -> None:
        try:
            for index, path in enumerate(self._studies):
                if self._stop.is_set():
                    return
                self._queue.put(self._encode(index, path))
        except BaseException as error:
            self._queue.put(error)
        else:
            self._queue.put(None)

    def _encode(self, index: int, path: Path) -> _Encoded | Result:
        try:
            study, pixels = open_study(self._session, path)
            return _Encoded(index, path, study, encode(self._session, pixels, study.timings))
        except RxEdgeError as error:
            return Result(index, path, error=error)


class _Slots:
    """Drafts that grow side by side."""

    def __init__(self, session: Session, language: Slots) -> None:
        self._session, self._language = session, language
        self._start = np.asarray(session.prompt.before, np.int32)
        self._growing: dict[int, tuple[_Encoded, Draft, float]] = {}

    def run(self, waiting: _Encoder) -> Iterator[Result]:
        """Every study's result, as it comes."""
        while True:
            yield from self._fill(waiting)
            if not self._growing:
                return
            yield from self._pass()

    def _fill(self, waiting: _Encoder) -> Iterator[Result]:
        """Give free slots to studies that wait; wait for one only where nothing grows."""
        while len(self._growing) < self._language.slots:
            found = waiting.next(block=not self._growing)
            if found is None:
                return
            if isinstance(found, Result):
                yield found
                continue
            slot = next(s for s in range(self._language.slots) if s not in self._growing)
            try:
                self._begin(slot, found)
            except RxEdgeError as error:
                yield Result(found.index, found.path, error=error)
                continue
            yield from self._finished([slot])

    def _begin(self, slot: int, found: _Encoded) -> None:
        timings, started = found.study.timings, time.perf_counter()
        _, image_slot, after = layout(self._session.prompt, found.soft_prompt)
        logits = self._language.begin(slot, self._start, [image_slot, after])
        timings.prefill = time.perf_counter() - started
        timings.time_to_first_token = time.perf_counter() - found.study.started
        timings.prompt_tokens = len(self._start) + len(image_slot) + len(after)
        draft = new_draft(self._session, timings, None)
        draft.take(logits[None])
        self._growing[slot] = found, draft, time.perf_counter()

    def _pass(self) -> Iterator[Result]:
        """One pass over every draft."""
        feeds = [(slot, draft.feed()) for slot, (_, draft, _) in self._growing.items()]
        for (slot, _), rows in zip(feeds, self._language.step(feeds), strict=True):
            found, draft, _ = self._growing[slot]
            if isinstance(rows, RxEdgeError):
                del self._growing[slot]
                yield Result(found.index, found.path, error=rows)
            else:
                draft.take(rows)
        yield from self._finished([slot for slot, _ in feeds if slot in self._growing])

    def _finished(self, slots: Sequence[int]) -> Iterator[Result]:
        for slot in slots:
            found, draft, started = self._growing[slot]
            if draft.finish:
                del self._growing[slot]
                found.study.timings.decode = time.perf_counter() - started
                text = text_of(self._session, draft.ids)
                written = report(self._session, found.study, draft, text)
                yield Result(found.index, found.path, report=written)
