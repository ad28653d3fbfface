"""Dropout from a quarter of the random numbers is dropout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rx_edge.config import LoraSettings
from rx_edge.model.language import load_language, with_lora
from rx_edge.train.dropout import CpuDropout, use_cpu_dropout

P = 0.05
COUNT = 1_000_003  # no multiple of four


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(COUNT).abs_().add_(0.1)


def close(share: float, p: float, count: int) -> bool:
    return abs(share - p) < 4 * math.sqrt(p * (1 - p) / count)


def test_elements_are_dropped_independently_and_the_rest_is_scaled(x: torch.Tensor) -> None:
    found = CpuDropout(P)(x)
    dropped = found == 0
    assert close(dropped.float().mean().item(), P, COUNT)
    torch.testing.assert_close(found[~dropped], x[~dropped] / (1 - P), rtol=1e-5, atol=0)
    for lag in range(1, 9):  # those of one draw, and of neighbours
        both = (dropped[lag:] & dropped[:-lag]).float().mean().item()
        assert close(both, P * P, COUNT), lag
    for place in range(4):
        assert close(dropped[place::4].float().mean().item(), P, COUNT // 4), place


def test_the_gradient_goes_where_the_value_went(x: torch.Tensor) -> None:
    x.requires_grad_()
    found = CpuDropout(P)(x)
    found.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), found.detach())
    x.grad = None
    torch.manual_seed(3)
    checkpoint(CpuDropout(P), x, use_reentrant=False).sum().backward()  # type: ignore[no-untyped-call]
    again = x.grad
    torch.manual_seed(3)
    assert torch.equal(again != 0, CpuDropout(P)(x) != 0)


def test_the_seed_decides_and_evaluation_drops_nothing(x: torch.Tensor) -> None:
    dropout = CpuDropout(P)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(dropout(x))
    torch.manual_seed(1)
    dropout(x)
    found.append(dropout(x))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])
    assert dropout.eval()(x) is x
    assert CpuDropout(0.0)(x) is x


def test_the_adapter_uses_it(tiny_base: Path) -> None:
    lm = with_lora(load_language(str(tiny_base / "llama")), LoraSettings(dropout=P))
    before = set(lm.state_dict())
    use_cpu_dropout(lm)
    kinds = [type(m) for m in lm.modules()]
    assert torch.nn.Dropout not in kinds
    assert kinds.count(CpuDropout) == sum("lora_A" in name for name in before)
    assert set(lm.state_dict()) == before
