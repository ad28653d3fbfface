"""Causal LM -> ONNX: same numbers, same bytes, nothing of this machine, and no silent loss."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rx_edge.backends import llm_onnx as reader
from rx_edge.backends.base import PAIRING_KEY
from rx_edge.errors import ExportError
from rx_edge_export import llm_onnx as writer
from rx_edge_export import onnx_nbits
from tests.factories import tiny_llama_dir

ROOT = Path(__file__).parents[2]
PAIRING = "b" * 64
IDS = np.arange(3, 60, dtype=np.int32)


def tiny_gpt2_dir(path: Path) -> Path:
    """A GPT-2 of 1 layer, width 64 and 128 positions, with large random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=384,
        n_embd=64,
        n_layer=1,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(path)
    return path


class Exported:
    def __init__(self, root: Path) -> None:
        self.directory = tiny_llama_dir(root / "hf")
        self.path = root / "llm.int4.onnx"
        self.summary = export(self.directory, self.path, "int4")
        self.files = [self.path, *reader.sidecars(self.path)]


def export(directory: Path, out: Path, precision: Any) -> dict[str, Any]:
    return writer.write(directory, out, precision=precision, pairing=PAIRING, name="tiny")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("int4"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_dir(tmp_path_factory.mktemp("llama") / "hf", num_hidden_layers=1)


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A copy of the model directory that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "hf"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text("utf-8"))
    change(data)
    path.write_text(json.dumps(data), "utf-8")


def torch_logits(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()[None]).logits[0].numpy()


def onnx_logits(path: Path) -> Any:
    with reader.open(path, n_ctx=64, threads=1) as backend:
        return backend.step(IDS)


def distance(found: Any, wanted: Any) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_int4_is_mixed_and_described(exported: Exported) -> None:
    summary = exported.summary
    # layer 0 of 2 is sensitive: its value and down projections and the head keep 8 bits
    assert summary["op_types"] == {"MatMulNBits 4": 12, "MatMulNBits 8": 3}
    assert summary["bytes"] == sum(file.stat().st_size for file in exported.files)
    assert sorted(summary["files"]) == sorted(file.name for file in exported.files)
    assert (summary["opset"], summary["embedding_dtype"]) == (20, "float16")
    assert 0 < summary["random_kl"] < 0.5
    graph = onnx.load(exported.path, load_external_data=False)
    bits = {
        (attributes["K"].i, attributes["N"].i): attributes["bits"].i
        for node in graph.graph.node
        if node.op_type == "MatMulNBits"
        for attributes in [{a.name: a for a in node.attribute}]
        if attributes["bits"].i == 8
    }
    assert set(bits) == {(64, 32), (128, 64), (64, 384)}
    assert graph.graph.name == "tiny"


def test_pairing_is_in_both_files(exported: Exported) -> None:
    with reader.open(exported.path, n_ctx=64, threads=1) as backend:
        assert backend.pairing == PAIRING
    with safe_open(reader.sidecars(exported.path)[1], "np") as table:
        assert table.metadata() == {PAIRING_KEY: PAIRING}


