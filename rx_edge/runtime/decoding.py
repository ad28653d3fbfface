"""Decode one draft: choose, verify what was proposed, stop.

A pass feeds the last chosen token and what the draft index proposes after it. Row i of the logits
is what the model says after i accepted proposals, so the first row that chooses another token than
the proposed one ends the pass: every emitted token is the model's own choice, with proposals or
without. The same holds for sampling: the proposal is one token, so drawing from the model's
distribution and comparing *is* rejection sampling, and the same seed draws the same text either
way. Only floating point can differ: where a pass over several tokens rounds otherwise than a pass
over one, it can decide a tie. Q8_0 through llama.cpp does not (`gguf_engine.FLASH_ATTENTION`);
float16 files do.

Does not cover: where proposals come from (`drafting.py`), text (`pipeline.py`).
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rx_edge.backends.base import LanguageBackend
from rx_edge.runtime.drafting import Drafter
from rx_edge.types import FloatArray, IntArray, Timings

# A draft that says the same tokens over and over never ends by itself. None of the demo model's
# 2,359 training reports repeats any stretch of up to 16 tokens three times in a row.
LOOP_TOKENS, LOOP_TIMES = 48, 3


class Chooser(Protocol):
    """Logits (V,) to the next token."""

    def __call__(self, logits: FloatArray) -> int: ...


def greedy(logits: FloatArray) -> int:
    """The most probable token."""
    return int(logits.argmax())


class Sampler:
    """Draws from softmax(logits / temperature): one random number per emitted token."""

    def __init__(self, temperature: float, seed: int) -> None:
        self._temperature = temperature
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: FloatArray) -> int:
        scaled = (logits.astype(np.float64) - float(logits.max())) / self._temperature
        cumulative = np.cumsum(np.exp(scaled))
        drawn = self._random.random() * cumulative[-1]
        return int(np.searchsorted(cumulative, drawn, side="right"))


@dataclass(frozen=True)
class Step:
    """Tokens of one pass, the end token excluded; natural-log probabilities where asked for."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()


class Draft:
    """One draft as it grows: `take` logits, `feed` what the next pass computes.

    Attributes:
        ids: the tokens so far, the end token excluded.
        finish: None while it grows; then "end", "length" (the limit) or "loop" (it only repeats).
        rejected: how many of the tokens fed last must leave the KV cache.
    """

    def __init__(
        self,
        *,
        end: int,
        limit: int,
        choose: Chooser = greedy,
        drafter: Drafter | None = None,
        logprobs: bool = False,
        timings: Timings,
    ) -> None:
        """A draft of at most `limit` tokens.

        Args:
            end: the token that ends a draft.
            logprobs: put log-probabilities into every `Step`.
            timings: passes, proposals and tokens are counted here.
        """
        self.ids: list[int] = []
        self.finish: str | None = None
        self.rejected = 0
        self._end, self._limit = end, limit
        self._choose, self._drafter, self._timings = choose, drafter, timings
        self._logprobs = logprobs
        self._proposed = _NOTHING

    def feed(self, width: int | None = None) -> IntArray:
        """The last token and what is proposed after it, at most `width` together: int32 (k,)."""
        self._proposed = _NOTHING
        if self._drafter:
            # the last token of a draft is never fed back
            room = self._limit - len(self.ids) - 1
            room = room if width is None else min(room, width - 1)
            self._proposed = self._drafter.propose(self.ids, room)
        return np.concatenate([np.asarray(self.ids[-1:], np.int32), self._proposed])

    def take(self, rows: FloatArray) -> Step:
        """Judge the proposals by the logits after every token that was fed.

        Args:
            rows: float32 (k, V); at first (1, V), the logits after the prompt.
        """
        chosen, ended = self._choices(rows)
        accepted = len(chosen) - 1 + ended
        self.rejected = len(self._proposed) - accepted if len(self._proposed) else 0
        if self._drafter and len(self._proposed):
            self._timings.accepted.append(accepted)
            self._timings.drafted_tokens += len(self._proposed)
            self._drafter.judged(accepted)
        self._timings.decode_passes += bool(self.ids)  # the first choice comes with the prefill
        self.ids += chosen
        self._timings.new_tokens = len(self.ids)
        if ended:
            self.finish = "end"
        elif len(self.ids) >= self._limit:
            self.finish = "length"
        elif _loops(self.ids):
            self.finish = "loop"
        if self._drafter and self.finish:
            self._drafter.remember([*self.ids, self._end] if ended else self.ids)
        if not self._logprobs:
            return Step(tuple(chosen))
        return Step(tuple(chosen), _log_probabilities(rows[: len(chosen)], chosen))

    def _choices(self, rows: FloatArray) -> tuple[list[int], bool]:
        """The model's tokens up to the first that was not proposed; whether it chose to end."""
        chosen: list[int] = []
        for row, proposed in zip(rows, (*self._proposed, None), strict=True):
            token = self._choose(row)
            if token == self._end:
                return chosen, True
            chosen.append(token)
            if token != proposed or len(self.ids) + len(chosen) == self._limit:
                break
        return chosen, False


def decode(
    language: LanguageBackend, logits: FloatArray, draft: Draft, drafter: Drafter | None
) -> Generator[Step, None, None]:
    """Grow one draft to its end, pass by pass.

    Args:
        logits: float32 (V,) after the prompt, which fills the KV cache up to `language.position`;
            the cache has room for the draft's limit - 1 tokens.
        drafter: told how long every pass took.
    """
    step = draft.take(logits[None])
    while True:
        if step.ids:
            yield step
        if draft.finish:
            return
        fed = draft.feed()
        started = time.perf_counter()
        rows = language.step(fed)
        if drafter:
            drafter.passed(len(fed), time.perf_counter() - started)
        step = draft.take(rows)
        if draft.rejected:
            language.rewind(language.position - draft.rejected)


_NOTHING: IntArray = np.zeros(0, np.int32)


def _log_probabilities(rows: FloatArray, chosen: list[int]) -> tuple[float, ...]:
    """log softmax(row)[token] of each row (T, V) and its token."""
    shifted = rows - rows.max(-1, keepdims=True)
    picked = shifted[np.arange(len(chosen)), chosen]
    found: list[float] = (picked - np.log(np.exp(shifted).sum(-1))).tolist()
    return tuple(found)


def _loops(ids: list[int]) -> bool:
    """Whether the last `LOOP_TOKENS` repeat one stretch at least `LOOP_TIMES` times."""
    tail = ids[-LOOP_TOKENS:]
    if len(tail) < LOOP_TOKENS:
        return False
    return any(
        tail[period:] == tail[:-period] for period in range(1, LOOP_TOKENS // LOOP_TIMES + 1)
    )
