"""Sequence packing: the reports of a step in one row, none of which sees another.

Attention is computed sample by sample on slices of the row, so that there is nothing to mask: no
product is spent on padding or on a neighbour, which a block-diagonal mask of the whole row would
compute and throw away. The constant start of the prompt is in the row once, and every sample
attends to it: its keys and values are the same for all, and gradients add up in them. While
training its dropout is the same for all, too.

Does not cover: building the row (`batching.py`), and flash attention's varlen kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch

from rx_edge.errors import ConfigError

T = TypeVar("T")

_NAME = "rx_edge_packed"  # under which transformers knows `_attend`


def packs(items: Sequence[T], lengths: Sequence[int], limit: int) -> list[list[T]]:
    """Rows of at most `limit` tokens: longest first, each into the first row with room for it.

    An item longer than `limit` gets a row of its own. Nothing is lost, and the same input gives
    the same rows.
    """
    rows: list[list[T]] = []
    room: list[int] = []
    for index in sorted(range(len(items)), key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if left >= lengths[index]), None)
        if row is None:
            rows.append([])
            room.append(limit)
            row = -1
        rows[row].append(items[index])
        room[row] -= lengths[index]
    return rows


@contextlib.contextmanager
def packed_attention(lm: Any) -> Iterator[None]:
    """Inside, `lm` (a transformers or peft causal LM) understands `sample_lengths` and
    `shared_tokens` in a forward.

    Without that argument it attends as before, so that one model serves both.

    Raises:
        ConfigError: the LM attends within a window or not through PyTorch's attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    base = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
    before = base.config._attn_implementation
    window = getattr(base.config, "sliding_window", None)
    if before != "sdpa" or window is not None:
        reason = f"attends within {window} tokens" if window else f"uses {before!r} attention"
        raise ConfigError(
            f"engine.packing: this language model {reason}, which is not supported; "
            "set engine.packing = false"
        )
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, _mask)
    base.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sample_lengths: Sequence[int] | None = None,
    shared_tokens: int = 0,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """(1, heads, T, d) and (1, kv heads, T, d) twice -> (1, T, heads, d), sample by sample."""
    if sample_lengths is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return out
    start, *parts = zip(
        *(
            torch.split(tensor, [shared_tokens, *sample_lengths], dim=2)
            for tensor in (query, key, value)
        ),
        strict=True,
    )
    how = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    attended = [attend(*start, is_causal=True, **how)] if shared_tokens else []
    for q, k, v in parts:
        seen = torch.cat([start[1], k], dim=2), torch.cat([start[2], v], dim=2)
        size = q.shape[2], seen[0].shape[2]
        mask = torch.ones(size, dtype=torch.bool, device=q.device).tril(shared_tokens)
        attended.append(attend(q, *seen, attn_mask=mask, **how))
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """No mask for a packed row, which comes without one; else what PyTorch's attention gets."""
    if attention_mask is None:
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
