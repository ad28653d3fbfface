"""Several drafts of one GGUF model at once: sequences that share its weights and its start.

Decoding one sequence waits for the weights to be read; reading them once for several sequences
costs little more. Every slot has a KV cache of its own (llama.cpp: not unified, so attention never
runs over the others' tokens). A prompt's constant start is computed in one slot and copied to the
rest.

Does not cover: loading (`llm_gguf.py`), which study gets which slot (`rx_edge.runtime.worklist`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from rx_edge.backends.base import KnownStart, Segment, checked_ids, checked_segment
from rx_edge.backends.gguf_batch import SIZE, Batch, read_logits
from rx_edge.backends.gguf_rows import EmbeddingRows
from rx_edge.closing import Closing
from rx_edge.errors import BackendError
from rx_edge.types import FloatArray, IntArray, Logits

NOT_FINITE = (
    "the language model returned NaN or infinite logits; the file, this soft prompt or this "
    "build of llama.cpp is broken"
)


class GgufParallel(Closing):
    """`slots` sequences in one llama.cpp context. Not thread-safe."""

    def __init__(
        self, api: Any, context: Any, rows: EmbeddingRows, *, slots: int, n_ctx: int, sizes: Any
    ) -> None:
        """Take over `context`; `sizes` is (V, D)."""
        self.slots = slots
        self._api, self._context, self._rows = api, context, rows
        self._n_ctx, (self.n_vocab, self.n_embd) = n_ctx, sizes
        self._memory = api.llama_get_memory(context)
        self._batch = Batch(api)
        self._positions = [0] * slots
        self._starts = [KnownStart() for _ in range(slots)]
        self._release = weakref.finalize(self, api.llama_free, context)

    def begin(self, slot: int, start: IntArray, segments: Sequence[Segment]) -> FloatArray:
        """A new prompt in `slot`.

        Args:
            start: ids (T,) that every prompt starts with; computed once, then copied.
            segments: the rest; one batch.

        Returns:
            float32 (V,), the logits after the last position.

        Raises:
            BackendError: as `LanguageBackend.prefill`.
        """
        checked = [checked_segment(s, self.n_vocab, self.n_embd) for s in segments]
        rows = np.concatenate([self._rows.rows(s) for s in checked])
        start = checked_ids(np.asarray(start), self.n_vocab)
        self._check_room(0, len(start) + len(rows))
        self._adopt(slot, start)
        if not self._positions[slot]:
            self._append(slot, start, last=False)
        for first in range(0, len(rows), SIZE):
            chunk = np.ascontiguousarray(rows[first : first + SIZE])
            self._append(slot, chunk, last=first + SIZE >= len(rows))
        logits: FloatArray = self._logits(1)[0]
        if not np.isfinite(logits).all():
            self.rewind(slot, 0)
            raise BackendError(NOT_FINITE)
        return logits

    def step(self, feeds: Sequence[tuple[int, IntArray]]) -> list[Logits | BackendError]:
        """Append ids to several slots in one pass.

        Args:
            feeds: slot and ids int32 (k,) of each; `SIZE` ids in all at most.

        Returns:
            For each, float32 (k, V): the logits after every one of its ids; or an error where
            they are not finite, which is that slot's alone.

        Raises:
            BackendError: as `LanguageBackend.step`. Positions stay where they were.
        """
        checked = [(slot, checked_ids(np.asarray(ids), self.n_vocab)) for slot, ids in feeds]
        lengths = [len(ids) for _, ids in checked]
        if not 0 < sum(lengths) <= SIZE:
            raise BackendError(f"{sum(lengths)} token ids in one pass; 1 to {SIZE} are possible")
        for slot, ids in checked:
            self._check_room(self._positions[slot], len(ids))
        tokens = np.concatenate([ids for _, ids in checked])
        positions = np.concatenate(
            [self._positions[slot] + np.arange(len(ids), dtype=np.int32) for slot, ids in checked]
        )
        sequence = np.repeat(np.asarray([slot for slot, _ in checked], np.int32), lengths)
        self._decode(tokens, positions, sequence, 1)
        logits = self._logits(len(tokens))
        results: list[Logits | BackendError] = []
        for (slot, ids), rows in zip(
            checked, np.split(logits, np.cumsum(lengths)[:-1]), strict=True
        ):
            if not np.isfinite(rows).all():
                self.rewind(slot, self._positions[slot])
                results.append(BackendError(NOT_FINITE))
                continue
            self._starts[slot].append(ids, self._positions[slot])
            self._positions[slot] += len(ids)
            results.append(rows)
        return results

    def position(self, slot: int) -> int:
        """Tokens in the slot's KV cache."""
        return self._positions[slot]

    def rewind(self, slot: int, position: int) -> None:
        """Keep the first `position` tokens of a slot."""
        if not self._api.llama_memory_seq_rm(self._memory, slot, position, -1):
            raise BackendError(f"the KV cache of slot {slot} cannot be cut at token {position}")
        self._positions[slot] = position
        self._starts[slot].cut(position)

    def close(self) -> None:
        """Free the context; the weights belong to the language model."""
        self._release()
        self._context = None

    def _adopt(self, slot: int, start: IntArray) -> None:
        """Empty the slot but for `start`, copied from another slot where one holds it."""
        if not self._starts[slot].holds(start):
            donor = next((s for s in range(self.slots) if self._starts[s].holds(start)), None)
            self.rewind(slot, 0)
            if donor is not None and len(start):
                self._api.llama_memory_seq_cp(self._memory, donor, slot, -1, -1)
                self._starts[slot].append(start, 0)
                self._positions[slot] = self._positions[donor]
        self.rewind(slot, len(start) if self._starts[slot].holds(start) else 0)

    def _append(self, slot: int, rows: Segment, *, last: bool) -> None:
        if not len(rows):
            return
        start = self._positions[slot]
        positions = np.arange(start, start + len(rows), dtype=np.int32)
        wanted = np.zeros(len(rows), np.int8)
        wanted[-1] = last
        self._decode(rows, positions, slot, wanted)
        self._starts[slot].append(rows, start)
        self._positions[slot] += len(rows)

    def _decode(self, rows: Segment, positions: IntArray, sequence: Any, wanted: Any) -> None:
        if self._context is None:
            raise BackendError("this language model is closed; open the file again")
        code = self._batch.decode(self._context, rows, positions, sequence, wanted)
        if code != 0:
            for slot in range(self.slots):  # a failed batch can leave cells behind
                self.rewind(slot, self._positions[slot])
            raise BackendError(f"llama_decode returned {code} for {len(rows)} tokens")

    def _logits(self, rows: int) -> Logits:
        found = read_logits(self._api, self._context, rows, self.n_vocab)
        if found is None:
            raise BackendError("llama.cpp computed no logits")
        return found.copy()

    def _check_room(self, position: int, n: int) -> None:
        if position + n > self._n_ctx:
            raise BackendError(
                f"context is full: {position} tokens + {n} more exceed n_ctx {self._n_ctx}; "
                "raise generate.n_ctx or shorten the prompt"
            )
