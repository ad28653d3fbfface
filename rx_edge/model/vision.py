"""The vision tower: pixels to patch features, fixed to one image size and one output layer.

The position embedding is interpolated once, at load, so that training, ONNX and llama.cpp's mmproj
all multiply the same numbers. Blocks behind the chosen layer are dropped, so that nothing unused
is trained, hashed or shipped. Families are listed in `_FAMILIES`; an unlisted one is refused,
because whether token 0 is a CLS token cannot be guessed.

Does not cover: pooling and projection (`projector.py`).
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rx_edge.config import ImageRecipe, LoraSettings
from rx_edge.errors import ModelError
from rx_edge.model.catalogue import locate
from rx_edge.model.hub import source, transformers


@dataclass(frozen=True)
class _Family:
    """How one kind of tower is loaded and read.

    Attributes:
        loader: class of transformers; it takes the vision part out of a two-tower checkpoint.
        prefix: leading tokens that are not patches.
        layer: the output that `model.vision_layer = 0` stands for.
        without: what to leave out of the tower: heads and poolers that no patch passes through.
    """

    loader: str
    prefix: int
    layer: int = -1
    without: dict[str, Any] = field(default_factory=dict)


# CLIP compares the CLS token of its last block with a text: the last block's patch tokens never
# carried a loss, those before it feed that CLS token (LLaVA takes them as well)
_CLIP = _Family("CLIPVisionModel", prefix=1, layer=-2)
# SigLIP's head attends to all patches of the last layer, so they were trained; there is no CLS
_SIGLIP = _Family("SiglipVisionModel", prefix=0)
_FAMILIES = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "dinov2": _Family("Dinov2Model", prefix=1),  # RAD-DINO is one
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "swin": _Family("SwinModel", prefix=0, without={"add_pooling_layer": False}),
    "vit": _Family("ViTModel", prefix=1, without={"add_pooling_layer": False}),
}


class VisionTower(nn.Module):
    """A Hugging Face vision tower for one image size.

    Attributes:
        width: feature width C.
        grid: features per side; the tower yields grid x grid patch features.
        layer: the output that is taken: -1 the last with its layer norm, -2 the block before ...
    """

    def __init__(self, encoder: nn.Module, image_size: int, layer: int = -1) -> None:
        super().__init__()
        config: Any = encoder.config
        family = _FAMILIES[config.model_type]
        self.encoder = encoder
        self.prefix_tokens = family.prefix
        self.width = int(config.hidden_size)  # Swin: that of its last stage
        self.layer = layer
        patches = image_size // int(config.patch_size)
        self.grid = patches // _merging(config)
        if config.model_type != "swin":  # it only knows positions inside a window
            _fix_position_embedding(encoder, patches, family.prefix, image_size)
        if layer != -1:
            _cut(encoder, layer)
        if family is _CLIP:
            encoder.post_layernorm = nn.Identity()  # only its CLS token passes there

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) float32 -> (B, grid*grid, C) float32, row-major patches, no CLS."""
        hidden: torch.Tensor = self.encoder(pixel_values).last_hidden_state
        return hidden[:, self.prefix_tokens :]


def load_vision(name: str, image_size: int, layer: int = 0) -> VisionTower:
    """Load the tower `name` for square inputs of `image_size` pixels.

    Args:
        name: a vision tower, or a CLIP or SigLIP with both of its towers.
        layer: see `ModelConfig.vision_layer`.

    Raises:
        ModelError: unsupported family, a size or layer that it does not have, missing weights.
    """
    where, hf = source(locate(name)), transformers()
    family, config = _family(name)
    if family is _SIGLIP:
        config.vision_use_head = False
    layer = layer or family.layer
    _check(name, config, image_size, layer)
    encoder, info = getattr(hf, family.loader).from_pretrained(
        **where, config=config, dtype=torch.float32, output_loading_info=True, **family.without
    )
    if info["missing_keys"]:
        raise ModelError(
            f"vision tower {name!r} lacks weights: {sorted(info['missing_keys'])[:3]}; "
            "a randomly initialised part would be silently wrong"
        )
    return VisionTower(encoder.eval(), image_size, layer)


def grid_of(name: str, image_size: int) -> int:
    """`VisionTower.grid` of the tower `name`, from its config alone.

    Raises:
        ModelError: unsupported family, or not here.
    """
    _, config = _family(name)
    return image_size // int(config.patch_size) // _merging(config)


