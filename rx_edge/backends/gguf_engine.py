"""llama.cpp in this process: its one library, its one log, models and contexts.

Does not cover: decoding (`llm_gguf.py`, `llm_gguf_parallel.py`).
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections import deque
from pathlib import Path
from typing import Any

from rx_edge.backends.gguf_batch import SIZE
from rx_edge.backends.gguf_gpu import Gpu, check_context, check_weights
from rx_edge.errors import BackendError, DeviceMemoryError
from rx_edge.optional import require

OUTPUTS = 32  # logit rows per llama_decode: 32 x 49k floats reserve 6 MB, 512 would reserve 100
# On: then a pass over several tokens gives the very bits of single passes (Q8_0, AVX2), and
# proposals decide no tie. Off, they differ by 1.3 logits, 17 of 637 tokens would be others, and a
# draft takes 7 % longer (`benchmarks/results/attention-demo-cpu2.json`). How a prompt is split into
# batches still matters, which is why production always splits it in the same way.
FLASH_ATTENTION = True

ALL_LAYERS = 10_000  # more than any model has

_OUT_OF_MEMORY = ("out of memory", "failed to allocate", "unable to allocate")
_LOG_ERROR, _LOG_CONTINUED = 4, 5  # ggml.h; the enum in llama-cpp-python's logger is outdated


def metadata(api: Any, model: Any, key: str) -> str:
    """A string from the GGUF's metadata; "" when it has no such key."""
    buffer = ctypes.create_string_buffer(256)
    found = api.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer)) >= 0
    return buffer.value.decode(errors="replace") if found else ""


def cache_bytes_per_token(api: Any, model: Any) -> int:
    """Of a float16 KV cache: keys and values of every layer."""
    width = api.llama_model_n_embd(model) // api.llama_model_n_head(model)
    heads = api.llama_model_n_head_kv(model)
    return int(2 * 2 * api.llama_model_n_layer(model) * heads * width)


def free(api: Any, context: Any, model: Any) -> None:
    """Free a context and its model."""
    api.llama_free(context)
    api.llama_model_free(model)


def check_file(path: Path) -> None:
    """Refuse what is no GGUF file, before llama.cpp sees it.

    Raises:
        BackendError: it cannot be read, or is something else.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BackendError(
            f"language model {str(path)!r} cannot be read: {error.strerror}"
        ) from error
    if magic != b"GGUF":
        raise BackendError(f"language model {str(path)!r} is not a GGUF file; export it again")


def load_model(api: Any, path: Path, gpu: Gpu | None = None) -> Any:
    """Memory-map a model: on the CPU, or every layer on `gpu`.

    Raises:
        DeviceMemoryError: it does not fit on the GPU.
        BackendError: llama.cpp refuses it; its reason is in the message.
    """
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    params.load_mode = api.LLAMA_LOAD_MODE_MMAP
    if gpu:
        check_weights(gpu, path)
        params.n_gpu_layers = ALL_LAYERS
        params.split_mode, params.main_gpu = api.LLAMA_SPLIT_MODE_NONE, gpu.index
    last_errors()
    model = api.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise _refusal(f"llama.cpp cannot load {str(path)!r}", gpu)
    return model


def _refusal(what: str, gpu: Gpu | None) -> BackendError:
    """The error with llama.cpp's reason; the allocators of its GPU backends all say so."""
    why = reason()
    short = gpu is not None and any(sign in why for sign in _OUT_OF_MEMORY)
    return (DeviceMemoryError if short else BackendError)(what + why)


def new_context(
    api: Any,
    model: Any,
    path: Path,
    n_ctx: int,
    threads: int,
    exact: bool = False,
    flash_attention: bool = FLASH_ATTENTION,
    slots: int = 1,
    gpu: Gpu | None = None,
) -> Any:
    """A context whose `slots` sequences have `n_ctx` tokens each, where the model is.

    Raises:
        DeviceMemoryError: its cache does not fit on the GPU.
        BackendError: llama.cpp cannot make it.
    """
    params = api.llama_context_default_params()
    # one cache per sequence; llama.cpp divides n_ctx among them and wants multiples of 256
    params.n_seq_max, params.kv_unified = slots, slots == 1
    params.n_ctx = n_ctx if slots == 1 else -(-n_ctx // 256) * 256 * slots
    params.n_batch = params.n_ubatch = min(SIZE, n_ctx)
    params.n_outputs_max_per_seq = min(OUTPUTS, n_ctx)
    params.n_outputs_max = params.n_outputs_max_per_seq * slots
    params.n_threads = params.n_threads_batch = threads
    # without a GPU, stay on the CPU in a GPU build as well
    params.offload_kqv = params.op_offload = gpu is not None
    params.no_perf = True
    flash = flash_attention and not exact
    params.flash_attn_type = (
        api.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.type_k = params.type_v = api.GGML_TYPE_F32 if exact else api.GGML_TYPE_F16
    if gpu:
        width = 2 if exact else 1  # float32, not float16
        check_context(gpu, width * params.n_ctx * cache_bytes_per_token(api, model), params.n_ctx)
    last_errors()
    context = api.llama_init_from_model(model, params)
    if not context:
        raise _refusal(f"llama.cpp cannot make a context for {str(path)!r}", gpu)
    return context


@functools.cache
def engine() -> Any:
    """llama_cpp's ctypes layer, initialised, its log kept instead of printed.

    The exporter shares it, so that one process has one log callback.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
    """
    api: Any = require("llama_cpp.llama_cpp", extra="cpu")
    errors, level = _errors(), 0

    def keep(new_level: int, text: bytes, _: Any) -> None:
        nonlocal level
        level = level if new_level == _LOG_CONTINUED else new_level
        if level == _LOG_ERROR:
            errors.append(" ".join(text.decode(errors="replace").split()))

    # llama.cpp keeps the bare pointer, so the callback must live as long as the process
    api.rx_edge_log = api.llama_log_callback(keep)
    api.llama_log_set(api.rx_edge_log, ctypes.c_void_p(0))
    api.llama_backend_init()
    return api


@functools.cache
def _errors() -> deque[str]:
    """llama.cpp's most recent error lines; it logs per process, not per model."""
    return deque(maxlen=3)


def last_errors() -> str:
    """Take llama.cpp's error lines since the last call, or ""."""
    lines = [line for line in _errors() if line]
    _errors().clear()
    return " / ".join(lines)


def reason() -> str:
    """ ": " and llama.cpp's error lines since the last call, or ""."""
    lines = last_errors()
    return f": {lines}" if lines else ""
