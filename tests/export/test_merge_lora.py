"""The adapter is in the merged weights: once, whole, and in every shard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rx_edge.config import LoraSettings
from rx_edge.errors import ExportError
from rx_edge.model.language import load_language, with_lora
from rx_edge.model.report_model import adapter_state
from rx_edge_export import merge_lora
from tests.factories import tiny_gpt2_dir, tiny_llama_dir

GPT2 = LoraSettings(r=4, alpha=12, targets=("c_attn", "c_proj", "c_fc"))


def adapted(directory: Path, settings: LoraSettings) -> Any:
    """peft's own LM with an adapter that clearly acts."""
    lm = with_lora(load_language(str(directory)), settings).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.1)
    return lm


@torch.inference_mode()
def logits(lm: Any) -> torch.Tensor:
    out: torch.Tensor = lm(torch.arange(3, 40)[None]).logits[0]
    return out


@pytest.mark.parametrize("shard", [1 << 30, 60_000])
@pytest.mark.parametrize("tied", [True, False])
def test_merged_equals_pefts_unmerged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int, tied: bool
) -> None:
    monkeypatch.setattr(merge_lora, "SHARD", shard)
    base = tiny_llama_dir(tmp_path / "base", tied=tied)
    check(base, LoraSettings(r=4, alpha=12), tmp_path / "out")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert (len(files) == 1) == (shard == 1 << 30), files


@pytest.mark.parametrize("published", [False, True])
def test_gpt2_keeps_its_transposed_layers(tmp_path: Path, published: bool) -> None:
    base = tiny_gpt2_dir(tmp_path / "base")
    if published:  # as on the hub: without the prefix
        state = load_file(base / "model.safetensors")
        bare = {k.removeprefix("transformer."): v for k, v in state.items()}
        save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    check(base, GPT2, tmp_path / "out")


def check(base: Path, settings: LoraSettings, out: Path) -> None:
    lm = adapted(base, settings)
    wanted = logits(lm)
    with lm.disable_adapter():
        assert (logits(lm) - wanted).abs().max() > 0.1
    out.mkdir()
    merge_lora.write(base, adapter_state(lm), settings, out)
    (out / "config.json").write_bytes((base / "config.json").read_bytes())
    torch.testing.assert_close(logits(load_language(str(out))), wanted, atol=1e-4, rtol=1e-4)
    merge_lora._load_into(lm.get_base_model(), out)
    with lm.disable_adapter():
        torch.testing.assert_close(logits(lm), wanted, atol=1e-4, rtol=1e-4)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base = tiny_llama_dir(tmp_path / "base")
    lm = adapted(base, LoraSettings())
    adapter = adapter_state(lm)
    shallow = tiny_llama_dir(tmp_path / "shallow", num_hidden_layers=1)
    narrow = tiny_llama_dir(tmp_path / "narrow", intermediate_size=96)
    for other, says in ((shallow, "belongs to no weight"), (narrow, "the adapter of model.layers")):
        out = tmp_path / f"out-{other.name}"
        out.mkdir()
        with pytest.raises(ExportError, match=says):
            merge_lora.write(other, adapter, LoraSettings(), out)


def test_a_lost_tensor_is_noticed(tmp_path: Path) -> None:
    base = tiny_llama_dir(tmp_path / "base")
    lm = adapted(base, LoraSettings())
    state = load_file(base / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"lost 1 tensor.*layers\.1\.mlp\.up_proj"):
        merge_lora._load_into(lm.get_base_model(), base)


def test_the_index_lists_every_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_lora, "SHARD", 60_000)
    base = tiny_llama_dir(tmp_path / "base")
    (tmp_path / "out").mkdir()
    merge_lora.write(base, adapter_state(adapted(base, LoraSettings())), LoraSettings(),
                     tmp_path / "out")  # fmt: skip
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text("utf-8"))
    assert set(index["weight_map"]) == set(load_file(base / "model.safetensors"))
    assert index["metadata"]["total_size"] == sum(
        v.nbytes for v in load_file(base / "model.safetensors").values()
    )
