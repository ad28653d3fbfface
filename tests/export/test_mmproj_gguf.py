"""An mmproj GGUF: what stock llama.cpp (libmtmd) sees is what the trained encoder sees."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from rx_edge.backends.base import PAIRING_KEY
from rx_edge.config import ImageRecipe, ModelConfig, PromptConfig
from rx_edge.errors import ExportError
from rx_edge.model.projector import Projector
from rx_edge_export import mmproj_check
from rx_edge_export import mmproj_gguf as writer
from tests.export.mmproj_helpers import (
    FAMILIES,
    RECIPE,
    Tiny,
    encode,
    make_tiny,
    phantom_pixels,
    tiny_encoder,
)
from tests.factories import IMAGE_SIZE


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("stock"))


@pytest.fixture
def copied(tiny: Tiny) -> Any:
    """A DINOv2 encoder that a test may change."""
    return copy.deepcopy(tiny.encoders["dinov2"])


@pytest.mark.parametrize("family", FAMILIES)
def test_libmtmd_computes_the_trained_soft_prompt(tiny: Tiny, family: str) -> None:
    rng = np.random.default_rng(5)
    colours = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8)
    mean, std = (np.asarray(v, np.float32) for v in (RECIPE.mean, RECIPE.std))
    normal = (colours.astype(np.float32) / 255 - mean) / std  # (S, S, 3)
    pixels = np.ascontiguousarray(normal.transpose(2, 0, 1)[None])
    wanted = encode(tiny.encoders[family])(pixels)[0]
    for exact in (True, False):
        found = mmproj_check.soft_prompt(tiny.mmproj(family), tiny.llm, colours, exact=exact)
        assert found.shape == wanted.shape == (4, 64)
        assert mmproj_check.min_cosine(found, wanted) >= 0.9999
        assert mmproj_check.relative_difference(found, wanted) < mmproj_check.DIFFERENCE


def test_a_larger_pretraining_grid_is_interpolated(tiny: Tiny, tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path, "vit", image_size=2 * IMAGE_SIZE)
    assert encoder.vision.grid == IMAGE_SIZE // 14
    tiny.write(encoder, tmp_path / "m.gguf")
    found = mmproj_check.compare(
        tmp_path / "m.gguf", tiny.llm, {"a": tiny.pixels}, RECIPE, encode(encoder)
    )
    assert all(s.passed for s in found.stages)


def test_larger_squares_of_patches_are_joined_in_the_same_order(tiny: Tiny, tmp_path: Path) -> None:
    size, model = 2 * IMAGE_SIZE, ModelConfig(pooling="pixel-shuffle-4x4")  # 2 x 2 soft tokens
    recipe = dataclasses.replace(RECIPE, size=size)
    encoder = tiny_encoder(tmp_path, "dinov2", size, model, image_size=size)
    assert tiny.write(encoder, tmp_path / "m.gguf", image=recipe)["soft_tokens"] == 4
    found = mmproj_check.compare(
        tmp_path / "m.gguf", tiny.llm, {"a": phantom_pixels(recipe)}, recipe, encode(encoder)
    )
    assert all(s.passed for s in found.stages)


@pytest.mark.parametrize("change", [{"hidden_act": "quick_gelu"}, {"qkv_bias": False}])
def test_other_settings_that_internvl_computes(
    tiny: Tiny, tmp_path: Path, change: dict[str, Any]
) -> None:
    encoder = tiny_encoder(tmp_path, "vit", **change)
    tiny.write(encoder, tmp_path / "m.gguf")
    found = mmproj_check.compare(
        tmp_path / "m.gguf", tiny.llm, {"a": tiny.pixels}, RECIPE, encode(encoder)
    )
    assert all(s.passed for s in found.stages)


def test_half_precision(tiny: Tiny, tmp_path: Path) -> None:
    summary = tiny.write(tiny.encoders["dinov2"], tmp_path / "m.gguf", dtype="f16")
    assert summary["tensor_types"] == {"F16": 14, "F32": 34}  # 6 matrices a layer, 2 in the MLP
    assert summary["bytes"] < tiny.mmproj("dinov2").stat().st_size
    assert tiny.failures(tmp_path / "m.gguf", "dinov2") == []


# --- planted faults -----------------------------------------------------------------------------


def cls_first(tiny: Tiny, out: Path, patch: pytest.MonkeyPatch, encoder: Any) -> None:
    patch.setattr(writer.np, "roll", lambda array, *_, **__: array)
    tiny.write(encoder, out)


def no_layer_scale(tiny: Tiny, out: Path, patch: pytest.MonkeyPatch, encoder: Any) -> None:
    every = writer._tower_tensors
    patch.setattr(
        writer, "_tower_tensors", lambda t: [x for x in every(t) if ".ls" not in x.target]
    )
    patch.setattr(writer, "_check_complete", lambda *_: None)
    tiny.write(encoder, out)


def channels_swapped(tiny: Tiny, out: Path, patch: pytest.MonkeyPatch, encoder: Any) -> None:
    tiny.write(encoder, out, image=dataclasses.replace(RECIPE, mean=RECIPE.mean[::-1]))


def other_eps(tiny: Tiny, out: Path, patch: pytest.MonkeyPatch, encoder: Any) -> None:
    encoder.vision.encoder.config.layer_norm_eps = 0.05  # 1e-5 for 1e-6 changes nothing visible
    tiny.write(encoder, out)


def shuffle_transposed(tiny: Tiny, out: Path, patch: pytest.MonkeyPatch, encoder: Any) -> None:
    def swap(values: torch.Tensor) -> torch.Tensor:  # (..., 2 * 2 * C), rows and columns swapped
        blocks = values.reshape(*values.shape[:-1], 2, 2, -1)
        return blocks.transpose(-2, -3).reshape(values.shape)

    norm, linear = encoder.projector.net[0], encoder.projector.net[1]
    for parameter in (norm.weight, norm.bias, linear.weight):
        parameter.data = swap(parameter.data).contiguous()
    tiny.write(encoder, out)


def scaled(tiny: Tiny, out: Path, patch: pytest.MonkeyPatch, encoder: Any) -> None:
    for parameter in encoder.projector.net[3].parameters():
        parameter.data.mul_(1.05)
    tiny.write(encoder, out)


@pytest.mark.parametrize(
    ("fault", "metrics"),
    [
        (cls_first, ["1 - cosine", "relative difference"]),
        (no_layer_scale, ["1 - cosine", "relative difference"]),
        (channels_swapped, ["1 - cosine", "relative difference"]),
        (other_eps, ["relative difference"]),
        (shuffle_transposed, ["1 - cosine", "relative difference"]),
        (scaled, ["relative difference"]),  # what the cosine cannot see
    ],
)
def test_planted_fault_is_caught(
    tiny: Tiny,
    copied: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., None],
    metrics: list[str],
) -> None:
    with monkeypatch.context() as patch:
        fault(tiny, tmp_path / "m.gguf", patch, copied)
    assert tiny.failures(tmp_path / "m.gguf", "dinov2") == metrics


# --- refusals -----------------------------------------------------------------------------------


def set_config(**changes: Any) -> Callable[[Any], None]:
    def change(encoder: Any) -> None:
        for key, value in changes.items():
            setattr(encoder.vision.encoder.config, key, value)

    return change


def set_projector(**config: Any) -> Callable[[Any], None]:
    def change(encoder: Any) -> None:
        vision = encoder.vision
        encoder.projector = Projector(
            ModelConfig(**config), grid=vision.grid, width=vision.width, lm_width=64
        )

    return change


def add_parameter(encoder: Any) -> None:
    encoder.vision.encoder.embeddings.register_parameter(
        "surprise", torch.nn.Parameter(torch.ones(3))
    )


def set_eps(encoder: Any) -> None:
    encoder.projector.net[0].eps = 1e-6


def drop_row(encoder: Any) -> None:
    embeddings = encoder.vision.encoder.embeddings
    embeddings.position_embeddings = torch.nn.Parameter(embeddings.position_embeddings[:, 1:])


def set_nan(encoder: Any) -> None:
    encoder.projector.net[3].bias.data[0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_projector(pooling="none"), r"pooling is 'none'.*pooling = \"pixel-shuffle-2x2\""),
        (set_projector(projector="linear"), r"is Linear, but.*projector = \"layernorm-mlp\""),
        (set_eps, "eps 1e-06, but llama.cpp always uses 1e-05"),
        (set_config(model_type="siglip"), "'siglip'.*use a 'vit' tower"),
        (
            set_config(model_type="dinov2_with_registers"),
            "register tokens have no place.*use a 'dinov2' tower",
        ),
        (set_config(use_swiglu_ffn=True), "SwiGLU.*small, base or large"),
        (set_config(hidden_act="relu"), "activation is 'relu'.*'quick_gelu'"),
        (set_config(num_channels=1), "takes 1 channels"),
        (set_config(num_hidden_layers=3), r"18 tensor\(s\).*'v.blk.2.attn_k.bias'"),
        (set_config(patch_size=16), "image.size is 56.*use image.size = 64"),
        (add_parameter, r"'embeddings.surprise' \(3,\) has no place"),
        (drop_row, "position embedding has 16 rows"),
        (set_nan, "mm.model.mlp.3.bias holds NaN"),
    ],
)
def test_refused(
    tiny: Tiny, copied: Any, tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    out = tmp_path / "m.gguf"
    out.write_bytes(b"older")
    change(copied)
    with pytest.raises(ExportError, match=message):
        tiny.write(copied, out)
    assert out.read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": PromptConfig(image_begin="<image>")}, r"'<image>' and '</img>'.*\"<img>\""),
        ({"prompt": PromptConfig(template="<__media__>{image}")}, "'<__media__>'"),
        ({"image": ImageRecipe(size=70)}, "image.size is 70.*use image.size = 56"),
        ({"image": dataclasses.replace(RECIPE, std=(0.2, 0.0, 0.2))}, "std > 0"),
        ({"dtype": "q8_0"}, "'q8_0'; valid: 'f32', 'f16'"),
    ],
)
def test_refused_settings(
    tiny: Tiny, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        tiny.write(tiny.encoders["vit"], tmp_path / "m.gguf", **changes)
    assert list(tmp_path.iterdir()) == []


def test_odd_normalisation_is_carried(tiny: Tiny, tmp_path: Path) -> None:
    recipe = ImageRecipe(size=IMAGE_SIZE, mean=(0.1, 0.5, 0.9), std=(0.3, 1.0, 0.7))
    tiny.write(tiny.encoders["vit"], tmp_path / "m.gguf", image=recipe)
    pixels = phantom_pixels(recipe)
    found = mmproj_check.compare(
        tmp_path / "m.gguf", tiny.llm, {"a": pixels}, recipe, encode(tiny.encoders["vit"])
    )
    assert all(s.passed for s in found.stages)


# --- the file -----------------------------------------------------------------------------------


def test_same_encoder_same_bytes_and_pairing_inside(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny.write(tiny.encoders["dinov2"], tmp_path / name, pairing="c" * 64)
    found = {
        hashlib.sha256(p.read_bytes()).hexdigest()
        for p in (tmp_path / "a", tmp_path / "b", tiny.mmproj("dinov2"))
    }
    assert len(found) == 1
    fields = GGUFReader(tmp_path / "a").fields
    assert fields[PAIRING_KEY].contents() == "c" * 64
    assert fields["clip.projector_type"].contents() == "internvl"
    eps = fields["clip.vision.attention.layer_norm_epsilon"].contents()
    assert eps == pytest.approx(tiny.encoders["dinov2"].vision.encoder.config.layer_norm_eps)
    tiny.write(tiny.encoders["dinov2"], tmp_path / "c")
    assert PAIRING_KEY not in GGUFReader(tmp_path / "c").fields
