"""Pooling and projection: patch features to soft prompt in the LM's embedding space.

2x2 pixel shuffle + LayerNorm + Linear-GELU-Linear is what stock llama.cpp's `internvl` mmproj
computes. The output starts at the scale of the LM's own token embeddings, so that the frozen
LM of stage 1 is fed plausible vectors from the first step.
"""

from __future__ import annotations

import torch
from torch import nn

from rx_edge.config import ModelConfig
from rx_edge.errors import ModelError


class Projector(nn.Module):
    """(B, grid*grid, C) patch features -> (B, N, D_lm) soft prompt."""

    def __init__(self, config: ModelConfig, *, grid: int, width: int, lm_width: int) -> None:
        super().__init__()
        self.shuffle = config.pooling == "pixel-shuffle-2x2"
        if self.shuffle and grid % 2:
            raise ModelError(
                f"pooling 'pixel-shuffle-2x2' needs an even patch grid, this tower has {grid}; "
                "choose an image size of an even number of patches or pooling = 'none'"
            )
        self.grid = grid
        self.tokens = grid * grid // (4 if self.shuffle else 1)
        inner = width * (4 if self.shuffle else 1)
        if config.projector == "linear":
            self.net = nn.Sequential(nn.Linear(inner, lm_width))
        else:
            hidden = config.projector_hidden or lm_width
            self.net = nn.Sequential(
                nn.LayerNorm(inner),
                nn.Linear(inner, hidden),
                nn.GELU(),
                nn.Linear(hidden, lm_width),
            )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, grid*grid, C) -> (B, N, D_lm)."""
        if self.shuffle:
            batch, _, width = features.shape
            half = self.grid // 2
            # each 2x2 block becomes one token: its four feature vectors side by side
            features = features.reshape(batch, half, 2, half, 2, width)
            features = features.permute(0, 1, 3, 2, 4, 5).reshape(batch, half * half, 4 * width)
        out: torch.Tensor = self.net(features)
        return out

    @torch.no_grad()
    def start_at_scale(self, features: torch.Tensor, embedding_std: float) -> None:
        """Scale the last layer so that the output's std over `features` is `embedding_std`."""
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        last.bias.zero_()
        factor = embedding_std / float(self(features).std().clamp_min(1e-6))
        last.weight.mul_(factor)
