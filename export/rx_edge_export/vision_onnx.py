"""The vision half of a trained model (encoder, pooling, projector) -> one ONNX file.

The exporter traces the module, then the file is read back with the runtime's own backend and
compared with torch: a conversion that drifts is an error, not a warning. Source lines, stack
traces and module paths that torch stores in the graph are removed, because they name the
machine it was made on and make the bytes depend on it.

Does not cover: quantisation, TensorRT, and language models.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from rx_edge.backends import vision_onnx as reader
from rx_edge.backends.base import PAIRING_KEY
from rx_edge.errors import ExportError
from rx_edge_export.onnx_tracing import drop_nan_guards, silence, strip

OPSET = 20  # the first with GELU as one operator
TOLERANCE = 1e-3  # of the largest reference number; fp32 reaches about 1e-6
SINGLE_FILE_LIMIT = 1_800_000_000  # bytes of weights; a protobuf ends at 2 GiB


def write(
    module: torch.nn.Module, out: Path, *, image_size: int, pairing: str = ""
) -> dict[str, Any]:
    """Export `module` and compare the result with it.

    Args:
        module: maps pixel_values float32 (B, 3, S, S) to a soft prompt float32 (B, N, D). It is
            put into eval mode.
        image_size: S in pixels.
        pairing: hash of the model this file belongs to (`rx_edge.bundle.pairing_hash`); "" writes
            none.

    Returns:
        {"bytes", "opset", "soft_tokens": N, "width": D, "max_error"}; `max_error` is relative to
        the largest reference number.

    Raises:
        ExportError: the module cannot be traced, or the file differs from it. `out` is then
            left as it was.
    """
    module.eval()
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=_directory(out)) as scratch:
        part = Path(scratch) / out.name  # the final name: external data is referred to by it
        _trace(module, part, image_size, pairing)
        onnx.checker.check_model(part, full_check=True)
        summary = _compare(module, part, image_size)
        summary["bytes"] = sum(file.stat().st_size for file in part.parent.iterdir())
        # the weights first: a graph without its weights must never be visible
        for file in sorted(part.parent.iterdir(), key=lambda f: f == part):
            _publish(file, out.parent / file.name)
    return {**summary, "opset": OPSET}


def _directory(out: Path) -> Path:
    if not out.parent.is_dir():
        raise ExportError(f"{str(out.parent)!r} is no directory; create it first")
    return out.parent


def _trace(module: torch.nn.Module, path: Path, image_size: int, pairing: str) -> None:
    # a batch of 2: torch treats a batch of 1 as a constant
    example = torch.zeros(2, 3, image_size, image_size)
    try:
        with silence(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                optimize=True,
                opset_version=OPSET,
                input_names=[reader.INPUT],
                output_names=[reader.OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds, none documented
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ExportError(
            f"torch.onnx cannot export {type(module).__name__}: {first_line}"
        ) from error
    assert program is not None  # only with dynamo=False
    drop_nan_guards(program.model)
    strip(program.model)
    if pairing:
        program.model.metadata_props[PAIRING_KEY] = pairing
    weights = program.model.graph.initializers.values()
    size = sum(value.const_value.nbytes for value in weights if value.const_value is not None)
    program.save(path, external_data=size > SINGLE_FILE_LIMIT)


def _compare(module: torch.nn.Module, path: Path, image_size: int) -> dict[str, Any]:
    """Run one and three random images through the file and through torch."""
    random = np.random.default_rng(0)
    worst, tokens, width = 0.0, 0, 0
    with reader.open(path, threads=torch.get_num_threads()) as backend:
        for batch in (1, 3):
            images = random.standard_normal((batch, 3, image_size, image_size), np.float32)
            with torch.no_grad():
                wanted = module(torch.from_numpy(images)).numpy()
            found = backend.encode(images)
            if found.shape != wanted.shape:
                raise ExportError(f"the ONNX file gives {found.shape}, torch {wanted.shape}")
            _, tokens, width = wanted.shape
            worst = max(worst, float(np.abs(found - wanted).max() / np.abs(wanted).max()))
    if not worst < TOLERANCE:  # NaN fails as well
        raise ExportError(
            f"the ONNX file differs from torch by {worst:.1e} of the largest number; "
            f"{TOLERANCE:.0e} is allowed"
        )
    return {"soft_tokens": tokens, "width": width, "max_error": worst}


def _publish(file: Path, out: Path) -> None:
    try:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        file.replace(out)
    except OSError as error:
        raise ExportError(f"{str(out)!r} cannot be written: {error.strerror}") from error
