"""TensorRT-RTX engines of the towers that hospitals would run, at their real sizes.

The demo model's are its trained weights; ViT-B/14 at 518 and ViT-L/14 at 336 pixels have random
ones, since what is proved is that every operator at these shapes is taken. No GPU is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from rx_edge.config import ModelConfig
from rx_edge.model.projector import Projector
from rx_edge.model.report_model import SoftPromptEncoder
from rx_edge.model.vision import load_vision
from rx_edge_export import vision_onnx as writer
from rx_edge_export import vision_tensorrt
from rx_edge_export.vision_quantize import to_fp16
from tests.export.test_vision_quantize import images

pytest.importorskip("tensorrt_rtx_bindings", reason='pip install "rx-edge[tensorrt]"')
pytestmark = pytest.mark.slow

OPENLLAMA_7B = 4096  # width of its embeddings


def base_at_518(path: Path) -> None:
    """The geometry of RAD-DINO."""
    config = Dinov2Config(image_size=518, patch_size=14)
    assert (config.hidden_size, config.num_hidden_layers) == (768, 12)
    Dinov2Model(config).save_pretrained(path)


def large_at_336(path: Path) -> None:
    """The geometry of CLIP ViT-L/14@336."""
    config = CLIPVisionConfig(
        image_size=336, patch_size=14, hidden_size=1024, intermediate_size=4096,
        num_hidden_layers=24, num_attention_heads=16,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(path)


@pytest.mark.parametrize(
    ("make", "size", "config", "tokens", "parameters"),
    [
        (base_at_518, 518, ModelConfig(pooling="resampler", queries=128), 128, 86e6),
        # the last of its 24 blocks is dropped, as by default for CLIP
        (large_at_336, 336, ModelConfig(pooling="pixel-shuffle-2x2"), 144, 291e6),
    ],
)
def test_large_towers(
    tmp_path: Path, make: Any, size: int, config: ModelConfig, tokens: int, parameters: float
) -> None:
    make(tmp_path / "tower")
    vision = load_vision(str(tmp_path / "tower"), size)
    weights = sum(p.numel() for p in vision.parameters())
    assert weights == pytest.approx(parameters, rel=0.02)
    projector = Projector(config, grid=vision.grid, width=vision.width, lm_width=OPENLLAMA_7B)
    weights += sum(p.numel() for p in projector.parameters())
    module = SoftPromptEncoder(vision, projector)
    writer.write(module, tmp_path / "fp32.onnx", image_size=size)
    del module, vision, projector
    to_fp16(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx", images=images(count=1, size=size))
    found = vision_tensorrt.check(tmp_path / "fp16.onnx")
    assert (found["soft_tokens"], found["width"]) == (tokens, OPENLLAMA_7B)
    # two bytes a weight: no layer was left out, none kept in float32
    assert {name: engine["bytes"] for name, engine in found["engines"].items()} == {
        "sm89": pytest.approx(2 * weights, rel=0.1),
        "sm120": pytest.approx(2 * weights, rel=0.1),
    }


def test_the_demo_model(demo_bundle: Path, tmp_path: Path) -> None:
    fp32, fp16 = demo_bundle / "vision.onnx", tmp_path / "fp16.onnx"
    to_fp16(fp32, fp16)
    sizes = []
    for path in (fp32, fp16):
        found = vision_tensorrt.check(path)
        assert (found["soft_tokens"], found["width"]) == (64, 576)
        sizes.append(found["engines"]["sm89"]["bytes"])
    assert sizes[0] == pytest.approx(fp32.stat().st_size, rel=0.1)
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.1)
