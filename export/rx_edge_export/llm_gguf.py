"""A Hugging Face directory (Llama or GPT-2 family) -> a GGUF file of floats.

Only the PyPI package `gguf` writes; llama.cpp's converter script is not needed. Every tensor is
accounted for, because a converter that skips what it does not know produces a file that loads
and is quietly wrong. The same directory gives the same bytes every time.

Memory stays near one tensor: shapes are read first, then tensors are streamed one by one.

Does not cover: quantisation (`gguf_quantize.py`), and checking the result against torch.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from safetensors import SafetensorError, safe_open

from rx_edge.atomic import replacing
from rx_edge.backends.base import PAIRING_KEY
from rx_edge.errors import ExportError
from rx_edge.types import FloatArray
from rx_edge_export import gguf_architectures
from rx_edge_export.gguf_architectures import Architecture, Tensor
from rx_edge_export.gguf_tokenizer import add_tokenizer

_DTYPES: dict[str, tuple[type[np.floating[Any]], gguf.LlamaFileType]] = {
    "f32": (np.float32, gguf.LlamaFileType.ALL_F32),
    "f16": (np.float16, gguf.LlamaFileType.MOSTLY_F16),
}


def write(
    model_dir: Path, out: Path, *, dtype: Literal["f32", "f16"], name: str, pairing: str = ""
) -> dict[str, Any]:
    """Write `model_dir` (config.json, *.safetensors, tokenizer files) as a GGUF file.

    Norm weights stay float32 in an "f16" file, as llama.cpp expects.

    Args:
        name: shown by engines as the model's name.
        pairing: hash of the model this file belongs to (`rx_edge.bundle.pairing_hash`); it stays
            in the file when that is quantised. "" writes none.

    Returns:
        {"bytes", "tensor_types": {type: count}, "tokenizer_pre", "tied_embeddings"}.

    Raises:
        ExportError: a file is missing, or something in it cannot be written faithfully; the
            message names the key or tensor. `out` is then left as it was.
    """
    if dtype not in _DTYPES:
        raise ExportError(f"dtype is {dtype!r}; valid: {', '.join(map(repr, _DTYPES))}")
    architecture = gguf_architectures.read(model_dir / "config.json")
    where = locate_tensors(model_dir)
    _check_names(architecture, where)
    with replacing(out) as part:
        writer = gguf.GGUFWriter(part, architecture.name)
        try:
            writer.add_name(name)
            writer.add_file_type(_DTYPES[dtype][1])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            architecture.add_metadata(writer)
            if pairing:
                writer.add_string(PAIRING_KEY, pairing)
            pre = add_tokenizer(writer, model_dir, architecture.vocab)
            types = _write_tensors(writer, architecture.tensors, where, _DTYPES[dtype][0])
        finally:
            writer.close()
    return {
        "bytes": out.stat().st_size,
        "tensor_types": types,
        "tokenizer_pre": pre,
        "tied_embeddings": architecture.tied,
    }


def locate_tensors(model_dir: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    index = model_dir / "model.safetensors.index.json"
    files = [model_dir / "model.safetensors"]
    if index.is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [model_dir / name for name in sorted(set(shards))]
    where: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                where.update(dict.fromkeys(tensors.keys(), file))
        except (OSError, SafetensorError) as error:
            raise ExportError(f"weights {str(file)!r} cannot be read: {error}") from error
    # buffers of old checkpoints: they follow from rope_theta, or are the causal mask
    buffers = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
    return {k: v for k, v in where.items() if not k.endswith(buffers)}


def _check_names(architecture: Architecture, where: dict[str, Path]) -> None:
    expected = {t.source for t in architecture.tensors}
    found = set(where)
    if architecture.tied:  # some writers store the shared matrix twice
        found -= {"lm_head.weight"}
    for problem, names in (("lack", expected - found), ("also hold", found - expected)):
        if names:
            raise ExportError(
                f"the weights {problem} {len(names)} tensor(s) that a {architecture.name} model of "
                f"this config.json {'needs' if problem == 'lack' else 'does not have'}, "
                f"e.g. {min(names)!r}"
            )


def _write_tensors(
    writer: Any, tensors: tuple[Tensor, ...], where: dict[str, Path], dtype: type[np.floating[Any]]
) -> dict[str, int]:
    """Announce all tensors, then stream them in the same order."""
    stored = [np.dtype(np.float32 if t.wide or len(t.shape) == 1 else dtype) for t in tensors]
    for tensor, kind in zip(tensors, stored, strict=True):
        size = int(np.prod(tensor.shape)) * kind.itemsize
        writer.add_tensor_info(tensor.target, tensor.shape, kind, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in zip(tensors, stored, strict=True):
        writer.write_tensor_data(_load(tensor, where[tensor.source], kind))
    return dict(
        sorted(Counter({"float16": "F16", "float32": "F32"}[k.name] for k in stored).items())
    )


def _load(tensor: Tensor, file: Path, kind: np.dtype[Any]) -> FloatArray:
    with safe_open(file, "pt") as tensors:  # "pt" because numpy has no bfloat16
        array = tensors.get_tensor(tensor.source).float().numpy()
    if tensor.layout == "transposed":
        array = array.T
    if array.shape != tensor.shape:
        raise ExportError(
            f"{tensor.source} has shape {array.shape}; config.json implies {tensor.shape}"
        )
    if tensor.layout == "rope":
        array = _permuted(array, tensor.heads)
    with np.errstate(over="ignore"):  # reported just below
        array = np.ascontiguousarray(array, dtype=kind)
    if not np.isfinite(array).all():
        raise ExportError(f"{tensor.source} holds NaN, infinity or numbers beyond {kind}")
    return array


def _permuted(weight: FloatArray, heads: int) -> FloatArray:
    """Reorder the output rows of q/k: (heads * head_dim, D) -> the same shape.

    Rotary embedding pairs row i with i + head_dim/2 in transformers, but with its neighbour
    (2i, 2i + 1) in llama.cpp's `llama` architecture.
    """
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)
