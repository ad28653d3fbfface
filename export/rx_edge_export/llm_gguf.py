"""A Hugging Face Llama directory -> a GGUF file, and a GGUF file -> a quantised one.

Only the PyPI package `gguf` writes; llama.cpp's converter script is not needed. Every key of
config.json that would change the arithmetic is either written or refused, and every tensor is
accounted for, because a converter that skips what it does not know produces a file that loads
and is quietly wrong. The same directory gives the same bytes every time.

Memory stays near one tensor: shapes are read first, then tensors are streamed one by one.

Does not cover: architectures other than Llama, rope scaling, biases, SentencePiece
tokenizers (all refused), importance matrices, and checking the result against torch.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from safetensors import SafetensorError, safe_open

from rx_edge.backends.base import PAIRING_KEY
from rx_edge.backends.llm_gguf import engine, last_errors
from rx_edge.errors import ExportError
from rx_edge.types import FloatArray
from rx_edge_export.atomic import replacing
from rx_edge_export.gguf_tokenizer import add_tokenizer

QUANTISED = ("Q8_0",)  # file types that `quantize` makes
_DTYPES: dict[str, tuple[type[np.floating[Any]], gguf.LlamaFileType]] = {
    "f32": (np.float32, gguf.LlamaFileType.ALL_F32),
    "f16": (np.float16, gguf.LlamaFileType.MOSTLY_F16),
}


@dataclass(frozen=True)
class _Llama:
    """What config.json says, in the numbers that GGUF needs."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    norm_epsilon: float
    rope_theta: float
    tied: bool


@dataclass(frozen=True)
class _Tensor:
    source: str  # name in the safetensors file
    target: str  # name in the GGUF
    shape: tuple[int, ...]
    rope_heads: int = 0  # > 0: rows are permuted, see `_permuted`


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
    llama = _read_config(model_dir / "config.json")
    where = _locate_tensors(model_dir)
    tensors = list(_expected_tensors(llama))
    _check_names(tensors, where)
    with replacing(out) as part:
        writer = gguf.GGUFWriter(part, "llama")
        try:
            _add_metadata(writer, llama, dtype, name)
            if pairing:
                writer.add_string(PAIRING_KEY, pairing)
            pre = add_tokenizer(writer, model_dir, llama.vocab)
            types = _write_tensors(writer, tensors, where, _DTYPES[dtype][0])
        finally:
            writer.close()
    return {
        "bytes": out.stat().st_size,
        "tensor_types": types,
        "tokenizer_pre": pre,
        "tied_embeddings": llama.tied,
    }


def quantize(src: Path, out: Path, *, file_type: str, threads: int) -> dict[str, Any]:
    """Quantise a float GGUF with llama.cpp.

    The histogram is read from the result: rows whose length does not fit a block are stored
    in another type without a warning.

    Args:
        file_type: one of `QUANTISED`.
        threads: CPU threads; 0 = all.

    Returns:
        {"bytes", "tensor_types": {type: count}}.

    Raises:
        ExportError: unknown file type, or llama.cpp refused; its reason is in the message.
    """
    if file_type not in QUANTISED:
        raise ExportError(f"file_type is {file_type!r}; valid: {', '.join(map(repr, QUANTISED))}")
    if not src.is_file():
        raise ExportError(f"{str(src)!r} does not exist; write the float GGUF first")
    api = engine()
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    params.nthread = threads
    last_errors()  # forget older ones
    with replacing(out) as part:
        code = api.llama_model_quantize(os.fsencode(src), os.fsencode(part), ctypes.byref(params))
        if code != 0:
            raise ExportError(
                f"llama.cpp could not quantise {str(src)!r} to {file_type}: "
                f"{last_errors() or f'code {code}'}"
            )
    return {"bytes": out.stat().st_size, "tensor_types": tensor_types(out)}


def tensor_types(path: Path) -> dict[str, int]:
    """How many tensors of a GGUF file have which type, e.g. {"F32": 5, "Q8_0": 15}."""
    counts = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors)
    return dict(sorted(counts.items()))


