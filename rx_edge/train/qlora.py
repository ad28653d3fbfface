"""QLoRA: the frozen linear layers of the LM in 4 bits (NF4, bitsandbytes) while a stage trains.

What is trained stays float32, and what is measured, saved and exported is that on the float32
base, so that a run's files do not depend on this axis.

Does not cover: other 4-bit types, layers stored as GPT-2's Conv1D, sharding (FSDP).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rx_edge.errors import ModelError
from rx_edge.optional import require


def quantise(lm: Any, dtype: torch.dtype) -> int:
    """Replace every linear layer in the decoder body of a peft-wrapped `lm`; how many there were.

    Args:
        dtype: of the products.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        ModelError: the LM has no such layer.
    """
    nf4: Any = require("bitsandbytes", extra="qlora").nn
    base = lm.get_base_model()
    body: nn.Module = getattr(base, base.base_model_prefix)
    chosen = [
        name
        for name, module in body.named_modules()
        if type(module) is nn.Linear and ".lora_" not in name
    ]
    if not chosen:
        raise ModelError(
            f"engine.load_in_4bit: a {base.config.model_type!r} has no linear layers that "
            "bitsandbytes knows; set engine.load_in_4bit = false"
        )
    for name in chosen:
        parent, _, child = name.rpartition(".")
        layer = body.get_submodule(name)
        setattr(body.get_submodule(parent), child, _quantised(nf4, layer, dtype))
    return len(chosen)


def _quantised(nf4: Any, layer: Any, dtype: torch.dtype) -> nn.Module:
    out: nn.Module = nf4.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, dtype, quant_type="nf4"
    )
    weight = nf4.Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4")
    out.weight, out.bias = weight, layer.bias
    return out.to(layer.weight.device)  # which quantises
