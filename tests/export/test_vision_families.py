"""Every family of towers, and every pooling, as ONNX and as what mmproj refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rx_edge.backends import vision_onnx as reader
from rx_edge.config import ImageRecipe, ModelConfig, PromptConfig
from rx_edge.errors import ExportError
from rx_edge.model.projector import Projector
from rx_edge.model.report_model import SoftPromptEncoder
from rx_edge.model.vision import load_vision
from rx_edge_export import mmproj_gguf, vision_onnx
from tests.factories import IMAGE_SIZE, tiny_tower_dir


def encoder(directory: Path, family: str, pooling: Any, layer: int = 0) -> SoftPromptEncoder:
    vision = load_vision(str(tiny_tower_dir(directory / family, family)), IMAGE_SIZE, layer)
    torch.manual_seed(0)
    config = ModelConfig(pooling=pooling, queries=5)
    projector = Projector(config, grid=vision.grid, width=vision.width, lm_width=64)
    return SoftPromptEncoder(vision, projector).eval()


@pytest.mark.parametrize(
    ("family", "pooling", "tokens"),
    [
        ("clip", "pixel-shuffle-2x2", 4),
        ("dinov2", "average-2x2", 4),
        ("siglip", "average-4x4", 1),
        ("swin", "resampler", 5),
        ("vit", "none", 16),
    ],
)
def test_onnx_computes_it(tmp_path: Path, family: str, pooling: str, tokens: int) -> None:
    module, path = encoder(tmp_path, family, pooling), tmp_path / "vision.onnx"
    summary = vision_onnx.write(module, path, image_size=IMAGE_SIZE)
    images = np.random.default_rng(7).normal(size=(5, 3, IMAGE_SIZE, IMAGE_SIZE))
    images = images.astype(np.float32)
    with torch.no_grad():
        wanted = module(torch.from_numpy(images)).numpy()
    with reader.open(path, threads=1) as backend:
        assert np.abs(backend.encode(images) - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert (summary["soft_tokens"], summary["width"]) == wanted.shape[1:] == (tokens, 64)
    assert np.abs(wanted[0] - wanted[1]).max() > 0.01 * np.abs(wanted).max()  # it sees the image


@pytest.mark.parametrize(
    ("family", "pooling", "layer", "says"),
    [
        ("clip", "pixel-shuffle-2x2", 0, "tower is a 'clip_vision_model'.* use a 'vit' tower"),
        ("siglip", "pixel-shuffle-2x2", 0, "tower is a 'siglip_vision_model'"),
        ("swin", "none", 0, "tower is a 'swin'"),
        ("vit", "average-2x2", 0, "pooling is 'average-2x2'"),
        ("dinov2", "resampler", 0, "pooling is 'resampler'"),
        ("dinov2", "pixel-shuffle-2x2", -2, "layer -2 .*without the final layer norm"),
    ],
)
def test_mmproj_refuses_what_internvl_does_not_compute(
    tmp_path: Path, family: str, pooling: str, layer: int, says: str
) -> None:
    module, out = encoder(tmp_path, family, pooling, layer), tmp_path / "m.gguf"
    with pytest.raises(ExportError, match=says):
        mmproj_gguf.write(module, ImageRecipe(size=IMAGE_SIZE), PromptConfig(), out, name="x")
    assert not out.exists()
