"""optimum's route: what it is given, the surgery on its graph, and the gate behind it.

optimum itself needs an environment of its own; the last tests run it where
RX_EDGE_OPTIMUM_PYTHON names one, and do not exist elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.export import Dim

from rx_edge.backends import llm_onnx as reader
from rx_edge.errors import ExportError, MissingExtraError
from rx_edge_export import llm_onnx, llm_optimum
from rx_edge_export.onnx_tracing import silence
from tests.export.test_llm_onnx import tiny_gpt2_dir
from tests.factories import tiny_llama_dir

IDS = np.arange(3, 40, dtype=np.int32)


class WithIds(torch.nn.Module):
    """The decoder as optimum exports it: token ids in."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder = llm_onnx._Decoder(model)

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:
        embeddings = self.decoder.model.get_input_embeddings()(input_ids)
        return self.decoder(embeddings, attention_mask, position_ids, past)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_dir(tmp_path_factory.mktemp("llama") / "hf", num_hidden_layers=1)


@pytest.fixture(scope="module")
def ids_graph(llama: Path) -> Path:
    """model.onnx over `input_ids`, traced from the tiny Llama."""
    model = llm_onnx.load(llama, torch.float32)
    past = [(torch.zeros(2, 2, 7, 16), torch.zeros(2, 2, 7, 16))]
    example = (torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 12, dtype=torch.int64))
    example = (*example, torch.arange(7, 12).repeat(2, 1), past)
    batch, seq, before = Dim("batch"), Dim("seq"), Dim("past")
    shapes = ({0: batch, 1: seq}, {0: batch, 1: Dim.DYNAMIC}, {0: batch, 1: seq})
    with silence(), torch.no_grad():
        program: Any = torch.onnx.export(
            WithIds(model),
            example,
            dynamo=True,
            opset_version=20,
            dynamic_shapes=(*shapes, [({0: batch, 2: before}, {0: batch, 2: before})]),
            input_names=["input_ids", "attention_mask", "position_ids"]
            + [f"past_key_values.0.{part}" for part in ("key", "value")],
            output_names=["logits", "present.0.key", "present.0.value"],
            verbose=False,
        )
    path = llama.parent / "model.onnx"
    program.save(path)
    return path


