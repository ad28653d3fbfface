"""The vision half (encoder, pooling, projector) as one ONNX file, through ONNX Runtime.

ONNX Runtime answers a provider that does not load by quietly using the CPU; here the provider
that is in use after loading is compared with the one asked for, and a difference is an error.

Does not cover: TensorRT, building engines, and preparing pixels (`rx_edge.image`).
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from rx_edge.backends.base import PAIRING_KEY
from rx_edge.errors import BackendError, MissingExtraError
from rx_edge.optional import require
from rx_edge.types import FloatArray

REQUIRES = ("onnxruntime",)

INPUT, OUTPUT = "pixel_values", "soft_prompt"
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_LOG_ERRORS = 3  # onnxruntime's severity: 0 verbose ... 4 fatal


def is_available() -> str | None:
    """None, or why this backend cannot be used here."""
    try:
        _engine()
    except MissingExtraError as error:
        return str(error)
    except (ImportError, OSError) as error:  # a shared library does not load
        return f"onnxruntime is installed but does not load: {error}"
    return None


def open(path: Path, *, threads: int, device: str = "cpu") -> OnnxVision:
    """Load an ONNX file.

    Args:
        threads: CPU threads; 0 = one per physical core (ONNX Runtime's own choice).
        device: "cpu" or "cuda".

    Raises:
        MissingExtraError: onnxruntime is not installed.
        BackendError: no such file, not a graph of the documented signature, or the device
            cannot be used by this build of onnxruntime.
    """
    if device not in _PROVIDERS or threads < 0:
        raise BackendError(
            f"device is {device!r} and threads is {threads}; "
            f"valid devices: {', '.join(_PROVIDERS)}, threads >= 0"
        )
    if not path.is_file():
        raise BackendError(f"vision model {str(path)!r} does not exist; export it again")
    ort = _engine()
    provider = _PROVIDERS[device]
    if provider not in ort.get_available_providers():
        raise BackendError(
            f"this onnxruntime has no {provider} (it has "
            f"{', '.join(ort.get_available_providers())}); for CUDA: pip uninstall onnxruntime, "
            'then pip install "rx-edge[gpu]"'
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _LOG_ERRORS
    try:
        session = ort.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise BackendError(f"onnxruntime cannot load {str(path)!r}: {error}") from error
    if session.get_providers()[0] != provider:
        raise BackendError(
            f"onnxruntime was asked for {provider} but uses {session.get_providers()[0]}; "
            "see its log for the library that did not load"
        )
    session.disable_fallback()  # nor after a failing run
    return OnnxVision(session, path, device)


class OnnxVision:
    """A `VisionBackend` (see `base.py` for the contract)."""

    def __init__(self, session: Any, path: Path, device: str) -> None:
        _check_signature(session, path)
        self._session: Any = session
        self._size = int(session.get_inputs()[0].shape[2])
        self.device = device
        self.pairing = str(session.get_modelmeta().custom_metadata_map.get(PAIRING_KEY, ""))

    def encode(self, images: FloatArray) -> FloatArray:
        """float32 (B, 3, S, S) -> float32 (B, N, D)."""
        if self._session is None:
            raise BackendError("this vision model is closed; open the file again")
        wanted = (3, self._size, self._size)
        if images.ndim != 4 or images.shape[1:] != wanted or len(images) == 0:
            raise BackendError(f"images have shape {images.shape}; (B, *{wanted}) is expected")
        if images.dtype != np.float32:
            raise BackendError(f"images are {images.dtype}; float32 is expected")
        if not np.isfinite(images).all():
            raise BackendError("the image tensor holds NaN or infinite numbers")
        try:
            soft_prompt: FloatArray = self._session.run([OUTPUT], {INPUT: images})[0]
        except Exception as error:  # onnxruntime's exceptions share no other base
            raise BackendError(f"onnxruntime failed on {images.shape}: {error}") from error
        if not np.isfinite(soft_prompt).all():
            raise BackendError(
                "the vision model returned NaN or infinite numbers; the file is broken"
            )
        return soft_prompt

    def close(self) -> None:
        """Free the session; idempotent."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _engine() -> Any:
    ort: Any = require("onnxruntime", extra="cpu")
    ort.disable_telemetry_events()  # on by default in some builds
    return ort


def _check_signature(session: Any, path: Path) -> None:
    """Refuse any graph but pixel_values (batch, 3, S, S) -> soft_prompt (batch, N, D)."""
    inputs, outputs = (
        [(node.name, node.type, list(node.shape)) for node in nodes]
        for nodes in (session.get_inputs(), session.get_outputs())
    )
    names = ([i[0] for i in inputs], [o[0] for o in outputs])
    if names == ([INPUT], [OUTPUT]):
        (_, type_in, shape_in), (_, type_out, shape_out) = inputs[0], outputs[0]
        fixed = (
            type_in == type_out == "tensor(float)"
            and len(shape_in) == 4
            and len(shape_out) == 3
            and shape_in[1] == 3
            and shape_in[2] == shape_in[3]
            and all(isinstance(n, int) for n in (*shape_in[1:], *shape_out[1:]))
        )
        # an int here would mean that only one batch size can be run
        if fixed and not isinstance(shape_in[0], int) and not isinstance(shape_out[0], int):
            return
    raise BackendError(
        f"{str(path)!r} maps {inputs} to {outputs}; expected float32 "
        f"{INPUT} (batch, 3, S, S) to float32 {OUTPUT} (batch, N, D): export it again"
    )
