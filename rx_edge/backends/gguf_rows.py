"""Rows of a GGUF file's token embedding, as llama.cpp itself would look them up.

A llama.cpp batch holds token ids or embeddings, never both, and llama.cpp gives no access to its
embedding table. With the rows at hand, soft prompt and text go in as one batch. ggml's own GGUF
reader finds the tensor and ggml's own kernel converts the rows, so the numbers are those of a
token batch.

Does not cover: models that scale or normalise their embeddings (the exporter writes none).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np

from rx_edge.backends.base import Segment
from rx_edge.errors import BackendError
from rx_edge.types import FloatArray

TENSOR = b"token_embd.weight"
_F32 = 0  # ggml.h: GGML_TYPE_F32, the one type without a conversion


class _Params(ctypes.Structure):
    """gguf.h: struct gguf_init_params."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


class _Traits(ctypes.Structure):
    """ggml.h: struct ggml_type_traits, as far as it is needed."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


class EmbeddingRows:
    """The table (V, D) of a GGUF file, memory-mapped; rows are converted when asked for."""

    def __init__(self, library: Any, path: Path, n_vocab: int, n_embd: int) -> None:
        """Find the table.

        Args:
            library: llama.cpp's shared library, ggml's symbols within reach.

        Raises:
            BackendError: the file holds no table of this shape.
        """
        kind, offset, size = _locate(_declared(library), path)
        traits = library.ggml_get_type_traits(kind).contents
        width = n_embd // traits.blck_size * traits.type_size  # bytes of one row
        if n_embd % traits.blck_size or width * n_vocab != size:
            raise BackendError(
                f"{str(path)!r}: the token embedding holds {size} bytes, but {n_vocab} rows of "
                f"{n_embd} in {traits.type_name.decode()} need {width * n_vocab}"
            )
        self._convert = None if kind == _F32 else traits.to_float
        self._table = np.memmap(path, np.uint8, "r", offset, (n_vocab, width))
        self._n_embd = n_embd

    def rows(self, ids: Segment) -> FloatArray:
        """Ids (T,) -> float32 (T, D); embeddings (N, D) stay what they are."""
        if ids.ndim == 2:
            return np.asarray(ids, np.float32)
        raw = np.ascontiguousarray(self._table[ids])
        if self._convert is None:
            return raw.view(np.float32)
        out = np.empty((len(ids), self._n_embd), np.float32)
        self._convert(raw.ctypes.data, out.ctypes.data, out.size)
        return out


def _locate(library: Any, path: Path) -> tuple[int, int, int]:
    """ggml type, offset in the file and size in bytes of the table."""
    header = library.gguf_init_from_file(os.fsencode(path), _Params(True, None))
    if not header:
        raise BackendError(f"{str(path)!r} cannot be read as GGUF; export it again")
    try:
        tensor = library.gguf_find_tensor(header, TENSOR)
        if tensor < 0:
            raise BackendError(f"{str(path)!r} holds no {TENSOR.decode()}; export it again")
        offset = library.gguf_get_data_offset(header)
        return (
            library.gguf_get_tensor_type(header, tensor),
            offset + library.gguf_get_tensor_offset(header, tensor),
            library.gguf_get_tensor_size(header, tensor),
        )
    finally:
        library.gguf_free(header)


def _declared(library: Any) -> Any:
    """The library with the C signatures that are used here."""
    handle, number, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    for name, result, arguments in (
        ("gguf_init_from_file", handle, (ctypes.c_char_p, _Params)),
        ("gguf_find_tensor", number, (handle, ctypes.c_char_p)),
        ("gguf_get_tensor_type", ctypes.c_int, (handle, number)),
        ("gguf_get_tensor_offset", size, (handle, number)),
        ("gguf_get_tensor_size", size, (handle, number)),
        ("gguf_get_data_offset", size, (handle,)),
        ("gguf_free", None, (handle,)),
        ("ggml_get_type_traits", ctypes.POINTER(_Traits), (ctypes.c_int,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
