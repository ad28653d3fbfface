"""NVIDIA GPUs as the driver's own management library (NVML) describes them: no CUDA, no package.

Does not cover: what runs on them (`rx_edge.backends`).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

LIBRARY = "libnvidia-ml.so.1"  # comes with the driver
_NAME_BYTES = 96  # nvml.h: NVML_DEVICE_NAME_V2_BUFFER_SIZE


@dataclass(frozen=True)
class Gpu:
    """One device; memory in bytes, compute capability such as (8, 9)."""

    name: str
    compute_capability: tuple[int, int]
    memory: int
    memory_free: int


@dataclass(frozen=True)
class Driver:
    """The driver, the newest CUDA version that it runs, and its devices."""

    version: str
    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]


class _Memory(ctypes.Structure):
    """nvml.h: nvmlMemory_t."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def driver(library: str = LIBRARY) -> Driver | str:
    """What the driver says, or why there is none, in words for the user."""
    try:
        nvml: Any = ctypes.CDLL(library)
    except OSError:
        return f"no NVIDIA driver: {library} is not on this machine"
    code = nvml.nvmlInit_v2()
    if code:
        return f"the NVIDIA driver does not answer (NVML error {code}); see nvidia-smi"
    try:
        return _described(nvml)
    except _NvmlError as error:
        return f"the NVIDIA driver fails in {error}; see nvidia-smi"
    finally:
        nvml.nvmlShutdown()


class _NvmlError(Exception):
    pass


def _described(nvml: Any) -> Driver:
    version, cuda, count = ctypes.create_string_buffer(80), ctypes.c_int(), ctypes.c_uint()
    _call(nvml, "nvmlSystemGetDriverVersion", version, ctypes.c_uint(len(version)))
    _call(nvml, "nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(cuda))
    _call(nvml, "nvmlDeviceGetCount_v2", ctypes.byref(count))
    gpus = tuple(_gpu(nvml, index) for index in range(count.value))
    # 13020 is CUDA 13.2
    return Driver(_text(version), (cuda.value // 1000, cuda.value % 1000 // 10), gpus)


def _gpu(nvml: Any, index: int) -> Gpu:
    handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(_NAME_BYTES)
    memory, major, minor = _Memory(), ctypes.c_int(), ctypes.c_int()
    _call(nvml, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
    _call(nvml, "nvmlDeviceGetName", handle, name, ctypes.c_uint(len(name)))
    _call(nvml, "nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
    _call(
        nvml, "nvmlDeviceGetCudaComputeCapability",
        handle, ctypes.byref(major), ctypes.byref(minor),
    )  # fmt: skip
    return Gpu(_text(name), (major.value, minor.value), int(memory.total), int(memory.free))


def _call(nvml: Any, function: str, *arguments: Any) -> None:
    code = getattr(nvml, function)(*arguments)
    if code:
        raise _NvmlError(f"{function} (NVML error {code})")


def _text(buffer: Any) -> str:
    text: str = buffer.value.decode(errors="replace")
    return text
