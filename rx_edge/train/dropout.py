"""Dropout on a CPU: the same distribution from a quarter of the random numbers.

PyTorch draws one number after another in one thread, which is a sixth of a training step of a small
LM. Here a draw of 64 bits decides four elements: each is dropped with `p` rounded to 1 / 65536.
The numbers come from PyTorch's generator, so that a seed and a checkpoint mean what they did.

Does not cover: other devices, whose own dropout is fast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_STEPS = 2**16  # values of 16 bits


class CpuDropout(nn.Dropout):
    """`nn.Dropout` for CPU tensors: while training, x * mask / (1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__(p)
        self.dropped = round(p * _STEPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape -> the same."""
        if not self.training or not self.dropped:
            return x
        out: torch.Tensor = _Dropped.apply(x, self.dropped)  # type: ignore[no-untyped-call]
        return out


class _Dropped(torch.autograd.Function):
    """A byte an element is kept for the way back; PyTorch keeps a float."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dropped: int) -> torch.Tensor:
        kept = _bits(x.numel()).view(x.shape) >= dropped - _STEPS // 2
        ctx.scale = _STEPS / (_STEPS - dropped)
        ctx.save_for_backward(kept)
        return _scaled(x, kept, ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (kept,) = ctx.saved_tensors
        return _scaled(gradients[0], kept, ctx.scale), None


def use_cpu_dropout(lm: nn.Module) -> None:
    """Replace every `nn.Dropout` that drops anything in a LM on the CPU: those of its adapter."""
    for module in list(lm.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout and child.p:
                setattr(module, name, CpuDropout(child.p))


def _bits(count: int) -> torch.Tensor:
    """Random int16 (count,), uniform over all values."""
    return (
        torch.empty(-(-count // 4), dtype=torch.int64)
        .random_(-(2**63), None)
        .view(torch.int16)[:count]
    )


def _scaled(x: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
    return kept.to(x.dtype).mul_(x).mul_(scale)