@pytest.fixture
def program(ids_graph: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A stand-in for the interpreter: a shell script with $out (optimum's target) and $graph."""

    def make(body: str) -> Path:
        path = tmp_path / "python"
        path.write_text(
            f'#!/bin/sh\nfor out; do :; done\nlog="{tmp_path}/log"\ngraph="{ids_graph}"\n{body}\n'
        )
        path.chmod(0o755)
        return path

    return make


COPY = 'mkdir "$out"; cp "$graph" "$out/model.onnx"'


def test_a_graph_over_ids_becomes_one_over_embeddings(
    llama: Path, tmp_path: Path, program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    python = program('env > "$log"; echo "$@" >> "$log"; cp "$4/config.json" "$log.json"; ' + COPY)
    out = tmp_path / "llm.onnx"
    summary = llm_optimum.write(llama, out, pairing="c" * 64, name="tiny", python=python)
    assert summary["max_error"] < 1e-4
    model = llm_onnx.load(llama, torch.float32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(IDS).long()[None]).logits[0].numpy()
    with reader.open(out, n_ctx=64, threads=1) as backend:
        assert np.abs(backend.step(IDS) - wanted).max() < 1e-3
        assert backend.pairing == "c" * 64
    log = (tmp_path / "log").read_text()
    assert "HF_HUB_OFFLINE=1" in log
    assert "PYTHONPATH" not in log
    assert "-m optimum.exporters.onnx" in log
    assert "--task text-generation-with-past --dtype fp32" in log
    config = json.loads((tmp_path / "log.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "llm.embed.safetensors", "llm.onnx", "llm.onnx.data", "log", "log.json", "python",
    ]  # fmt: skip


def test_a_graph_of_another_rope_is_refused(llama: Path, tmp_path: Path, program: Any) -> None:
    """What transformers 4 does to a directory that says rope_theta only in the new way."""
    copy = Path(shutil.copytree(llama, tmp_path / "hf"))
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 10000.0
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"differs from torch by .* 1e-03 is allowed"):
        llm_optimum.write(copy, tmp_path / "llm.onnx", python=program(COPY))
    assert not (tmp_path / "llm.onnx").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo first >&2; echo the reason >&2; exit 3", "failed with code 3: the reason"),
        ("exit 0", "failed with code 0: no message"),
        ("exit 1", "failed with code 1: no message"),
    ],
)
def test_a_failing_optimum_is_an_error(
    llama: Path, tmp_path: Path, program: Any, body: str, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        llm_optimum.write(llama, tmp_path / "llm.onnx", python=program(body))
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def test_the_environment_is_asked_for(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "llm.onnx"
    monkeypatch.delenv(llm_optimum.VARIABLE, raising=False)
    with pytest.raises(MissingExtraError, match=r"python -m venv .*rx-edge\[optimum\].*PYTHON="):
        llm_optimum.write(llama, out)
    monkeypatch.setenv(llm_optimum.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ExportError, match="nowhere' does not exist"):
        llm_optimum.write(llama, out)
    (tmp_path / "text").write_text("no program")
    with pytest.raises(ExportError, match="cannot be run"):
        llm_optimum.write(llama, out, python=tmp_path / "text")
    with pytest.raises(ExportError, match="is no directory; create it"):
        llm_optimum.write(llama, tmp_path / "no" / "llm.onnx", python=tmp_path / "text")


SCALED = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (
            {"rope_theta": 7.0, "rope_scaling": None},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": 7.0},
        ),
        (
            {"rope_parameters": {**SCALED, "rope_theta": 7.0}},
            {"rope_theta": 7.0, "rope_scaling": SCALED},
        ),
        (
            {"rope_theta": 7.0, "rope_scaling": SCALED},
            {"rope_parameters": {**SCALED, "rope_theta": 7.0}, "rope_scaling": SCALED},
        ),
        ({"n_positions": 1024, "max_position_embeddings": None}, {"n_positions": 1024}),
    ],
)
def test_config_says_rope_in_both_ways(tmp_path: Path, config: Any, wanted: Any) -> None:
    model_dir = tmp_path / "hf"
    model_dir.mkdir()
    for file in ("model.safetensors", "pytorch_model.bin"):
        (model_dir / file).write_bytes(b"")
    full = {"max_position_embeddings": 1024, **config}
    (model_dir / "config.json").write_text(json.dumps(full))
    assert llm_optimum.prepare(model_dir, tmp_path / "copy") == 1024
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert {key: written[key] for key in wanted} == wanted
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_config_that_contradicts_itself_or_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config\.json' cannot be read"):
        llm_optimum.prepare(tmp_path, tmp_path / "copy")
    config = {"n_positions": 8, "rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"rope_theta is 1\.0, but rope_parameters says 2\.0"):
        llm_optimum.prepare(tmp_path, tmp_path / "copy")


def gpt2_like(*more: onnx.NodeProto) -> Any:
    """ids (b, s) -> Reshape -> rows of a 5 x 3 table, and the shapes of both."""
    table = np.arange(15, dtype=np.float32).reshape(5, 3)
    graph = helper.make_graph(
        [
            helper.make_node("Shape", ["input_ids"], ["shape"]),
            helper.make_node("Reshape", ["input_ids", "shape"], ["flat"]),
            helper.make_node("Gather", ["table", "flat"], ["rows"]),
            helper.make_node("Neg", ["rows"], ["logits"]),
            helper.make_node("Shape", ["flat"], ["flat_shape"]),
            *more,
        ],
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", 3]),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [2]),
            helper.make_tensor_value_info("flat_shape", TensorProto.INT64, [2]),
        ],
        [numpy_helper.from_array(table, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return ir.from_proto(model), table


def test_reshaped_ids_and_their_shape() -> None:
    model, table = gpt2_like()
    assert np.array_equal(llm_optimum.take_embeddings(model), table)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    assert [node.name for node in session.get_inputs()] == ["inputs_embeds"]
    assert session.get_inputs()[0].shape == ["b", "s", 3]
    rows = np.ones((2, 4, 3), np.float32)
    logits, shape, flat = session.run(None, {"inputs_embeds": rows})
    assert np.array_equal(logits, -rows)
    assert shape.tolist() == flat.tolist() == [2, 4]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("Gather", ["table", "input_ids"]), "has 2 lookups"),
        (("Neg", ["input_ids"]), "also gives 'input_ids' to Neg"),
    ],
)
def test_other_uses_of_the_ids_are_refused(more: Any, message: str) -> None:
    node = helper.make_node(*more, ["extra"])
    model, _ = gpt2_like(node)
    model.graph.outputs.append(
        next(n for n in model.graph if n.outputs[0].name == "extra").outputs[0]
    )
    with pytest.raises(ExportError, match=message):
        llm_optimum.take_embeddings(model)


def test_a_graph_without_ids_is_refused() -> None:
    model, _ = gpt2_like()
    model.graph.inputs[0].name = "tokens"
    with pytest.raises(ExportError, match="has 0 lookups of 'input_ids'"):
        llm_optimum.take_embeddings(model)


if os.environ.get(llm_optimum.VARIABLE):

    @pytest.mark.parametrize("scaled", [False, True])
    def test_the_real_optimum_agrees_with_torch(tmp_path: Path, scaled: bool) -> None:
        rope = {"rope_theta": 5000.0, **(SCALED if scaled else {"rope_type": "default"})}
        directory = tiny_llama_dir(tmp_path / "hf", rope_parameters=rope)
        summary = llm_optimum.write(directory, tmp_path / "llm.onnx")
        assert summary["max_error"] < 1e-4
        assert summary["op_types"] == {"MatMul FLOAT": 15}

    def test_the_real_optimum_agrees_with_torch_on_gpt2(tmp_path: Path) -> None:
        directory = tiny_gpt2_dir(tmp_path / "hf")
        assert llm_optimum.write(directory, tmp_path / "llm.onnx")["max_error"] < 1e-4
