"""The vision half (encoder, pooling, projector) on an NVIDIA GPU, through TensorRT.

A bundle ships ONNX; the engine is built on this machine at the first `open`, which takes seconds
to minutes and is reported step by step, and is cached (`engine_cache.py`). There is no way from
here to a CPU: what cannot run on the GPU is an error.

Device memory is reached through the driver's own library, which every machine with a GPU has, and
the device's primary context, which TensorRT uses too.

Does not cover: several GPUs (CUDA_VISIBLE_DEVICES chooses one), CUDA graphs, and preparing pixels
(`rx_edge.image`).
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rx_edge.backends import tensorrt_engine as engine_builder
from rx_edge.backends.base import PAIRING_KEY
from rx_edge.backends.engine_cache import EngineKey, cache_dir, load_or_build, onnx_sha256, system
from rx_edge.backends.tensorrt_engine import Library, Progress, Signature
from rx_edge.backends.vision_onnx import INPUT, OUTPUT
from rx_edge.closing import Closing
from rx_edge.errors import BackendError, MissingExtraError
from rx_edge.types import FloatArray

REQUIRES = ("tensorrt", "tensorrt_rtx_bindings")  # either is enough

MAX_BATCH = 4  # images in one pass of the engine; larger batches are split


def is_available() -> str | None:
    """None, or why this backend cannot be used here."""
    try:
        engine_builder.find()
        with Gpu() as gpu:
            library = engine_builder.find(gpu.name)
            targets = library.targets()
            if targets and gpu.target not in targets:
                return (
                    f"{library.label} does not support {gpu.name} ({gpu.target}); "
                    f"it does {', '.join(targets)}"
                )
    except (MissingExtraError, BackendError) as error:
        return str(error)
    except (ImportError, OSError) as error:  # a shared library does not load
        return f"TensorRT is installed but does not load: {error}"
    return None


def build(
    path: Path,
    *,
    max_batch: int = MAX_BATCH,
    compute_capability: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> bytes:
    """The serialised engine of an ONNX file; TensorRT-RTX needs no GPU for it.

    Args and errors are those of `tensorrt_engine.build`.
    """
    return engine_builder.build(
        engine_builder.find(),
        path,
        max_batch=max_batch,
        compute_capability=compute_capability,
        progress=progress,
    ).plan


def devices() -> tuple[str, ...]:
    """A GPU, and nothing else."""
    return ("cuda",)


def open(
    path: Path, *, threads: int, device: str = "cuda", progress: Progress | None = None
) -> TensorrtVision:
    """Load the engine of an ONNX file; build it if the cache has none for this machine.

    Args:
        threads: not used, since the GPU does the work; here because every backend takes it.
        device: "cuda", the only one.
        progress: called with phase, steps done and steps in all while the engine is built.

    Raises:
        MissingExtraError: no TensorRT is installed.
        BackendError: no such file, no usable GPU, TensorRT refuses the file, or an engine does
            not load.
    """
    if device != "cuda" or threads < 0:
        raise BackendError(
            f"device is {device!r} and threads is {threads}; TensorRT runs on 'cuda', threads >= 0"
        )
    if not path.is_file():
        raise BackendError(f"vision model {str(path)!r} does not exist; export it again")
    pairing = onnx_metadata(path).get(PAIRING_KEY, "")
    engine_builder.find()  # a missing package is the first thing to say
    gpu = Gpu()
    try:
        library = engine_builder.find(gpu.name)
        runtime = library.trt.Runtime(library.logger)
        engine = _engine(library, runtime, gpu, path, progress)
        signature = engine_builder.engine_signature(library.trt, engine, path, max_batch=MAX_BATCH)
        return TensorrtVision(runtime, engine, signature, gpu, library.label, pairing)
    except BaseException:
        gpu.close()
        raise


def _engine(library: Library, runtime: Any, gpu: Gpu, path: Path, progress: Progress | None) -> Any:
    key = EngineKey(
        onnx_sha256=onnx_sha256(path),
        flavour=library.flavour,
        version=library.version,
        compute_capability=gpu.target,
        gpu=gpu.name,
        system=system(),
        profile=f"batch 1..{MAX_BATCH}, tuned for 1",
        flags=engine_builder.FLAGS,
    )

    def plan() -> bytes:
        return engine_builder.build(
            library,
            path,
            max_batch=MAX_BATCH,
            compute_capability=gpu.compute_capability if library.targets() else None,
            progress=progress,
        ).plan

    return load_or_build(cache_dir(), key, plan, runtime.deserialize_cuda_engine, library.reasons)


class TensorrtVision(Closing):
    """A `VisionBackend` (see `base.py` for the contract)."""

    def __init__(
        self, runtime: Any, engine: Any, signature: Signature, gpu: Gpu, label: str, pairing: str
    ) -> None:
        self.device = f"cuda ({gpu.name}, {label})"
        self.pairing = pairing
        self._signature = signature
        self._gpu: Gpu | None = gpu
        self._runtime: Any = runtime  # must outlive the engine
        self._engine: Any = engine
        self._context: Any = engine.create_execution_context()
        if self._context is None:
            raise BackendError(f"{label} has no execution context; is GPU memory free? nvidia-smi")
        size, n, d = signature.size, signature.tokens, signature.width
        self._input = gpu.allocate(MAX_BATCH * 3 * size * size * 4)  # bytes of float32
        self._output = gpu.allocate(MAX_BATCH * n * d * 4)
        self._context.set_tensor_address(INPUT, self._input)
        self._context.set_tensor_address(OUTPUT, self._output)

    def encode(self, images: FloatArray) -> FloatArray:
        """float32 (B, 3, S, S) -> float32 (B, N, D)."""
        if self._gpu is None:
            raise BackendError("this vision model is closed; open the file again")
        wanted = (3, self._signature.size, self._signature.size)
        if images.ndim != 4 or images.shape[1:] != wanted or len(images) == 0:
            raise BackendError(f"images have shape {images.shape}; (B, *{wanted}) is expected")
        if images.dtype != np.float32:
            raise BackendError(f"images are {images.dtype}; float32 is expected")
        if not np.isfinite(images).all():
            raise BackendError("the image tensor holds NaN or infinite numbers")
        parts = [
            self._run(self._gpu, np.ascontiguousarray(images[start : start + MAX_BATCH]))
            for start in range(0, len(images), MAX_BATCH)
        ]
        soft_prompt = np.concatenate(parts)
        if not np.isfinite(soft_prompt).all():
            raise BackendError(
                "the vision model returned NaN or infinite numbers; the file is broken or its "
                "precision is too low: use the fp32 file"
            )
        return soft_prompt

    def _run(self, gpu: Gpu, images: FloatArray) -> FloatArray:
        found = np.empty((len(images), self._signature.tokens, self._signature.width), np.float32)
        gpu.activate()
        gpu.upload(self._input, images)
        if not (
            self._context.set_input_shape(INPUT, images.shape)
            and self._context.execute_async_v3(gpu.stream)
        ):
            raise BackendError(f"TensorRT failed on {images.shape}; see nvidia-smi for the GPU")
        gpu.synchronise()
        gpu.download(found, self._output)
        return found

    def close(self) -> None:
        """Free the engine and its memory; idempotent."""
        if self._gpu is not None:
            self._context = None  # in this order, and before the memory that they point to
            self._engine = None
            self._runtime = None
            self._gpu.close()
            self._gpu = None


class Gpu(Closing):
    """Device 0: what it is, its memory and one stream, through the CUDA driver API."""

    def __init__(self) -> None:
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            self._driver = ctypes.CDLL(name)
        except OSError as error:
            raise BackendError(
                f"no NVIDIA GPU: the driver library {name} is absent; install the driver, or use "
                "the ONNX backend"
            ) from error
        self._call("cuInit", ctypes.c_uint(0))
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(0))
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, ctypes.c_int(256), self._device)
        self.name = text.value.decode("utf-8", "replace")
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        self.compute_capability = (self._attribute(75), self._attribute(76))
        self.target = "SM{}{}".format(*self.compute_capability)
        self._memory: list[int] = []
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._closed = False
        self.activate()
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(1))  # non-blocking
        self.stream = int(stream.value or 0)

    def activate(self) -> None:
        """Make the device's context current in this thread."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        """`size` bytes of device memory, freed by `close`."""
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        self._memory.append(pointer.value)
        return pointer.value

    def upload(self, target: int, source: FloatArray) -> None:
        """Contiguous host memory -> device memory; done on return."""
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(target), *_host(source))
        self._call("cuCtxSynchronize")  # the copy is not ordered with the non-blocking stream

    def download(self, target: FloatArray, source: int) -> None:
        """Device memory -> contiguous host memory; done on return."""
        pointer, size = _host(target)
        self._call("cuMemcpyDtoH_v2", pointer, ctypes.c_uint64(source), size)

    def synchronise(self) -> None:
        """Wait for the stream."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def close(self) -> None:
        """Free memory, stream and context; idempotent."""
        if self._closed:
            return
        self._closed = True
        self.activate()
        for pointer in self._memory:
            self._call("cuMemFree_v2", ctypes.c_uint64(pointer))
        self._call("cuStreamDestroy_v2", ctypes.c_void_p(self.stream))
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), self._device)
        return value.value

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._driver, function)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
            reason = (text.value or b"unknown error").decode("utf-8", "replace")
            raise BackendError(
                f"no usable NVIDIA GPU: {function} failed with {code} ({reason}); see nvidia-smi"
            )


def _host(array: FloatArray) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    return ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)


# ---- metadata of an ONNX file, without the onnx package


@dataclass(frozen=True)
class _Field:
    number: int
    size: int  # bytes of a length-delimited field, which start at the stream's position


def onnx_metadata(path: Path) -> dict[str, str]:
    """`metadata_props` of a model: the strings in field 14 of ModelProto (onnx.proto).

    Raises:
        BackendError: it is not a protobuf file.
    """
    found: dict[str, str] = {}
    try:
        end = path.stat().st_size
        with path.open("rb") as stream:
            while (field := _next_field(stream, end)) is not None:
                after = stream.tell() + field.size
                if field.number == 14:
                    entry = _Entry.read(stream, after)
                    found[entry.key] = entry.value
                stream.seek(after)  # past the graph, which holds the weights
    except (ValueError, OSError) as error:
        raise BackendError(f"{str(path)!r} is no ONNX file ({error}); export it again") from error
    return found


@dataclass(frozen=True)
class _Entry:
    """StringStringEntryProto."""

    key: str
    value: str

    @staticmethod
    def read(stream: BinaryIO, end: int) -> _Entry:
        texts = {1: "", 2: ""}
        while (field := _next_field(stream, end)) is not None:
            texts[field.number] = stream.read(field.size).decode("utf-8")
        return _Entry(texts[1], texts[2])


def _next_field(stream: BinaryIO, end: int) -> _Field | None:
    """Read a tag; None at `end`. Only field sizes of a well-formed file stay within it."""
    if stream.tell() == end:
        return None
    tag = _varint(stream)
    kind = tag & 7
    if kind == 0:  # a number: read it here, so that nothing is left to skip
        _varint(stream)
        size = 0
    elif kind == 2:
        size = _varint(stream)
    else:
        size = {1: 8, 5: 4}.get(kind, -1)
    if size < 0 or stream.tell() + size > end:
        raise ValueError("not a protobuf, or cut off")
    return _Field(tag >> 3, size)


def _varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            break
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("not a protobuf, or cut off")