def _read_config(path: Path) -> _Llama:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{str(path)!r} cannot be read: {error}") from error
    for key, wanted in (
        ("model_type", "llama"),
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("quantization_config", None),
    ):
        found = config.get(key, wanted)
        if found != wanted:
            raise ExportError(
                f"{str(path)!r}: {key} is {found!r}, but the GGUF writer covers only {wanted!r}"
            )
    try:
        heads = config["num_attention_heads"]
        return _Llama(
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            ffn=config["intermediate_size"],
            vocab=config["vocab_size"],
            context=config["max_position_embeddings"],
            norm_epsilon=config["rms_norm_eps"],
            rope_theta=_rope_theta(config, path),
            tied=config.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ExportError(f"{str(path)!r} lacks {error}; save the model again") from error


def _rope_theta(config: dict[str, Any], path: Path) -> float:
    """transformers 5 writes `rope_parameters`, 4 wrote `rope_theta` and `rope_scaling`."""
    rope = dict(config.get("rope_parameters") or {})
    old = config.get("rope_theta")
    theta = rope.pop("rope_theta", old)
    kind = rope.pop("rope_type", "default")
    scaling = config.get("rope_scaling")
    if kind != "default" or rope or scaling:
        found = scaling or {"rope_type": kind, **rope}
        raise ExportError(
            f"{str(path)!r}: rope scaling {found} is not covered; only rope_type 'default' is"
        )
    if old is not None and old != theta:
        raise ExportError(
            f"{str(path)!r}: rope_theta is {old}, but rope_parameters says {theta}; keep one"
        )
    return 10000.0 if theta is None else float(theta)  # the default of every Llama config


def _locate_tensors(model_dir: Path) -> dict[str, Path]:
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
    # buffers of old checkpoints; they follow from rope_theta
    return {k: v for k, v in where.items() if not k.endswith("rotary_emb.inv_freq")}


def _expected_tensors(llama: _Llama) -> Iterator[_Tensor]:
    d, f = llama.width, llama.ffn
    q, kv = llama.heads * llama.head_dim, llama.kv_heads * llama.head_dim
    layer: tuple[tuple[str, str, tuple[int, ...], int], ...] = (
        ("input_layernorm", "attn_norm", (d,), 0),
        ("self_attn.q_proj", "attn_q", (q, d), llama.heads),
        ("self_attn.k_proj", "attn_k", (kv, d), llama.kv_heads),
        ("self_attn.v_proj", "attn_v", (kv, d), 0),
        ("self_attn.o_proj", "attn_output", (d, q), 0),
        ("post_attention_layernorm", "ffn_norm", (d,), 0),
        ("mlp.gate_proj", "ffn_gate", (f, d), 0),
        ("mlp.up_proj", "ffn_up", (f, d), 0),
        ("mlp.down_proj", "ffn_down", (d, f), 0),
    )
    yield _Tensor("model.embed_tokens.weight", "token_embd.weight", (llama.vocab, d))
    for i in range(llama.layers):
        for source, target, shape, heads in layer:
            yield _Tensor(
                f"model.layers.{i}.{source}.weight", f"blk.{i}.{target}.weight", shape, heads
            )
    yield _Tensor("model.norm.weight", "output_norm.weight", (d,))
    if not llama.tied:  # without output.weight llama.cpp uses token_embd.weight
        yield _Tensor("lm_head.weight", "output.weight", (llama.vocab, d))


def _check_names(tensors: list[_Tensor], where: dict[str, Path]) -> None:
    expected = {t.source for t in tensors}
    for problem, names in (("lack", expected - set(where)), ("also hold", set(where) - expected)):
        if names:
            raise ExportError(
                f"the weights {problem} {len(names)} tensor(s) that a Llama of this config.json "
                f"{'needs' if problem == 'lack' else 'does not have'}, e.g. {min(names)!r}"
            )


def _add_metadata(writer: Any, llama: _Llama, dtype: str, name: str) -> None:
    writer.add_name(name)
    writer.add_file_type(_DTYPES[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(llama.vocab)
    writer.add_context_length(llama.context)
    writer.add_embedding_length(llama.width)
    writer.add_block_count(llama.layers)
    writer.add_feed_forward_length(llama.ffn)
    writer.add_head_count(llama.heads)
    writer.add_head_count_kv(llama.kv_heads)
    writer.add_key_length(llama.head_dim)
    writer.add_value_length(llama.head_dim)
    writer.add_rope_dimension_count(llama.head_dim)
    writer.add_rope_freq_base(llama.rope_theta)
    writer.add_layer_norm_rms_eps(llama.norm_epsilon)


def _write_tensors(
    writer: Any, tensors: list[_Tensor], where: dict[str, Path], dtype: type[np.floating[Any]]
) -> dict[str, int]:
    """Announce all tensors, then stream them in the same order."""
    stored = [np.dtype(dtype if len(t.shape) == 2 else np.float32) for t in tensors]
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


def _load(tensor: _Tensor, file: Path, kind: np.dtype[Any]) -> FloatArray:
    with safe_open(file, "pt") as tensors:  # "pt" because numpy has no bfloat16
        array = tensors.get_tensor(tensor.source).float().numpy()
    if array.shape != tensor.shape:
        raise ExportError(
            f"{tensor.source} has shape {array.shape}; config.json implies {tensor.shape}"
        )
    if tensor.rope_heads:
        array = _permuted(array, tensor.rope_heads)
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
