"""Llama and GPT-2 directories -> GGUF: same numbers, same bytes, and no silent loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from rx_edge.backends import llm_gguf as reader
from rx_edge.errors import ExportError
from rx_edge_export import gguf_quantize
from rx_edge_export import llm_gguf as writer
from tests.export.gguf_helpers import distance, edit, export, gguf_logits, torch_logits
from tests.factories import tiny_gpt2_dir, tiny_llama_dir


@pytest.mark.parametrize(
    "overrides",
    [
        {"tied": True},
        {"tied": False},
        {"head_dim": 32},  # wider than hidden / heads
        {"num_key_value_heads": 4},
        {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    ],
    ids=str,
)
def test_logits_equal_transformers(tmp_path: Path, overrides: dict[str, Any]) -> None:
    directory = tiny_llama_dir(tmp_path / "hf", **overrides)
    summary = export(directory, tmp_path / "a.gguf")
    assert distance(gguf_logits(tmp_path / "a.gguf"), torch_logits(directory)) < 1e-3
    assert summary["tied_embeddings"] == overrides.get("tied", True)
    assert summary["tensor_types"] == gguf_quantize.tensor_types(tmp_path / "a.gguf")
    assert summary["tensor_types"] == {"F32": 20 + (not summary["tied_embeddings"])}
    assert summary["bytes"] == (tmp_path / "a.gguf").stat().st_size


def test_unpermuted_heads_would_be_noticed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_permuted", lambda weight, heads: weight)
    export(llama, tmp_path / "a.gguf")
    assert distance(gguf_logits(tmp_path / "a.gguf"), torch_logits(llama)) > 0.1


def test_f16_and_bfloat16_source(copy: Path, tmp_path: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, copy / "model.safetensors")
    summary = export(copy, tmp_path / "a.gguf", "f16")
    assert summary["tensor_types"] == {"F16": 15, "F32": 5}
    # bfloat16 numbers of this size are exact in float16; llama.cpp rounds activations as well
    assert distance(gguf_logits(tmp_path / "a.gguf"), torch_logits(copy)) < 0.1


def test_sharded_weights_give_the_same_file(llama: Path, copy: Path, tmp_path: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for i, part in enumerate((names[:7], names[7:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({k: weights[k] for k in part}, copy / file)
        index.update(dict.fromkeys(part, file))
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), "utf-8")
    export(llama, tmp_path / "a.gguf")
    export(copy, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_same_directory_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(llama, tmp_path / f"{name}.gguf", "f16")
        gguf_quantize.quantize(
            tmp_path / f"{name}.gguf", tmp_path / f"{name}.q8", file_type="Q8_0", threads=1
        )
    for suffix in ("gguf", "q8"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "a.q8", "b.gguf", "b.q8"]


def test_factory_is_deterministic(llama: Path, tmp_path: Path) -> None:
    again = tiny_llama_dir(tmp_path / "again")
    assert {p.name: p.read_bytes() for p in llama.iterdir()} == {
        p.name: p.read_bytes() for p in again.iterdir()
    }


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "qwen2", "model_type is 'qwen2'"),
        ("attention_bias", True, "attention_bias is True"),
        ("mlp_bias", True, "mlp_bias is True"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope scaling .*linear"),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}, "rope scaling .*llama3"),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, "rope scaling .*partial"),
        ("rope_theta", 1e4, "rope_theta is 10000.0, but rope_parameters says 5000.0"),
        ("vocab_size", 300, r"has id 3\d\d, but config.json's vocab_size is 300"),
        ("tie_word_embeddings", False, "lack 1 tensor.*lm_head.weight"),
        ("num_hidden_layers", 1, r"also hold 9 tensor.*layers\.1"),
        ("intermediate_size", 64, r"has shape \(128, 64\); config.json implies \(64, 64\)"),
    ],
)
def test_config_is_refused(copy: Path, tmp_path: Path, key: str, value: Any, message: str) -> None:
    edit(copy / "config.json", lambda config: config.update({key: value}))
    out = tmp_path / "a.gguf"
    out.write_bytes(b"older")
    with pytest.raises(ExportError, match=message):
        export(copy, out)
    assert out.read_bytes() == b"older"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "hf"]


def test_old_rope_theta_key_means_the_same(llama: Path, copy: Path, tmp_path: Path) -> None:
    def downgrade(config: dict[str, Any]) -> None:
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config["rope_scaling"] = None

    edit(copy / "config.json", downgrade)
    export(llama, tmp_path / "a.gguf")
    export(copy, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "f32"), (1e6, "f16")])
def test_numbers_that_cannot_be_stored_are_refused(
    copy: Path, tmp_path: Path, value: float, dtype: str
) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(ExportError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        export(copy, tmp_path / "a.gguf", dtype)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_missing_files_are_named(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ExportError, match=name.replace(".", r"\.")):
        export(copy, tmp_path / "a.gguf")


def test_missing_weights_and_directory(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be written"):
        export(copy, tmp_path / "nowhere" / "a.gguf")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"model\.safetensors"):
        export(copy, tmp_path / "a.gguf")


def test_metadata(copy: Path, tmp_path: Path) -> None:
    (copy / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    edit(copy / "config.json", lambda config: config.update(unknown_to_us=1))
    export(copy, tmp_path / "a.gguf")
    found = gguf.GGUFReader(tmp_path / "a.gguf")
    value = {k: f.contents() for k, f in found.fields.items() if not k.startswith("GGUF.")}
    assert value["general.architecture"] == "llama"
    assert value["general.name"] == "tiny"
    assert value["llama.attention.head_count_kv"] == 2
    assert value["llama.rope.freq_base"] == 5000.0
    assert value["tokenizer.chat_template"] == "{{ messages }}"
    assert value["tokenizer.ggml.add_bos_token"] is False
    assert value["tokenizer.ggml.tokens"][value["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert not any("time" in key or "date" in key for key in value)


def test_ids_without_a_token_are_padded(tmp_path: Path) -> None:
    directory = tiny_llama_dir(tmp_path / "hf", vocab_size=400)
    export(directory, tmp_path / "a.gguf")
    with reader.open(tmp_path / "a.gguf", n_ctx=64, threads=1, exact=True) as backend:
        assert backend.n_vocab == 400
    assert distance(gguf_logits(tmp_path / "a.gguf"), torch_logits(directory)) < 1e-3


@pytest.mark.parametrize("n_inner", [None, 96])
def test_gpt2_logits_equal_transformers(tmp_path: Path, n_inner: int | None) -> None:
    directory = tiny_gpt2_dir(tmp_path / "hf", n_inner=n_inner)
    summary = export(directory, tmp_path / "a.gguf")
    assert summary["tensor_types"] == {"F32": 28}
    wanted = torch_logits(directory)
    # llama.cpp looks GELU up in a float16 table
    assert distance(gguf_logits(tmp_path / "a.gguf"), wanted) < 1e-3 * np.abs(wanted).max()


def test_gpt2_embeddings_get_their_positions(tmp_path: Path) -> None:
    """A soft prompt is not looked up, but must get position embeddings all the same."""
    directory = tiny_gpt2_dir(tmp_path / "hf")
    export(directory, tmp_path / "a.gguf")
    ids = np.arange(3, 60, dtype=np.int32)
    table = load_file(directory / "model.safetensors")["transformer.wte.weight"].numpy()
    with reader.open(tmp_path / "a.gguf", n_ctx=128, threads=1, exact=True) as backend:
        found = backend.prefill([ids[:5], table[ids[5:40]], ids[40:]])
        assert distance(found, torch_logits(directory)[-1]) < 1e-2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "relu"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
    ],
)
def test_gpt2_config_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    directory = tiny_gpt2_dir(tmp_path / "hf")
    edit(directory / "config.json", lambda config: config.update({key: value}))
    with pytest.raises(ExportError, match=f"{key} is {value!r}"):
        export(directory, tmp_path / "a.gguf")
