"""What can be exported: names like "onnx:int8" -> format, precision and file in the bundle.

The one table of formats. `export/README.md` shows it, and a test compares the two.

Does not cover: how each is written (one module per format) and how far it may be from the
trained model (`tolerances.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from rx_edge.errors import UsageError


@dataclass(frozen=True)
class Target:
    """One artefact to make.

    Attributes:
        name: "onnx:int8".
        format: the backend that reads it, e.g. "vision_onnx".
        precision: "int8".
        file: its name in the bundle. Two targets may share one: TensorRT builds its engines
            on the hospital's machine from an ONNX file that other runtimes read as well.
    """

    name: str
    format: str
    precision: str
    file: str


def _targets(*rows: tuple[str, str, str]) -> dict[str, Target]:
    return {name: Target(name, format, name.partition(":")[2], file) for name, format, file in rows}


VISION = _targets(
    ("onnx:fp32", "vision_onnx", "vision.onnx"),
    ("onnx:fp16", "vision_onnx", "vision.fp16.onnx"),
    ("onnx:int8", "vision_onnx", "vision.int8.onnx"),
    ("tensorrt:fp16", "vision_tensorrt", "vision.fp16.onnx"),
    ("tensorrt:int8", "vision_tensorrt", "vision.int8-symmetric.onnx"),
    ("tensorrt:fp8", "vision_tensorrt", "vision.fp8.onnx"),
)
LANGUAGE = _targets(
    ("gguf:F32", "llm_gguf", "llm.F32.gguf"),
    ("gguf:F16", "llm_gguf", "llm.F16.gguf"),
    ("gguf:Q8_0", "llm_gguf", "llm.Q8_0.gguf"),
    ("gguf:Q6_K", "llm_gguf", "llm.Q6_K.gguf"),
    ("gguf:Q5_K_M", "llm_gguf", "llm.Q5_K_M.gguf"),
    ("gguf:Q4_K_M", "llm_gguf", "llm.Q4_K_M.gguf"),
    ("gguf:IQ4_NL", "llm_gguf", "llm.IQ4_NL.gguf"),
    ("onnx:fp32", "llm_onnx", "llm.onnx"),
    ("onnx:fp16", "llm_onnx", "llm.fp16.onnx"),
    ("onnx:int8", "llm_onnx", "llm.int8.onnx"),
    ("onnx:int4", "llm_onnx", "llm.int4.onnx"),
)


def chosen(names: Sequence[str], table: dict[str, Target], option: str) -> tuple[Target, ...]:
    """The targets of those names, in order, each once.

    Args:
        option: what to name in an error, e.g. "--vision".

    Raises:
        UsageError: none, one twice, or an unknown one; the nearest valid name is given.
    """
    if not names:
        raise UsageError(f"{option} is empty; valid: {', '.join(table)}")
    for name in names:
        if name not in table:
            near = difflib.get_close_matches(name, table, n=1, cutoff=0.0)
            raise UsageError(
                f"{option}: {name!r} is not known; did you mean {near[0]!r}? "
                f"valid: {', '.join(table)}"
            )
        if names.count(name) > 1:
            raise UsageError(f"{option}: {name!r} is named twice")
    return tuple(table[name] for name in names)
