"""ONNX Runtime: imported without telemetry, and opened on the device that was asked for.

ONNX Runtime answers a provider that does not load by quietly using the CPU; here the provider
that is in use after loading is compared with the one asked for, and a difference is an error.

Does not cover: what a graph takes and returns (the backends), TensorRT, and nodes of a CUDA
graph that ONNX Runtime itself places on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rx_edge.errors import BackendError, MissingExtraError
from rx_edge.nvidia import driver
from rx_edge.optional import require
from rx_edge.types import FloatArray

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# else float32 products are computed with 10 bits of mantissa, which parity would take for a fault
NO_TF32 = {"cuda": {"use_tf32": "0"}}
CUDA_GRAPH = {"cuda": {**NO_TF32["cuda"], "enable_cuda_graph": "1"}}
STOP_SPINNING = "session.force_spinning_stop"
_LOG_ERRORS = 3  # onnxruntime's severity: 0 verbose ... 4 fatal


def engine() -> Any:
    """The onnxruntime package.

    Raises:
        MissingExtraError: it is not installed.
    """
    ort: Any = require("onnxruntime", extra="cpu")
    ort.disable_telemetry_events()  # on by default in some builds
    return ort


def unavailable() -> str | None:
    """None, or why ONNX Runtime cannot be used here."""
    try:
        engine()
    except MissingExtraError as error:
        return str(error)
    except (ImportError, OSError) as error:  # a shared library does not load
        return f"onnxruntime is installed but does not load: {error}"
    return None


def devices() -> tuple[str, ...]:
    """What this build can run on here, best first: a CUDA build without a GPU runs on the CPU.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    if PROVIDERS["cuda"] not in engine().get_available_providers():
        return ("cpu",)
    found = driver()
    return ("cpu",) if isinstance(found, str) or not found.gpus else ("cuda", "cpu")


def session(
    path: Path,
    *,
    threads: int,
    device: str,
    yields: bool = False,
    provider_options: Mapping[str, Mapping[str, str]] | None = None,
) -> Any:
    """An `InferenceSession` that runs on `device`.

    Args:
        threads: CPU threads; 0 = one per physical core (ONNX Runtime's own choice).
        device: "cpu" or "cuda".
        yields: whether threads stop to wait in a loop when a run ends. Within a run that loop
            brings them to the next node sooner; after it, it takes the cores from another engine.
        provider_options: per device, what its provider is to be told.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        BackendError: the file does not load, or the device cannot be used by this build.
    """
    if device not in PROVIDERS or threads < 0:
        raise BackendError(
            f"device is {device!r} and threads is {threads}; "
            f"valid devices: {', '.join(PROVIDERS)}, threads >= 0"
        )
    ort = engine()
    provider = PROVIDERS[device]
    if provider not in ort.get_available_providers():
        raise BackendError(
            f"this onnxruntime has no {provider} (it has "
            f"{', '.join(ort.get_available_providers())}); for CUDA: pip uninstall onnxruntime, "
            'then pip install "rx-edge[gpu]"'
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry(STOP_SPINNING, str(int(yields)))
    options.log_severity_level = _LOG_ERRORS
    settings = dict((provider_options or {}).get(device, {}))
    try:
        opened = ort.InferenceSession(str(path), options, providers=[(provider, settings)])
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise BackendError(f"onnxruntime cannot load {str(path)!r}: {error}") from error
    if opened.get_providers()[0] != provider:
        raise BackendError(
            f"onnxruntime was asked for {provider} but uses {opened.get_providers()[0]}; "
            "see its log for the library that did not load"
        )
    opened.disable_fallback()  # nor after a failing run
    return opened


class BoundRuns:
    """Runs of one input and one output through buffers that stay on the device.

    A batch size keeps its two buffers, so that a run is one copy in and one out, and a session that
    was opened with `CUDA_GRAPH` replays the launches of its first runs of that size.
    """

    def __init__(self, session: Any, device: str) -> None:
        self._session, self._device = session, device
        self._names = session.get_inputs()[0].name, session.get_outputs()[0].name
        self._sizes: dict[int, tuple[Any, Any, Any, Any]] = {}

    def run(self, rows: FloatArray, shape: tuple[int, ...]) -> FloatArray:
        """float32 (B, ...) -> float32 `shape`, which begins with B."""
        value, binding, options, result = self._size(rows, shape)
        value.update_inplace(rows)
        self._session.run_with_iobinding(binding, options)
        found: FloatArray = result.numpy().copy()  # on the CPU it is the buffer itself
        return found

    def _size(self, rows: FloatArray, shape: tuple[int, ...]) -> tuple[Any, Any, Any, Any]:
        count = len(rows)
        if count not in self._sizes:
            ort = engine()
            value = ort.OrtValue.ortvalue_from_numpy(rows, self._device, 0)
            result = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, self._device, 0)
            binding, options = self._session.io_binding(), ort.RunOptions()
            binding.bind_ortvalue_input(self._names[0], value)
            binding.bind_ortvalue_output(self._names[1], result)
            options.add_run_config_entry("gpu_graph_id", str(count))  # a graph per shape
            self._sizes[count] = value, binding, options, result
        return self._sizes[count]
