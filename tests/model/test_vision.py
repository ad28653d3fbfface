"""Every family of vision towers gives the numbers that transformers gives, in the right order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rx_edge.config import ImageRecipe, LoraSettings
from rx_edge.errors import ModelError
from rx_edge.model.vision import add_lora, check_normalisation, load_vision, merged
from tests.factories import IMAGE_SIZE, TOWERS, tiny_tower_dir

CLASSES = {
    "clip": "CLIPVisionModel",
    "dinov2": "Dinov2Model",
    "siglip": "SiglipVisionModel",
    "swin": "SwinModel",
    "vit": "ViTModel",
}
# family -> tokens before the patches, features per 56 pixels, layer that is taken by default
SHAPES = {
    "clip": (1, 4, -2),
    "dinov2": (1, 4, -1),
    "siglip": (0, 4, -1),
    "swin": (0, 7, -1),
    "vit": (1, 4, -1),
}


@torch.inference_mode()
def hidden(path: Path, family: str, pixels: torch.Tensor) -> Any:
    """What transformers says: last_hidden_state and the output of every block."""
    model = getattr(transformers, CLASSES[family]).from_pretrained(path).eval()
    extra = {} if family in ("dinov2", "swin") else {"interpolate_pos_encoding": True}
    return model(pixels, output_hidden_states=True, **extra)


@pytest.mark.parametrize("size", [IMAGE_SIZE, 2 * IMAGE_SIZE])
@pytest.mark.parametrize("family", TOWERS)
def test_features_are_those_of_transformers(tmp_path: Path, family: str, size: int) -> None:
    path = tiny_tower_dir(tmp_path / family, family)
    prefix, per_side, layer = SHAPES[family]
    grid = per_side * size // IMAGE_SIZE
    pixels = torch.randn(2, 3, size, size)
    tower = load_vision(str(path), size)
    with torch.inference_mode():
        found = tower(pixels)
    known = hidden(path, family, pixels)
    wanted = known.last_hidden_state if layer == -1 else known.hidden_states[layer]
    assert (tower.layer, tower.grid, tower.width) == (layer, grid, 32)
    assert found.shape == (2, grid * grid, 32)
    torch.testing.assert_close(found, wanted[:, prefix:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [f for f in TOWERS if f != "swin"])
def test_an_earlier_layer_is_that_blocks_output(tmp_path: Path, family: str) -> None:
    path = tiny_tower_dir(tmp_path / family, family)
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    last, before = (load_vision(str(path), IMAGE_SIZE, layer) for layer in (-1, -2))
    known = hidden(path, family, pixels)
    with torch.inference_mode():
        prefix = SHAPES[family][0]
        torch.testing.assert_close(last(pixels), known.last_hidden_state[:, prefix:])
        torch.testing.assert_close(before(pixels), known.hidden_states[-2][:, prefix:])
    unused = last.state_dict().keys() - before.state_dict().keys()
    assert any(".1." in name for name in unused)  # the block behind is gone
    assert not any("pool" in n or "head" in n or "post" in n for n in before.state_dict())


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_vision_only_checkpoint_gives_the_same(tmp_path: Path, family: str) -> None:
    both = tiny_tower_dir(tmp_path / "both", family)
    model = getattr(transformers, CLASSES[family]).from_pretrained(both)
    model.save_pretrained(tmp_path / "alone")
    a, b = (load_vision(str(tmp_path / n), IMAGE_SIZE).state_dict() for n in ("both", "alone"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", TOWERS)
def test_a_missing_weight_is_refused(tmp_path: Path, family: str) -> None:
    path = tiny_tower_dir(tmp_path / family, family)
    state = load_file(path / "model.safetensors")
    name = next(n for n in state if "patch_embedding" in n and n.endswith("weight"))
    del state[name]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights: \['.*patch_embedding"):
        load_vision(str(path), IMAGE_SIZE)


@pytest.mark.parametrize(
    ("family", "size", "says"),
    [
        ("clip", 60, "60 is not a multiple of the patch size 14 .*; use 56 or 70"),
        ("siglip", 13, "13 is not a multiple of .*; use 14"),
        ("swin", 84, "84 is not a multiple of 56, at which the windows .*; use 56 or 112"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(
    tmp_path: Path, family: str, size: int, says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        load_vision(str(tiny_tower_dir(tmp_path / family, family)), size)


@pytest.mark.parametrize(("family", "layer"), [("vit", -3), ("vit", 1), ("swin", -2)])
def test_a_layer_that_is_not_there_is_refused(tmp_path: Path, family: str, layer: int) -> None:
    with pytest.raises(ModelError, match=f"vision_layer is {layer}, .* has layers -. to -1"):
        load_vision(str(tiny_tower_dir(tmp_path / family, family)), IMAGE_SIZE, layer)


def test_absolute_positions_of_a_swin_are_refused(tmp_path: Path) -> None:
    path = tiny_tower_dir(tmp_path / "swin", "swin", use_absolute_embeddings=True)
    with pytest.raises(ModelError, match="absolute positions"):
        load_vision(str(path), IMAGE_SIZE)


def test_another_normalisation_than_the_towers_is_refused(tmp_path: Path) -> None:
    path = tiny_tower_dir(tmp_path / "siglip", "siglip")
    check_normalisation(str(path), ImageRecipe())  # where nothing is stated, the recipe decides
    stated = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (path / "preprocessor_config.json").write_text(json.dumps(stated), "utf-8")
    half = (0.5, 0.5, 0.5)
    check_normalisation(str(path), ImageRecipe(mean=half, std=half))
    for given, key in ((ImageRecipe(std=half), "mean"), (ImageRecipe(mean=half), "std")):
        with pytest.raises(ModelError, match=rf"set image\.{key} = \[0\.5, 0\.5, 0\.5\]"):
            check_normalisation(str(path), given)


@pytest.mark.parametrize("family", TOWERS)
@torch.inference_mode()
def test_an_adapter_acts_and_merges_without_a_trace(tmp_path: Path, family: str) -> None:
    path = tiny_tower_dir(tmp_path / family, family)
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    base, tower = (load_vision(str(path), IMAGE_SIZE) for _ in range(2))
    plain = base(pixels)
    add_lora(tower, LoraSettings(r=4, alpha=12))
    torch.testing.assert_close(tower(pixels), plain)  # a fresh one is the identity
    adapter = [p for n, p in tower.named_parameters() if ".lora_" in n]
    for parameter in adapter:
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    acting, folded = tower(pixels), merged(tower)
    assert (acting - plain).abs().max() > 0.1 * plain.abs().max()
    torch.testing.assert_close(folded(pixels), acting, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tower(pixels), acting)  # the tower itself is not merged
    assert folded.state_dict().keys() == base.state_dict().keys()
