"""Llama directory -> GGUF: same numbers, same bytes, and no silent loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers

from rx_edge.backends import llm_gguf as reader
from rx_edge.errors import ExportError
from rx_edge_export import gguf_tokenizer
from rx_edge_export import llm_gguf as writer
from tests.factories import tiny_llama_dir

IDS = np.arange(3, 60, dtype=np.int32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_dir(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A copy of the model directory that a test may damage."""
    target = tmp_path / "hf"
    target.mkdir()
    for file in llama.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text("utf-8"))
    change(data)
    path.write_text(json.dumps(data), "utf-8")


def export(directory: Path, out: Path, dtype: Any = "f32") -> dict[str, Any]:
    return writer.write(directory, out, dtype=dtype, name="tiny")


def gguf_logits(path: Path) -> Any:
    with reader.open(path, n_ctx=128, threads=1, exact=True) as backend:
        return backend.step(IDS)


def torch_logits(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()[None]).logits[0].numpy()


def distance(a: Any, b: Any) -> float:
    return float(np.abs(a - b).max())


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
    assert summary["tensor_types"] == writer.tensor_types(tmp_path / "a.gguf")
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
        writer.quantize(
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


def test_q8_0_is_close_and_reports_real_types(llama: Path, tmp_path: Path) -> None:
    export(llama, tmp_path / "a.gguf")
    summary = writer.quantize(tmp_path / "a.gguf", tmp_path / "q.gguf", file_type="Q8_0", threads=1)
    assert summary["tensor_types"] == {"F32": 5, "Q8_0": 15}
    assert summary["bytes"] < (tmp_path / "a.gguf").stat().st_size / 2
    wanted, found = torch_logits(llama), gguf_logits(tmp_path / "q.gguf")
    assert 1e-3 < np.abs(found - wanted).mean() < 0.1 * wanted.std()


def test_rows_that_fit_no_block_are_visible(tmp_path: Path) -> None:
    directory = tiny_llama_dir(tmp_path / "hf", intermediate_size=72)  # not a multiple of 32
    export(directory, tmp_path / "a.gguf")
    summary = writer.quantize(tmp_path / "a.gguf", tmp_path / "q.gguf", file_type="Q8_0", threads=1)
    assert summary["tensor_types"] == {"F16": 2, "F32": 5, "Q8_0": 13}


def test_quantize_reports_llama_cpps_reason(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not exist"):
        writer.quantize(tmp_path / "a", tmp_path / "q", file_type="Q8_0", threads=1)
    (tmp_path / "a").write_bytes(b"GGUF but not really")
    with pytest.raises(ExportError, match="file_type is 'Q4_K_M'; valid: 'Q8_0'"):
        writer.quantize(tmp_path / "a", tmp_path / "q", file_type="Q4_K_M", threads=1)
    with pytest.raises(ExportError, match=r"could not quantise .* to Q8_0: \w+"):
        writer.quantize(tmp_path / "a", tmp_path / "q", file_type="Q8_0", threads=1)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


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


def byte_level(regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def split(numbers: str) -> Any:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers
    ) + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


PRE_TOKENIZERS = {
    "gpt-2": byte_level(True),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level(True)]),
    "qwen2": pre_tokenizers.Sequence([split(r"\p{N}"), byte_level(False)]),
    "llama-bpe": pre_tokenizers.Sequence([split(r"\p{N}{1,3}"), byte_level(False)]),
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizer_is_recognised_and_splits_alike(
    copy: Path, tmp_path: Path, name: str
) -> None:
    path = copy / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[name]
    tokenizer.save(str(path))
    edit(path, lambda spec: spec["model"].update(ignore_merges=name == "llama-bpe"))
    assert export(copy, tmp_path / "a.gguf")["tokenizer_pre"] == name
    tokenizer = Tokenizer.from_file(str(path))
    with reader.open(tmp_path / "a.gguf", n_ctx=32, threads=1) as backend:
        for text in ("In 2024 the heart's size", "don't  DON'T\n\n 12345.678 cm ", "µm ≥3 é\r\n"):
            assert backend.tokenize(text) == tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"].update(byte_fallback=True), "byte_fallback"),
        (lambda s: s["model"].update(type="Unigram"), "Unigram"),
        (lambda s: s["model"].update(ignore_merges=True), "ignore_merges is True"),
        (lambda s: s.update(pre_tokenizer=None), "pre_tokenizer .*none"),
        (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"].reverse(), "pre_tokenizer"),
        (lambda s: s.update(normalizer={"type": "NFKC"}), "normalizer 'NFKC'"),
    ],
)
def test_other_tokenizers_are_refused(
    llama: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    spec = json.loads((llama / "tokenizer.json").read_text("utf-8"))
    change(spec)
    with pytest.raises(ExportError, match=message):
        gguf_tokenizer.pre_tokenizer(spec)


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


def test_pairing_survives_quantisation(llama: Path, tmp_path: Path) -> None:
    full, small, none = (tmp_path / name for name in ("a.gguf", "q.gguf", "none.gguf"))
    writer.write(llama, full, dtype="f32", name="tiny", pairing="a" * 64)
    writer.quantize(full, small, file_type="Q8_0", threads=1)
    export(llama, none)
    for path, wanted in ((full, "a" * 64), (small, "a" * 64), (none, "")):
        with reader.open(path, n_ctx=32, threads=1) as backend:
            assert backend.pairing == wanted


def test_ids_without_a_token_are_padded(tmp_path: Path) -> None:
    directory = tiny_llama_dir(tmp_path / "hf", vocab_size=400)
    export(directory, tmp_path / "a.gguf")
    with reader.open(tmp_path / "a.gguf", n_ctx=64, threads=1, exact=True) as backend:
        assert backend.n_vocab == 400
    assert distance(gguf_logits(tmp_path / "a.gguf"), torch_logits(directory)) < 1e-3
