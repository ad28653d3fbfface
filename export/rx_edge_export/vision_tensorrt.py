"""Proof, at export and without a GPU, that TensorRT takes a vision file.

A bundle ships ONNX and no engine, since an engine fits one GPU and library version. What would
otherwise fail in the hospital fails here: operators that TensorRT does not know, mixed precisions,
and types or shapes other than the reader's.

Does not cover: numbers. Only a GPU can say what an engine computes: `rx-edge verify` there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rx_edge.backends import tensorrt_engine
from rx_edge.backends.tensorrt_engine import Progress
from rx_edge.backends.vision_tensorrt import MAX_BATCH
from rx_edge.errors import BackendError, ExportError, UsageError


def check(
    onnx: Path,
    *,
    compute_capabilities: Sequence[tuple[int, int]] = ((8, 9), (12, 0)),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build the engine for every compute capability and throw it away.

    Returns:
        {"flavour", "version", "engines": {"sm89": {"bytes"}}, "soft_tokens": N, "width": D,
        "profile": smallest, preferred and largest shape of the input}: the same at every run.

    Raises:
        MissingExtraError: TensorRT-RTX is not installed.
        ExportError: TensorRT does not take the file; the message names the nodes.
        UsageError: no compute capability is asked for.
    """
    if not compute_capabilities:
        raise UsageError("no compute capability to check for; name one, such as (8, 9)")
    library = tensorrt_engine.find()
    engines, found = {}, set()
    for capability in compute_capabilities:
        try:
            built = tensorrt_engine.build(
                library,
                onnx,
                max_batch=MAX_BATCH,
                compute_capability=capability,
                progress=progress,
            )
        except BackendError as error:
            raise ExportError(str(error)) from error
        engines["sm{}{}".format(*capability)] = {"bytes": len(built.plan)}
        found.add((built.signature, built.profile))
    ((signature, profile),) = found  # the file decides, not the target
    return {
        "flavour": library.flavour,
        "version": library.version,
        "engines": engines,
        "soft_tokens": signature.tokens,
        "width": signature.width,
        "profile": [list(shape) for shape in profile],
    }