def add_lora(tower: VisionTower, settings: LoraSettings) -> None:
    """Put a fresh adapter on every linear layer of the tower; it starts as the identity (B = 0).

    It has no dropout: a tower stays in eval mode.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = [n for n, m in tower.encoder.named_modules() if isinstance(m, nn.Linear)]
    config = LoraConfig(r=settings.r, lora_alpha=settings.alpha, target_modules=linear)
    inject_adapter_in_model(config, tower.encoder)
    tower.eval()


def merged(tower: VisionTower) -> VisionTower:
    """A copy with its adapter, if it has one, folded into the weights; `tower` stays as it is."""
    from peft.tuners.lora import LoraLayer

    copied = copy.deepcopy(tower)
    for name, layer in list(copied.encoder.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            copied.encoder.set_submodule(name, layer.get_base_layer())
    return copied


def check_normalisation(name: str, image: ImageRecipe) -> None:
    """Refuse to train a tower on pixels that are normalised otherwise than it was trained on.

    Raises:
        ModelError: its preprocessor_config.json, where there is one, states another mean or std.
    """
    file = Path(locate(name)) / "preprocessor_config.json"
    stated = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        value, wanted = getattr(image, ours), tuple(stated.get(theirs) or ())
        if wanted and max(abs(a - b) for a, b in zip(value, wanted, strict=True)) > 1e-3:
            raise ModelError(
                f"image.{ours} is {list(value)}, but {name!r} was trained with {list(wanted)}; "
                f"set image.{ours} = {list(wanted)}"
            )


def _family(name: str) -> tuple[_Family, Any]:
    """How the tower `name` is loaded, and the config of its vision part."""
    config = transformers().AutoConfig.from_pretrained(**source(locate(name)))
    if config.model_type not in _FAMILIES:
        raise ModelError(
            f"vision tower {name!r} is a {config.model_type!r}; supported: "
            f"{', '.join(sorted(_FAMILIES))}"
        )
    return _FAMILIES[config.model_type], getattr(config, "vision_config", config)


def _merging(config: Any) -> int:
    """Patches per side of one feature: Swin joins 2x2 after every stage but the last."""
    return int(2 ** (len(config.depths) - 1)) if config.model_type == "swin" else 1


def _check(name: str, config: Any, image_size: int, layer: int) -> None:
    step, why = int(config.patch_size), f"the patch size {config.patch_size} of {name!r}"
    depth = 1 if config.model_type == "swin" else int(config.num_hidden_layers)
    if config.model_type == "swin":
        if config.use_absolute_embeddings:
            raise ModelError(f"vision tower {name!r} has absolute positions; use a Swin without")
        # transformers pads other sizes with zeros, which the window attention then looks at
        step *= _merging(config) * config.window_size
        why = f"{step}, at which the windows of {name!r} divide its last stage"
    if image_size < step or image_size % step:
        below = image_size // step * step
        raise ModelError(
            f"image size {image_size} is not a multiple of {why}; use "
            f"{f'{below} or ' if below else ''}{below + step}"
        )
    if not -depth <= layer <= -1:
        raise ModelError(
            f"model.vision_layer is {layer}, {name!r} has layers -{depth} to -1; 0 = its usual one"
        )


def _cut(encoder: Any, layer: int) -> None:
    """Drop the blocks behind `layer` and the final layer norm, which belongs to the last one."""
    inner = getattr(encoder, "encoder", encoder)  # ViT has its blocks at the top
    blocks = inner.layer if hasattr(inner, "layer") else inner.layers
    del blocks[len(blocks) + layer + 1 :]
    encoder.config.num_hidden_layers = len(blocks)
    norm = "layernorm" if hasattr(encoder, "layernorm") else "post_layernorm"
    setattr(encoder, norm, nn.Identity())


def _fix_position_embedding(encoder: Any, grid: int, prefix: int, image_size: int) -> None:
    embeddings: Any = encoder.embeddings
    as_rows = hasattr(embeddings, "position_embedding")  # CLIP, SigLIP: an nn.Embedding
    if as_rows:
        table: torch.Tensor = embeddings.position_embedding.weight.detach()[None]
    else:
        table = embeddings.position_embeddings.detach()  # (1, prefix + n*n, C)
    n = math.isqrt(table.shape[1] - prefix)
    if n * n + prefix != table.shape[1]:
        raise ModelError(
            f"the position embedding has {table.shape[1]} rows; {prefix} + a square is expected"
        )
    if n != grid:
        table = _interpolated(table, n, grid, prefix)
        if as_rows:
            rows = nn.Embedding(table.shape[1], table.shape[2])
            rows.weight = nn.Parameter(table[0], requires_grad=False)
            embeddings.position_embedding = rows
            embeddings.position_ids = torch.arange(table.shape[1])[None]
        else:
            embeddings.position_embeddings = nn.Parameter(table, requires_grad=False)
    # with a matching size the tower adds the table as it is, without interpolating again
    encoder.config.image_size = image_size
    embeddings.image_size = image_size if as_rows else (image_size, image_size)
    if not as_rows:
        embeddings.patch_embeddings.image_size = (image_size, image_size)
        embeddings.patch_embeddings.num_patches = grid * grid


def _interpolated(table: torch.Tensor, n: int, grid: int, prefix: int) -> torch.Tensor:
    """(1, prefix + n*n, C) -> (1, prefix + grid*grid, C)."""
    patches = table[:, prefix:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(
        patches, size=(grid, grid), mode="bicubic", align_corners=False
    )
    resized = resized.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)
    return torch.cat([table[:, :prefix], resized], dim=1)
