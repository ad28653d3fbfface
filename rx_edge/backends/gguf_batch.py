"""One llama.cpp batch whose pointers stay: a step only rewrites these arrays.

Does not cover: what goes in (`llm_gguf.py`, `llm_gguf_parallel.py`).
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from rx_edge.types import IntArray, Logits

SIZE = 512  # tokens per llama_decode; more than n_batch aborts the process


class Batch:
    """Rows of a `llama_batch`; every row belongs to one sequence."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self._tokens = np.zeros(SIZE, np.int32)
        self._positions = np.zeros(SIZE, np.int32)
        self._wanted = np.zeros(SIZE, np.int8)  # 1 where logits are asked for
        self._sequence = np.zeros(SIZE, np.int32)
        self._counts = np.ones(SIZE, np.int32)
        # llama.h wants an array of arrays: one pointer per row, to that row's one sequence
        start, width = self._sequence.ctypes.data, self._sequence.itemsize
        self._pointers = np.arange(SIZE, dtype=np.uintp) * width + start
        self._batch = api.llama_batch()
        self._batch.pos = pointer(self._positions, ctypes.c_int32)
        self._batch.logits = pointer(self._wanted, ctypes.c_int8)
        self._batch.n_seq_id = pointer(self._counts, ctypes.c_int32)
        self._batch.seq_id = pointer(self._pointers, ctypes.POINTER(ctypes.c_int32))

    def decode(
        self, context: Any, rows: Any, positions: IntArray, sequence: Any, wanted: Any
    ) -> int:
        """`llama_decode` of ids (T,) int32 or embeddings (T, D) float32, C-contiguous.

        Args:
            positions: int32 (T,), each within its sequence.
            sequence, wanted: (T,) or one value for all: which sequence, and whether logits of
                the row are asked for.

        Returns:
            llama_decode's code.
        """
        n, batch = len(rows), self._batch
        if rows.ndim == 1:
            self._tokens[:n] = rows
            batch.token, batch.embd = pointer(self._tokens, ctypes.c_int32), None
        else:  # zero-copy: the rows outlive the call
            batch.token, batch.embd = None, pointer(rows, ctypes.c_float)
        batch.n_tokens = n
        self._positions[:n] = positions
        self._sequence[:n] = sequence
        self._wanted[:n] = wanted
        return int(self._api.llama_decode(context, batch))


def pointer(array: Any, kind: Any) -> Any:
    """A ctypes pointer to an array's memory."""
    return array.ctypes.data_as(ctypes.POINTER(kind))


def read_logits(api: Any, context: Any, rows: int, n_vocab: int) -> Logits | None:
    """The last call's logits (rows, V), still in llama.cpp's memory; None when it has none."""
    found = api.llama_get_logits(context)
    return np.ctypeslib.as_array(found, (rows, n_vocab)) if found else None
