"""Tiny encoders of each family that an mmproj can hold, and the language model beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rx_edge import image
from rx_edge.config import ImageRecipe, ModelConfig, PromptConfig
from rx_edge.model.projector import Projector
from rx_edge.model.report_model import SoftPromptEncoder
from rx_edge.model.vision import load_vision
from rx_edge.types import FloatArray, ImageTensor, Radiograph
from rx_edge_export import llm_gguf, mmproj_check, phantom
from rx_edge_export import mmproj_gguf as writer
from tests.factories import IMAGE_SIZE, tiny_llama_dir, tiny_vit_dir

RECIPE = ImageRecipe(size=IMAGE_SIZE)
FAMILIES = ("dinov2", "vit")


def tower_dir(root: Path, family: str, **config: Any) -> Path:
    from transformers import ViTConfig, ViTModel

    if family == "dinov2":
        return tiny_vit_dir(root / family)
    settings: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "image_size": IMAGE_SIZE, "patch_size": 14,
        "initializer_range": 0.2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTModel(ViTConfig(**settings | config), add_pooling_layer=False).save_pretrained(
            root / family
        )
    return root / family


def tiny_encoder(
    root: Path,
    family: str,
    size: int = IMAGE_SIZE,
    model: ModelConfig | None = None,
    **config: Any,
) -> Any:
    """Every parameter is away from its 0 or 1, so that losing one shows."""
    vision = load_vision(str(tower_dir(root, family, **config)), size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        projector = Projector(
            model or ModelConfig(), grid=vision.grid, width=vision.width, lm_width=64
        )
        encoder = SoftPromptEncoder(vision, projector).eval()
        for parameter in encoder.parameters():
            parameter.data.add_(torch.randn(parameter.shape) * 0.15)
    return encoder


def encode(encoder: torch.nn.Module) -> Callable[[ImageTensor], FloatArray]:
    def run(pixels: ImageTensor) -> FloatArray:
        with torch.inference_mode():
            out: FloatArray = encoder(torch.from_numpy(pixels)).numpy()
        return out

    return run


@dataclasses.dataclass
class Tiny:
    """A language model, and an encoder of each family with its mmproj file."""

    root: Path
    llm: Path
    encoders: dict[str, Any]
    pixels: ImageTensor

    def mmproj(self, family: str) -> Path:
        return self.root / f"{family}.gguf"

    def write(self, encoder: Any, out: Path, **changes: Any) -> dict[str, Any]:
        given: dict[str, Any] = {"image": RECIPE, "prompt": PromptConfig(), "name": "tiny"}
        given |= changes
        return writer.write(encoder, given.pop("image"), given.pop("prompt"), out, **given)

    def failures(self, mmproj: Path, family: str) -> list[str]:
        """Metrics outside their tolerance, against the unchanged encoder."""
        found = mmproj_check.compare(
            mmproj, self.llm, {"phantom": self.pixels}, RECIPE, encode(self.encoders[family])
        )
        return [s.metric for s in found.stages if not s.passed]


def make_tiny(root: Path) -> Tiny:
    llama = tiny_llama_dir(root / "llama")
    llm_gguf.write(llama, root / "llm.gguf", dtype="f32", name="tiny")
    encoders = {family: tiny_encoder(root, family) for family in FAMILIES}
    made = Tiny(root, root / "llm.gguf", encoders, phantom_pixels(RECIPE))
    for family, encoder in encoders.items():
        made.write(encoder, made.mmproj(family), pairing="c" * 64)
    return made


def phantom_pixels(recipe: ImageRecipe) -> ImageTensor:
    shown = phantom.display(3)
    return image.prepare(Radiograph(shown, image.pixel_sha256(shown)), recipe)
