"""Drafts of one worker that grow side by side and share every pass.

A pass reads the weights once for all of them. A study is read and encoded when a slot is free for
it, so no more of them are in memory than grow.

A pass over several drafts may round otherwise than a pass over one, as in `decoding.py`: only a
tie between two tokens can fall the other way.

Does not cover: how many workers there are, and the order of results (`worklist.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rx_edge.backends.base import Slots
from rx_edge.errors import RxEdgeError
from rx_edge.prompting import layout
from rx_edge.runtime.decoding import Draft
from rx_edge.runtime.pipeline import Study, encode, new_draft, open_study, report, text_of
from rx_edge.runtime.read_ahead import Source, Waiting
from rx_edge.runtime.session import Session
from rx_edge.types import Result


def drafts(session: Session, language: Slots, source: Source) -> Iterator[Result]:
    """Every study's result, as it comes; proposals are left to drafts that grow alone.

    Raises:
        BackendError: the engine itself failed, not one study.
    """
    yield from _Slots(session, language).run(source)


@dataclass
class _Growing:
    index: int
    path: Path
    study: Study
    draft: Draft
    started: float  # time.perf_counter()


class _Slots:
    def __init__(self, session: Session, language: Slots) -> None:
        self._session, self._language = session, language
        self._start = np.asarray(session.prompt.before, np.int32)
        self._growing: dict[int, _Growing] = {}

    def run(self, source: Source) -> Iterator[Result]:
        while not source.stopped:
            yield from self._fill(source)
            if not self._growing:
                return
            yield from self._pass()

    def _fill(self, source: Source) -> Iterator[Result]:
        """Give free slots to the next studies."""
        while len(self._growing) < self._language.slots and (found := source.next()) is not None:
            slot = next(s for s in range(self._language.slots) if s not in self._growing)
            try:
                self._growing[slot] = self._begun(slot, found)
            except RxEdgeError as error:
                yield Result(found.index, found.study.image, error=error)
                continue
            yield from self._finished([slot])

    def _begun(self, slot: int, waiting: Waiting) -> _Growing:
        if waiting.error:
            raise waiting.error
        study = open_study(self._session, waiting.study, images=waiting.images)
        timings = study.timings
        soft_prompt = encode(self._session, study.images.pixels, timings)
        started = time.perf_counter()
        _, image_slot, after = layout(study.prompt, soft_prompt)
        logits = self._language.begin(slot, self._start, [image_slot, after])
        timings.prefill = time.perf_counter() - started
        timings.time_to_first_token = time.perf_counter() - study.started
        timings.prompt_tokens = len(self._start) + len(image_slot) + len(after)
        draft = new_draft(self._session, timings, None)
        draft.take(logits[None])
        return _Growing(waiting.index, waiting.study.image, study, draft, time.perf_counter())

    def _pass(self) -> Iterator[Result]:
        """One pass over every draft, in the order of slots (`Slots.step`)."""
        feeds = [(slot, self._growing[slot].draft.feed()) for slot in sorted(self._growing)]
        for (slot, _), rows in zip(feeds, self._language.step(feeds), strict=True):
            if isinstance(rows, RxEdgeError):
                failed = self._growing.pop(slot)
                yield Result(failed.index, failed.path, error=rows)
            else:
                self._growing[slot].draft.take(rows)
        yield from self._finished([slot for slot, _ in feeds if slot in self._growing])

    def _finished(self, slots: Sequence[int]) -> Iterator[Result]:
        for slot in slots:
            if not self._growing[slot].draft.finish:
                continue
            done = self._growing.pop(slot)
            done.study.timings.decode = time.perf_counter() - done.started
            text = text_of(self._session, done.draft.ids)
            written = report(self._session, done.study, done.draft, text)
            yield Result(done.index, done.path, report=written)