def test_same_bytes_in_another_process(exported: Exported, tmp_path: Path) -> None:
    out = tmp_path / exported.path.name
    script = (
        "import sys; from pathlib import Path; from rx_edge_export.llm_onnx import write; "
        "write(Path(sys.argv[1]), Path(sys.argv[2]), precision='int4', "
        f"pairing={PAIRING!r}, name='tiny')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(exported.directory), str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    for mine, theirs in zip([out, *reader.sidecars(out)], exported.files, strict=True):
        assert mine.read_bytes() == theirs.read_bytes(), mine.name


def test_nothing_of_this_machine_is_inside(exported: Exported) -> None:
    graph = exported.path.read_bytes()
    words = ("site-packages", ".py", str(ROOT), str(exported.directory), socket.gethostname())
    assert [word for word in words if word.encode() in graph] == []
    parsed = onnx.load(exported.path, load_external_data=False)
    assert {entry.key for entry in parsed.metadata_props} == {PAIRING_KEY, reader.CONTEXT_KEY}
    assert not any(node.metadata_props or node.doc_string for node in parsed.graph.node)
    shape = parsed.graph.input[1].type.tensor_type.shape
    assert [size.dim_param for size in shape.dim] == ["batch", "past + seq"]


@pytest.mark.parametrize(("precision", "error"), [("fp16", 0.02), ("int8", 0.2)])
def test_other_precisions_are_close(
    llama: Path, tmp_path: Path, precision: str, error: float
) -> None:
    out = tmp_path / f"llm.{precision}.onnx"
    summary = export(llama, out, precision)
    assert 1e-5 < summary["max_error"] < error
    assert distance(onnx_logits(out), torch_logits(llama)) < error
    kind = {"fp16": "MatMul FLOAT16", "int8": "MatMulNBits 8"}[precision]
    assert summary["op_types"] == {kind: 8}
    assert summary["embedding_dtype"] == "float16"


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 77.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_what_the_gguf_writer_refuses_is_traced(tmp_path: Path) -> None:
    """Rope scaling, biases, an untied head and wide heads all change the numbers."""
    directory = tiny_llama_dir(
        tmp_path / "hf",
        tied=False,
        num_hidden_layers=1,
        attention_bias=True,
        mlp_bias=True,
        head_dim=32,
        rope_parameters=LLAMA3,
    )
    weights = load_file(directory / "model.safetensors")
    for name in weights:  # transformers starts biases at zero
        if name.endswith(".bias"):
            weights[name] += torch.linspace(-1, 1, len(weights[name]))
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    summary = export(directory, tmp_path / "a.onnx", "fp32")
    assert summary["max_error"] < 1e-4
    assert summary["embedding_dtype"] == "float32"
    wanted = torch_logits(directory)
    assert distance(onnx_logits(tmp_path / "a.onnx"), wanted) < 1e-4
    edit(directory / "config.json", lambda config: config["rope_parameters"].update(factor=1.0))
    assert distance(wanted, torch_logits(directory)) > 0.01


def test_gpt2(tmp_path: Path) -> None:
    directory = tiny_gpt2_dir(tmp_path / "hf")
    out = tmp_path / "a.onnx"
    assert export(directory, out, "fp32")["op_types"] == {"MatMul FLOAT": 5}
    assert distance(onnx_logits(out), torch_logits(directory)) < 1e-4
    summary = export(directory, out, "int4")  # replaces the three files
    # the joint query-key-value projection, the second of the MLP, and the head
    assert summary["op_types"] == {"MatMulNBits 4": 2, "MatMulNBits 8": 3}
    with pytest.raises(Exception, match="trained for 128"):
        reader.open(out, n_ctx=129, threads=1)


def test_a_graph_that_differs_is_not_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.onnx"
    older = [out, *reader.sidecars(out)]
    for file in older:
        file.write_bytes(b"older")
    forward = writer._Decoder.forward

    def off_by_a_little(
        self: Any, inputs_embeds: Any, attention_mask: Any, position_ids: Any, past: Any
    ) -> Any:
        logits, present = forward(self, inputs_embeds, attention_mask, position_ids, past)
        return logits * 1.01, present

    monkeypatch.setattr(writer._Decoder, "forward", off_by_a_little)
    with pytest.raises(ExportError, match=r"differs from torch by .* 1e-03 is allowed"):
        export(llama, out, "fp32")
    assert sorted(tmp_path.iterdir()) == sorted(older)
    assert all(file.read_bytes() == b"older" for file in older)


def test_a_model_that_cannot_be_traced_is_an_export_error(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def data_dependent(
        self: Any, inputs_embeds: Any, attention_mask: Any, position_ids: Any, past: Any
    ) -> Any:
        return inputs_embeds * (2 if inputs_embeds.sum() > 0 else 3), past

    monkeypatch.setattr(writer._Decoder, "forward", data_dependent)
    with pytest.raises(ExportError, match=r"torch\.onnx cannot export LlamaForCausalLM: \w"):
        export(llama, tmp_path / "a.onnx", "fp32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'.*'llama', 'gpt2'"),
        ({"rope_parameters": {**LLAMA3, "rope_type": "dynamic"}}, "rope_type is 'dynamic'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantised"),
        ({"max_position_embeddings": 64}, "max_position_embeddings is 64.*needs 96"),
        ({"num_hidden_layers": 2}, r"9 missing keys.*layers\.1"),
        ({"intermediate_size": 64}, r"cannot be loaded|mismatched keys"),
    ],
)
def test_config_is_refused(copy: Path, tmp_path: Path, change: Any, message: str) -> None:
    edit(copy / "config.json", lambda config: config.update(change))
    with pytest.raises(ExportError, match=message):
        export(copy, tmp_path / "a.onnx", "fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(("value", "precision"), [(float("nan"), "int8"), (1e6, "fp16")])
def test_numbers_that_cannot_be_stored_are_refused(
    copy: Path, tmp_path: Path, value: float, precision: str
) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"layers\.0\.mlp\.up_proj\.weight holds NaN"):
        export(copy, tmp_path / "a.onnx", precision)


