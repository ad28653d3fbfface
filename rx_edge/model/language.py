"""The causal LM and its LoRA adapter (peft).

Does not cover: the soft prompt (`projector.py`) and GGUF/ONNX (`rx_edge_export`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from rx_edge.config import LoraSettings
from rx_edge.errors import ModelError
from rx_edge.model import sentencepiece_check
from rx_edge.model.catalogue import locate
from rx_edge.model.hub import source, transformers

_DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout")


def load_language(name: str) -> Any:
    """A float32 causal LM in eval mode (transformers `PreTrainedModel`), without dropout.

    GPT-2's own 0.1 would also fall on a frozen LM in stage 1, and on soft prompts; what is
    regularised is the adapter (`LoraSettings.dropout`).

    Raises:
        ModelError: weights are missing from the directory.
    """
    where, hf = source(locate(name)), transformers()
    config = hf.AutoConfig.from_pretrained(**where)
    for setting in _DROPOUTS:
        if hasattr(config, setting):
            setattr(config, setting, 0.0)
    model, info = hf.AutoModelForCausalLM.from_pretrained(
        **where, config=config, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ModelError(
            f"language model {name!r} lacks weights: {sorted(info['missing_keys'])[:3]}"
        )
    return model.eval()


def tokenizer_file(name: str) -> Path:
    """The tokenizer.json of the LM `name`.

    Raises:
        ModelError: the directory has none, `name` is a hub id that is not on disk, or a
            tokenizer.model beside it gives other ids.
    """
    path = Path(locate(name)) / "tokenizer.json"
    if path.is_file():
        sentencepiece_check.check(path.parent)
        return path
    if path.with_name("tokenizer.model").is_file():
        raise ModelError(
            f"language model {name!r} has a tokenizer.model and no tokenizer.json in "
            f"{str(path.parent)!r}; make one with transformers: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    raise ModelError(
        f"language model {name!r} has no tokenizer.json at {str(path)!r}; "
        "download the model and register its directory with `rx-edge models add`"
    )


def with_lora(model: Any, settings: LoraSettings) -> Any:
    """Attach a fresh adapter; it starts as the identity (B = 0).

    Raises:
        ModelError: a target name matches no layer of this LM.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, stored as (in, out)

    linear = {
        n.rpartition(".")[2]: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D)
    }
    names = set(linear)
    unknown = sorted(set(settings.targets) - names)
    if unknown:
        raise ModelError(
            f"lora.targets {unknown} are no linear layers here; valid: {sorted(names)}"
        )
    return get_peft_model(
        model,
        LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=sorted(settings.targets),
            task_type="CAUSAL_LM",
            fan_in_fan_out=any(isinstance(linear[t], Conv1D) for t in settings.targets),
        ),
    )


def hidden_states(model: Any, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Last hidden states (B, T, D) of the decoder body, without the vocabulary head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = getattr(base, base.base_model_prefix)
    out: torch.Tensor = body(
        inputs_embeds=embeds, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return out
