"""The vision tower: pixels to patch features, with the position embedding fixed to one size.

The embedding is interpolated once, at load, so that training, ONNX and llama.cpp's mmproj all
multiply the same numbers. Families are listed in `_FAMILIES`; an unlisted one is refused,
because whether token 0 is a CLS token cannot be guessed.

Does not cover: pooling and projection (`projector.py`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from rx_edge.errors import ModelError
from rx_edge.model.catalogue import locate
from rx_edge.model.hub import source, transformers

# model_type -> number of leading tokens that are not patches
_FAMILIES = {"dinov2": 1, "vit": 1}


class VisionTower(nn.Module):
    """A frozen-size Hugging Face ViT.

    Attributes:
        width: feature width C.
        grid: patches per side; the tower yields grid x grid patch features.
    """

    def __init__(self, encoder: nn.Module, image_size: int) -> None:
        super().__init__()
        config: Any = encoder.config
        self.encoder = encoder
        self.prefix_tokens = _FAMILIES[config.model_type]
        self.width = int(config.hidden_size)
        self.grid = image_size // int(config.patch_size)
        _fix_position_embedding(encoder, self.grid, self.prefix_tokens, image_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) float32 -> (B, grid*grid, C) float32, row-major patches, no CLS."""
        hidden: torch.Tensor = self.encoder(pixel_values).last_hidden_state
        return hidden[:, self.prefix_tokens :]


def load_vision(name: str, image_size: int) -> VisionTower:
    """Load the tower `name` for square inputs of `image_size` pixels.

    Raises:
        ModelError: unsupported family, size not a multiple of the patch, missing weights.
    """
    where, hf = source(locate(name)), transformers()
    config = hf.AutoConfig.from_pretrained(**where)
    if config.model_type not in _FAMILIES:
        raise ModelError(
            f"vision tower {name!r} is a {config.model_type!r}; supported: "
            f"{', '.join(sorted(_FAMILIES))}"
        )
    if image_size % config.patch_size:
        raise ModelError(
            f"image size {image_size} is not a multiple of the patch size {config.patch_size} "
            f"of {name!r}; use {image_size // config.patch_size * config.patch_size}"
        )
    extra = {"add_pooling_layer": False} if config.model_type == "vit" else {}
    encoder, info = hf.AutoModel.from_pretrained(
        **where, dtype=torch.float32, output_loading_info=True, **extra
    )
    if info["missing_keys"]:
        raise ModelError(
            f"vision tower {name!r} lacks weights: {sorted(info['missing_keys'])[:3]}; "
            "a randomly initialised part would be silently wrong"
        )
    return VisionTower(encoder.eval(), image_size)


def _fix_position_embedding(encoder: Any, grid: int, prefix: int, image_size: int) -> None:
    embeddings: Any = encoder.embeddings
    patches_of: Any = embeddings.patch_embeddings
    table: torch.Tensor = embeddings.position_embeddings.detach()  # (1, prefix + n*n, C)
    n = math.isqrt(table.shape[1] - prefix)
    if n != grid:
        patches = table[:, prefix:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
        resized = nn.functional.interpolate(
            patches, size=(grid, grid), mode="bicubic", align_corners=False
        )
        resized = resized.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)
        table = torch.cat([table[:, :prefix], resized], dim=1)
        embeddings.position_embeddings = nn.Parameter(table, requires_grad=False)
    # with a matching size the tower adds the table as it is, without interpolating again
    encoder.config.image_size = image_size
    embeddings.image_size = (image_size, image_size)  # ViT's own check
    patches_of.image_size = (image_size, image_size)
    patches_of.num_patches = grid * grid
