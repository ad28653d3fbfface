"""A float GGUF -> a quantised GGUF, by llama.cpp itself.

Does not cover: where the importance matrix comes from (`imatrix.py`) and how far the result is
from the trained model (`verify.py`).
"""

from __future__ import annotations

import ctypes
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from rx_edge.atomic import replacing
from rx_edge.backends.gguf_engine import engine, last_errors
from rx_edge.errors import ExportError
from rx_edge.types import FloatArray

K_BLOCK = 256  # weights that share a scale in k-quants
FILE_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_NL")


def quantize(
    src: Path,
    out: Path,
    *,
    file_type: str,
    threads: int,
    imatrix: Mapping[str, FloatArray] | None = None,
) -> dict[str, Any]:
    """Quantise a float GGUF with llama.cpp.

    Rows whose length does not fit a block are stored in another type without a warning, so the
    histogram is read from the result. Where Q5_K_M would fall back to Q5_1 they become Q8_0:
    with Q5_1 the demo model (rows of 576) repeated itself, see docs/decisions/0002.

    Args:
        file_type: one of `FILE_TYPES`.
        threads: CPU threads; 0 = all.
        imatrix: GGUF tensor name -> float32 (columns,), the mean square of what each column of
            the weight is multiplied with; None = every column counts the same.

    Returns:
        {"bytes", "tensor_types": {type: count}, "bits_per_weight"}.

    Raises:
        ExportError: unknown file type, an importance that is not finite or has no tensor, or
            llama.cpp refused; its reason is in the message.
    """
    if file_type not in FILE_TYPES:
        raise ExportError(f"file_type is {file_type!r}; valid: {', '.join(map(repr, FILE_TYPES))}")
    if not src.is_file():
        raise ExportError(f"{str(src)!r} does not exist; write the float GGUF first")
    api = engine()
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    params.nthread = threads
    entries, arrays = _c_imatrix(api, src, imatrix or {})
    if arrays:
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(api.llama_model_imatrix_data))
    overrides = _c_overrides(api, src) if file_type == "Q5_K_M" else None
    if overrides is not None:
        params.tt_overrides = ctypes.cast(
            overrides, ctypes.POINTER(api.llama_model_tensor_override)
        )
    last_errors()  # forget older ones
    with replacing(out) as part:
        code = api.llama_model_quantize(os.fsencode(src), os.fsencode(part), ctypes.byref(params))
        if code != 0:
            raise ExportError(
                f"llama.cpp could not quantise {str(src)!r} to {file_type}: "
                f"{last_errors() or f'code {code}'}"
            )
    tensors = gguf.GGUFReader(out).tensors
    weights = sum(int(t.n_elements) for t in tensors)
    return {
        "bytes": out.stat().st_size,
        "tensor_types": tensor_types(out),
        "bits_per_weight": round(8 * sum(int(t.n_bytes) for t in tensors) / weights, 3),
    }


def tensor_types(path: Path) -> dict[str, int]:
    """How many tensors of a GGUF file have which type, e.g. {"F32": 5, "Q8_0": 15}."""
    counts = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors)
    return dict(sorted(counts.items()))


def _c_overrides(api: Any, src: Path) -> Any:
    """Q8_0 for every matrix whose rows fit no block of 256; None where all fit."""
    names = [
        t.name for t in gguf.GGUFReader(src).tensors if len(t.shape) == 2 and t.shape[0] % K_BLOCK
    ]
    if not names:
        return None
    entries = (api.llama_model_tensor_override * (len(names) + 1))()  # ended by one without a name
    for entry, name in zip(entries, names, strict=False):
        entry.pattern = f"^{re.escape(name)}$".encode()
        entry.type = int(gguf.GGMLQuantizationType.Q8_0)
    return entries


def _c_imatrix(
    api: Any, src: Path, imatrix: Mapping[str, FloatArray]
) -> tuple[Any, list[FloatArray]]:
    """llama.cpp's array of entries, ended by one without a name, and the numbers it points to.

    A name or length that fits no tensor would be ignored without a word, hence the check.
    """
    columns = {t.name: int(t.shape[0]) for t in gguf.GGUFReader(src).tensors} if imatrix else {}
    entries = (api.llama_model_imatrix_data * (len(imatrix) + 1))()
    arrays = []
    for entry, (name, values) in zip(entries, sorted(imatrix.items()), strict=False):
        if columns.get(name) != len(values):
            raise ExportError(
                f"importance matrix: {name!r} has {len(values)} columns, the model "
                f"{columns.get(name, 'no such tensor')}; collect it from this very model"
            )
        if not np.isfinite(values).all() or not (values >= 0).all() or not values.any():
            raise ExportError(f"importance matrix: {name!r} holds NaN, negative or only zeros")
        data = np.ascontiguousarray(values, np.float32)
        arrays.append(data)
        entry.name = name.encode()
        entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = data.size
    return entries, arrays
