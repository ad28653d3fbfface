"""Pooling and projection: patch features to soft prompt in the LM's embedding space.

Pixel shuffle + LayerNorm + Linear-GELU-Linear is what stock llama.cpp's `internvl` mmproj
computes. The output starts at the scale of the LM's own token embeddings, so that the frozen
LM of stage 1 is fed plausible vectors from the first step.
"""

from __future__ import annotations

import torch
from torch import nn

from rx_edge.config import ModelConfig
from rx_edge.errors import ModelError

JOINS = "pixel-shuffle"
HEAD = 64  # width of one of the resampler's attention heads, where the tower's width allows it


class Projector(nn.Module):
    """(B, grid*grid, C) patch features -> (B, N, D_lm) soft prompt.

    Attributes:
        pooling: as `ModelConfig.pooling`.
        shuffle: side of the squares of patches that pixel shuffle joins; 0 = another pooling.
        tokens: N.
    """

    def __init__(self, config: ModelConfig, *, grid: int, width: int, lm_width: int) -> None:
        super().__init__()
        self.pooling, self.grid = config.pooling, grid
        self.shuffle = int(config.pooling[-1]) if config.pooling.startswith(JOINS) else 0
        self.pool, self.tokens = _pooling(config, grid, width), soft_tokens(config, grid)
        inner = width * max(1, self.shuffle) ** 2
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
        out: torch.Tensor = self.net(self.pool(features))
        return out

    @torch.no_grad()
    def start_at_scale(self, features: torch.Tensor, embedding_std: float) -> None:
        """Scale the last layer so that the output's std over `features` is `embedding_std`."""
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        last.bias.zero_()
        factor = embedding_std / float(self(features).std().clamp_min(1e-6))
        last.weight.mul_(factor)


def soft_tokens(config: ModelConfig, grid: int) -> int:
    """N of a `Projector` over grid x grid features."""
    if config.pooling == "none":
        return grid * grid
    if config.pooling == "resampler":
        return config.queries
    return int((grid // int(config.pooling[-1])) ** 2)


def _pooling(config: ModelConfig, grid: int, width: int) -> nn.Module:
    if config.pooling == "none":
        return nn.Identity()
    if config.pooling == "resampler":
        if config.queries < 1:
            raise ModelError(f"model.queries is {config.queries}; at least 1")
        return _Resampler(config.queries, width)
    side = int(config.pooling[-1])  # "average-3x3"
    if grid % side:
        needs = "an even patch grid" if side == 2 else f"a patch grid that {side} divides"
        raise ModelError(
            f"pooling {config.pooling!r} needs {needs}, this tower has {grid}; choose an image "
            "size of such a number of patches, pooling = 'resampler' or pooling = 'none'"
        )
    return _Blocks(grid, side, join=config.pooling.startswith(JOINS))


class _Blocks(nn.Module):
    """Each block of side x side patches becomes one token: joined side by side, or averaged."""

    def __init__(self, grid: int, side: int, *, join: bool) -> None:
        super().__init__()
        self.rows, self.side, self.join = grid // side, side, join

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, grid*grid, C) -> (B, N, side*side*C), or (B, N, C) averaged."""
        batch, _, width = features.shape
        rows, side = self.rows, self.side
        features = features.reshape(batch, rows, side, rows, side, width)
        if not self.join:
            return features.mean(dim=(2, 4)).reshape(batch, rows * rows, width)
        features = features.permute(0, 1, 3, 2, 4, 5)
        return features.reshape(batch, rows * rows, side * side * width)


class _Resampler(nn.Module):
    """Learned queries attend once to all patches: as many tokens as wanted, from any grid.

    There is no position embedding of its own: the tower's features carry their positions.
    """

    def __init__(self, queries: int, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD if width % HEAD == 0 else 1
        self.queries = nn.Parameter(torch.randn(queries, width) * width**-0.5)
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, P, C) -> (B, queries, C)."""
        batch, _, width = features.shape
        features = self.norm(features)
        queries = self.queries.expand(batch, -1, -1)
        q, k, v = (
            layer(x).reshape(batch, -1, self.heads, width // self.heads).transpose(1, 2)
            for layer, x in ((self.q, queries), (self.k, features), (self.v, features))
        )
        seen = nn.functional.scaled_dot_product_attention(q, k, v)  # (B, heads, queries, C/heads)
        out: torch.Tensor = queries + self.out(seen.transpose(1, 2).reshape(batch, -1, width))
        return out