def test_weights_without_a_place_are_refused(copy: Path, tmp_path: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 64)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"1 unexpected keys.*lora_A"):
        export(copy, tmp_path / "a.onnx", "fp32")


def test_pickles_and_missing_things_are_refused(llama: Path, copy: Path, tmp_path: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="cannot be loaded"):
        export(copy, tmp_path / "a.onnx", "fp32")
    with pytest.raises(ExportError, match="is no directory"):
        export(tmp_path / "nowhere", tmp_path / "a.onnx", "fp32")
    with pytest.raises(ExportError, match="is no directory; create it"):
        export(llama, tmp_path / "nowhere" / "a.onnx", "fp32")
    with pytest.raises(ExportError, match="precision is 'int2'; valid: 'fp32'"):
        export(llama, tmp_path / "a.onnx", "int2")


def test_sensitive_layers_of_thirty() -> None:
    found = [i for i in range(30) if onnx_nbits.sensitive(i, 30)]
    assert found == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29]
    bits = onnx_nbits.mixed_bits(30)
    head = "model.model.layers.6"
    assert [bits(f"{head}.{x}") for x in ("self_attn.v_proj", "mlp.down_proj")] == [8, 8]
    assert [bits(f"{head}.{x}") for x in ("self_attn.q_proj", "mlp.up_proj")] == [4, 4]
    assert (bits("model.lm_head"), bits("model.model.layers.7.mlp.down_proj")) == (8, 4)


@pytest.mark.parametrize(("bits", "k_quant", "error"), [(8, False, 0.02), (8, True, 0.02)])
def test_blocks_that_do_not_fill_and_constant_blocks(
    bits: int, k_quant: bool, error: float
) -> None:
    """K of 80 is two and a half blocks; a whole column of zeros has no range to divide by."""
    import onnxruntime

    random = np.random.default_rng(0)
    weight = random.normal(0, 0.1, (80, 16)).astype(np.float32)
    weight[:, 3] = 0
    rows = random.normal(0, 1, (5, 80)).astype(np.float32)
    made = onnx_nbits._blocks(weight, bits, k_quant)
    session = onnxruntime.InferenceSession(made.SerializeToString())
    found = session.run(None, {"a": rows})[0]
    assert distance(found, rows @ weight) < error
    assert not found[:, 3].any()


def test_the_quantiser_leaves_logging_alone(capfd: pytest.CaptureFixture[str]) -> None:
    before = list(logging.getLogger().handlers), logging.root.manager.disable
    onnx_nbits._blocks(np.ones((64, 32), np.float32), 4, k_quant=True)
    assert (list(logging.getLogger().handlers), logging.root.manager.disable) == before
    assert capfd.readouterr() == ("", "")
