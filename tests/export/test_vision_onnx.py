"""Encoder + projector -> ONNX: same numbers, same bytes, nothing of this machine inside."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from rx_edge.backends import vision_onnx as reader
from rx_edge.config import ModelConfig
from rx_edge.errors import BackendError, ExportError
from rx_edge.model.projector import Projector
from rx_edge.model.report_model import SoftPromptEncoder
from rx_edge.model.vision import load_vision
from rx_edge_export import vision_onnx as writer
from tests.factories import IMAGE_SIZE, tiny_vit_dir

ROOT = Path(__file__).parents[2]


def encoder(directory: Path) -> torch.nn.Module:
    vision = load_vision(str(tiny_vit_dir(directory)), IMAGE_SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        projector = Projector(ModelConfig(), grid=vision.grid, width=vision.width, lm_width=64)
    return SoftPromptEncoder(vision, projector)


class Exported:
    def __init__(self, root: Path) -> None:
        self.module = encoder(root / "vit")
        self.path = root / "vision.onnx"
        self.summary = writer.write(self.module, self.path, image_size=IMAGE_SIZE)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("vision"))


class Tiny(torch.nn.Module):
    """The smallest module of the right shape; with `fault` the trace takes another branch."""

    def __init__(self, fault: bool = False) -> None:
        super().__init__()
        self.fault = fault
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 64).reshape(16, 4))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        rows = pixel_values.reshape(pixel_values.shape[0], 3, 16)
        if self.fault and not torch.compiler.is_exporting():
            rows = rows + 0.01
        return rows @ self.weight


def test_numbers_equal_torch(exported: Exported) -> None:
    images = np.random.default_rng(7).normal(size=(5, 3, IMAGE_SIZE, IMAGE_SIZE))
    images = images.astype(np.float32)
    with torch.no_grad():
        wanted = exported.module(torch.from_numpy(images)).numpy()
    with reader.open(exported.path, threads=1) as backend:
        assert np.abs(backend.encode(images) - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert exported.summary["max_error"] < 1e-5
    assert exported.summary["bytes"] == exported.path.stat().st_size
    assert (exported.summary["soft_tokens"], exported.summary["width"]) == wanted.shape[1:]


class Attends(torch.nn.Module):
    """Attention between 16 tokens whose scores overflow where pixels are far out of range."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tokens = pixel_values.reshape(pixel_values.shape[0], 1, 16, -1)[..., :4]
        scores = torch.exp(tokens.abs())
        everything = torch.ones(16, 16, dtype=torch.bool)  # as transformers hands a mask on
        mixed = torch.nn.functional.scaled_dot_product_attention(
            scores, scores, tokens, attn_mask=everything
        )
        return mixed[:, 0]


def test_a_softmax_that_overflows_is_an_error_and_not_attention_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / "attends.onnx"
    writer.write(Attends(), path, image_size=8)
    graph = onnx.load(path).graph
    kinds = [node.op_type for node in graph.node]
    assert "Softmax" in kinds
    assert "IsNaN" not in kinds
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used
    images = np.ones((1, 3, 8, 8), np.float32)
    with reader.open(path, threads=1) as backend:
        assert np.isfinite(backend.encode(images)).all()
        with pytest.raises(BackendError, match="NaN"):
            backend.encode(60.0 * images)  # exp(60)^2 is infinite in float32


def test_another_process_writes_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "from tests.export.test_vision_onnx import Exported\n"
        f"Exported(Path({str(tmp_path)!r}))\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "export")])
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=tmp_path)
    assert _sha256(tmp_path / "vision.onnx") == _sha256(exported.path)


def test_the_same_process_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        writer.write(Tiny(), tmp_path / name, image_size=4)
    assert _sha256(tmp_path / "a") == _sha256(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_nothing_of_this_machine_is_inside(exported: Exported) -> None:
    data = exported.path.read_bytes()
    for text in (str(ROOT), str(exported.path.parent), sys.prefix, str(Path.home()), ".py"):
        assert text.encode() not in data, text
    graph = onnx.load(exported.path).graph
    assert not graph.doc_string
    assert not graph.metadata_props
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        assert not part.doc_string
        assert not part.metadata_props


def test_difference_is_an_error(tmp_path: Path) -> None:
    out = tmp_path / "a.onnx"
    out.write_bytes(b"older")
    with pytest.raises(ExportError, match="differs from torch by"):
        writer.write(Tiny(fault=True), out, image_size=4)
    assert out.read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_untraceable_module_is_an_error(tmp_path: Path) -> None:
    class Branching(Tiny):
        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().forward(pixel_values)
            return out if pixel_values.sum() > 0 else -out

    with pytest.raises(ExportError, match=r"torch\.onnx cannot export Branching"):
        writer.write(Branching(), tmp_path / "a.onnx", image_size=4)
    with pytest.raises(ExportError, match="is no directory"):
        writer.write(Tiny(), tmp_path / "nowhere" / "a.onnx", image_size=4)
    assert list(tmp_path.iterdir()) == []


def test_large_weights_go_to_one_file_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writer, "SINGLE_FILE_LIMIT", 100)
    summary: dict[str, Any] = writer.write(
        Tiny(), tmp_path / "a.onnx", image_size=4, pairing="b" * 64
    )
    files = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert sorted(files) == ["a.onnx", "a.onnx.data"]
    assert summary["bytes"] == sum(files.values())
    with reader.open(tmp_path / "a.onnx", threads=1) as backend:
        assert backend.encode(np.ones((1, 3, 4, 4), np.float32)).shape == (1, 3, 4)
        assert backend.pairing == "b" * 64
    assert capfd.readouterr() == ("", "")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
