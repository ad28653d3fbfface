"""GPUs that this build of llama.cpp can use, and whether a model fits on one before it is loaded.

ggml's own device registry is asked, so what is found is what llama.cpp would use. A CPU build
finds nothing.

Does not cover: drivers and builds that do not work (`rx-edge doctor`), several GPUs (the first is
used: a report generator fits on one).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rx_edge.errors import BackendError, DeviceMemoryError

WORKSPACE = 512 * 2**20  # bytes: llama.cpp's compute buffers and cuBLAS's workspace, generously
_GPU_TYPES = (1, 2)  # ggml-backend.h: GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU
_GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One device as ggml describes it; memory in bytes.

    Attributes:
        index: among the GPUs, as `main_gpu` counts them.
    """

    index: int
    name: str
    memory_free: int
    memory: int


def gpus(api: Any) -> tuple[Gpu, ...]:
    """The GPUs that llama.cpp can use in this process."""
    ggml = _declared(api._lib)
    devices = [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]
    found = [d for d in devices if ggml.ggml_backend_dev_type(d) in _GPU_TYPES]
    return tuple(_gpu(ggml, index, device) for index, device in enumerate(found))


def first(api: Any) -> Gpu:
    """The GPU that a model is put on.

    Raises:
        BackendError: this build of llama.cpp has none.
    """
    found = gpus(api)
    if not found:
        raise BackendError(
            "device is 'cuda', but this build of llama.cpp finds no GPU; `rx-edge doctor` says "
            "why, and gives the command that builds it with CUDA"
        )
    return found[0]


def check_weights(gpu: Gpu, path: Path) -> None:
    """Refuse a file that cannot fit, before it is read.

    Raises:
        DeviceMemoryError: weights and workspace need more than is free.
    """
    _check(gpu, path.stat().st_size + WORKSPACE, f"the weights of {path.name}")


def check_context(gpu: Gpu, cache_bytes: int, n_ctx: int) -> None:
    """Refuse a KV cache that cannot fit beside the loaded weights.

    Raises:
        DeviceMemoryError: cache and workspace need more than is free.
    """
    _check(gpu, cache_bytes + WORKSPACE, f"a KV cache of {n_ctx} tokens")


def _check(gpu: Gpu, need: int, what: str) -> None:
    if need > gpu.memory_free:
        raise DeviceMemoryError(
            f"{gpu.name} has {gpu.memory_free / _GIB:.1f} GiB free, {what} needs "
            f"{need / _GIB:.1f} GiB; free some, choose a smaller artefact, or use --device cpu"
        )


def _gpu(ggml: Any, index: int, device: Any) -> Gpu:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    name = ggml.ggml_backend_dev_description(device).decode(errors="replace")
    return Gpu(index, name, int(free.value), int(total.value))


def _declared(library: Any) -> Any:
    pointer = ctypes.c_void_p
    library.ggml_backend_dev_count.restype = ctypes.c_size_t
    library.ggml_backend_dev_get.argtypes = (ctypes.c_size_t,)
    library.ggml_backend_dev_get.restype = pointer
    library.ggml_backend_dev_type.argtypes = (pointer,)
    library.ggml_backend_dev_description.argtypes = (pointer,)
    library.ggml_backend_dev_description.restype = ctypes.c_char_p
    library.ggml_backend_dev_memory.argtypes = (
        pointer, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t),
    )  # fmt: skip
    library.ggml_backend_dev_memory.restype = None
    return library
