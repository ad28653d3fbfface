"""config.json -> what a GGUF file of this model must hold: its keys and every one of its tensors.

Two families: Llama (OpenLLaMA, SmolLM2, ...) and GPT-2. Every setting that would change the
arithmetic is either written or refused by name.

Does not cover: reading weights and writing files (`llm_gguf.py`), tokenizers, rope scaling.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rx_edge.errors import ExportError

Layout = Literal["", "rope", "transposed"]


@dataclass(frozen=True)
class Tensor:
    """One tensor of the model.

    Attributes:
        source: name in the safetensors files, e.g. "model.layers.0.self_attn.q_proj.weight".
        target: name in the GGUF, e.g. "blk.0.attn_q.weight".
        shape: in the GGUF (rows, columns), or (length,).
        layout: "rope" = rows are permuted per head; "transposed" = stored as (columns, rows).
        heads: number of heads for "rope".
        wide: True where engines need float32 whatever the file's precision.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    layout: Layout = ""
    heads: int = 0
    wide: bool = False


@dataclass(frozen=True)
class Architecture:
    """A model in the numbers that GGUF needs."""

    name: Literal["llama", "gpt2"]
    vocab: int
    tied: bool  # without output.weight llama.cpp uses token_embd.weight
    tensors: tuple[Tensor, ...]
    numbers: Mapping[str, int | float]  # `gguf.GGUFWriter.add_<key>(value)`

    def add_metadata(self, writer: Any) -> None:
        """Write the architecture's keys to a `gguf.GGUFWriter`."""
        for key, value in self.numbers.items():
            getattr(writer, f"add_{key}")(value)


def read(path: Path) -> Architecture:
    """Read a Hugging Face config.json.

    Raises:
        ExportError: unreadable, another family, or a setting that GGUF cannot carry.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{str(path)!r} cannot be read: {error}") from error
    family = config.get("model_type")
    readers: dict[str, Callable[[dict[str, Any], Path], Architecture]]
    readers = {"llama": _llama, "gpt2": _gpt2}
    if family not in readers:
        raise ExportError(
            f"{str(path)!r}: model_type is {family!r}, but the GGUF writer covers only "
            f"{', '.join(map(repr, readers))}; export this model to ONNX (--llm onnx:fp16)"
        )
    try:
        return readers[family](config, path)
    except KeyError as error:
        raise ExportError(f"{str(path)!r} lacks {error}; save the model again") from error


def _refuse(config: dict[str, Any], path: Path, wanted: dict[str, tuple[Any, ...]]) -> None:
    """Refuse a key whose value is none of those wanted; the first one is its default."""
    for key, values in wanted.items():
        found = config.get(key, values[0])
        if found not in values:
            raise ExportError(
                f"{str(path)!r}: {key} is {found!r}, but the GGUF writer covers only "
                f"{' or '.join(map(repr, values))}"
            )


def _llama(config: dict[str, Any], path: Path) -> Architecture:
    _refuse(
        config,
        path,
        {
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "quantization_config": (None,),
        },
    )
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    d, f = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or d // heads
    vocab, tied = config["vocab_size"], config.get("tie_word_embeddings", False)
    numbers = {
        "vocab_size": vocab,
        "context_length": config["max_position_embeddings"],
        "embedding_length": d,
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": f,
        "head_count": heads,
        "head_count_kv": kv_heads,
        "key_length": head_dim,
        "value_length": head_dim,
        "rope_dimension_count": head_dim,
        "rope_freq_base": _rope_theta(config, path),
        "layer_norm_rms_eps": config["rms_norm_eps"],
    }
    q, kv = heads * head_dim, kv_heads * head_dim
    tensors = [Tensor("model.embed_tokens.weight", "token_embd.weight", (vocab, d))]
    for i in range(config["num_hidden_layers"]):
        layer: tuple[tuple[str, str, tuple[int, ...], int], ...] = (
            ("input_layernorm", "attn_norm", (d,), 0),
            ("self_attn.q_proj", "attn_q", (q, d), heads),
            ("self_attn.k_proj", "attn_k", (kv, d), kv_heads),
            ("self_attn.v_proj", "attn_v", (kv, d), 0),
            ("self_attn.o_proj", "attn_output", (d, q), 0),
            ("post_attention_layernorm", "ffn_norm", (d,), 0),
            ("mlp.gate_proj", "ffn_gate", (f, d), 0),
            ("mlp.up_proj", "ffn_up", (f, d), 0),
            ("mlp.down_proj", "ffn_down", (d, f), 0),
        )
        tensors += [
            Tensor(
                f"model.layers.{i}.{source}.weight",
                f"blk.{i}.{target}.weight",
                shape,
                "rope" if rope_heads else "",
                rope_heads,
            )
            for source, target, shape, rope_heads in layer
        ]
    tensors.append(Tensor("model.norm.weight", "output_norm.weight", (d,)))
    if not tied:
        tensors.append(Tensor("lm_head.weight", "output.weight", (vocab, d)))
    return Architecture("llama", vocab, tied, tuple(tensors), numbers)


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


def _gpt2(config: dict[str, Any], path: Path) -> Architecture:
    _refuse(
        config,
        path,
        {
            # all three are the tanh approximation, the only GELU of llama.cpp's gpt2
            "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True,),
            "quantization_config": (None,),
        },
    )
    d, layers, vocab = config["n_embd"], config["n_layer"], config["vocab_size"]
    f = config.get("n_inner") or 4 * d
    numbers = {
        "vocab_size": vocab,
        "context_length": config["n_positions"],
        "embedding_length": d,
        "block_count": layers,
        "feed_forward_length": f,
        "head_count": config["n_head"],
        "layer_norm_eps": config["layer_norm_epsilon"],
    }
    tensors = [
        Tensor("transformer.wte.weight", "token_embd.weight", (vocab, d)),
        Tensor("transformer.wpe.weight", "position_embd.weight", (config["n_positions"], d),
               wide=True),
    ]  # fmt: skip
    for i in range(layers):
        for source, target, shape in (
            ("ln_1", "attn_norm", (d,)),
            ("attn.c_attn", "attn_qkv", (3 * d, d)),
            ("attn.c_proj", "attn_output", (d, d)),
            ("ln_2", "ffn_norm", (d,)),
            ("mlp.c_fc", "ffn_up", (f, d)),
            ("mlp.c_proj", "ffn_down", (d, f)),
        ):
            where, to = f"transformer.h.{i}.{source}", f"blk.{i}.{target}"
            # Conv1D keeps its weight as (in, out)
            layout: Layout = "transposed" if len(shape) == 2 else ""
            tensors += [
                Tensor(f"{where}.weight", f"{to}.weight", shape, layout),
                Tensor(f"{where}.bias", f"{to}.bias", shape[:1]),
            ]
    for part in ("weight", "bias"):
        tensors.append(Tensor(f"transformer.ln_f.{part}", f"output_norm.{part}", (d,)))
    return Architecture("gpt2", vocab, True, tuple(tensors), numbers)
