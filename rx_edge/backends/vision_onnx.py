"""The vision half (encoder, pooling, projector) as one ONNX file, through ONNX Runtime.

Does not cover: opening the engine (`onnx_engine.py`), TensorRT, preparing pixels
(`rx_edge.image`).
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from rx_edge.backends import onnx_engine
from rx_edge.backends.base import PAIRING_KEY
from rx_edge.closing import Closing
from rx_edge.errors import BackendError
from rx_edge.types import FloatArray

REQUIRES = ("onnxruntime",)

INPUT, OUTPUT = "pixel_values", "soft_prompt"


def is_available() -> str | None:
    """None, or why this backend cannot be used here."""
    return onnx_engine.unavailable()


def devices() -> tuple[str, ...]:
    """What this build of ONNX Runtime can run on here, best first.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    return onnx_engine.devices()


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
    if not path.is_file():
        raise BackendError(f"vision model {str(path)!r} does not exist; export it again")
    # llama.cpp's prefill follows at once
    settings: dict[str, Any] = {"threads": threads, "device": device, "yields": True}
    if device != "cpu":
        with suppress(BackendError):  # the file has nodes that cannot be in a CUDA graph
            session = onnx_engine.session(path, **settings, provider_options=onnx_engine.CUDA_GRAPH)
            captured = OnnxVision(session, path, device)
            captured.encode(np.zeros((1, *captured.shape), np.float32))
            return captured
    session = onnx_engine.session(path, **settings, provider_options=onnx_engine.NO_TF32)
    return OnnxVision(session, path, device)


class OnnxVision(Closing):
    """A `VisionBackend` (see `base.py` for the contract).

    Attributes:
        shape: of one image, (3, S, S).
    """

    def __init__(self, session: Any, path: Path, device: str) -> None:
        _check_signature(session, path)
        self._session: Any = session
        size = int(session.get_inputs()[0].shape[2])
        self.shape = (3, size, size)
        self._soft = tuple(session.get_outputs()[0].shape[1:])
        self._bound = onnx_engine.BoundRuns(session, device) if device != "cpu" else None
        self.device = device
        self.pairing = str(session.get_modelmeta().custom_metadata_map.get(PAIRING_KEY, ""))

    def encode(self, images: FloatArray) -> FloatArray:
        """float32 (B, 3, S, S) -> float32 (B, N, D)."""
        if self._session is None:
            raise BackendError("this vision model is closed; open the file again")
        if images.ndim != 4 or images.shape[1:] != self.shape or len(images) == 0:
            raise BackendError(f"images have shape {images.shape}; (B, *{self.shape}) is expected")
        if images.dtype != np.float32:
            raise BackendError(f"images are {images.dtype}; float32 is expected")
        if not np.isfinite(images).all():
            raise BackendError("the image tensor holds NaN or infinite numbers")
        try:
            soft_prompt = self._run(images)
        except Exception as error:  # onnxruntime's exceptions share no other base
            raise BackendError(f"onnxruntime failed on {images.shape}: {error}") from error
        if not np.isfinite(soft_prompt).all():
            raise BackendError(
                "the vision model returned NaN or infinite numbers; the file is broken"
            )
        return soft_prompt

    def close(self) -> None:
        """Free the session; idempotent."""
        self._session = self._bound = None

    def _run(self, images: FloatArray) -> FloatArray:
        if self._bound:
            return self._bound.run(images, (len(images), *self._soft))
        soft_prompt: FloatArray = self._session.run([OUTPUT], {INPUT: images})[0]
        return soft_prompt


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
