"""What a step minimises: nats of the report's tokens, given the image and the prompt.

One module from reports to a loss, so that DDP and FSDP wrap the whole of it.

Does not cover: which reports make a step (`batching.py`), nor who computes which (`engine.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from rx_edge.model.language import hidden_states
from rx_edge.model.report_model import IGNORE, ReportModel
from rx_edge.train.batching import Batch, Example, collate
from rx_edge.train.features import Features


def nats_of(model: ReportModel, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood in nats, summed over the batch's report tokens.

    Logits are computed only where there is a target: the vocabulary head is a fifth of a small LM.
    """
    if batch.lengths is None:
        hidden = hidden_states(model.lm, batch.embeds, batch.mask)
    else:
        hidden = _packed_states(model, batch)
    wanted = batch.targets != IGNORE
    logits = model.lm.get_output_embeddings()(hidden[wanted])
    return torch.nn.functional.cross_entropy(logits.float(), batch.targets[wanted], reduction="sum")


def loss_of(model: ReportModel, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood in nats per report token."""
    return nats_of(model, batch) / (batch.targets != IGNORE).sum()


class Objective(torch.nn.Module):
    """Reports to nats: features, projector, prompt, LM, loss.

    Args:
        features: of the reports' images; None for text only.
        packed: reports in one row, inside `packed_attention(model.lm)`.
        dtype: of the products (autocast); float32 switches it off.
    """

    def __init__(
        self,
        model: ReportModel,
        features: Features | None,
        *,
        packed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.model = model
        self.features = features
        self.packed = packed
        self.dtype = dtype

    def forward(self, items: Sequence[Example]) -> torch.Tensor:
        """Sum of nats over the report tokens of `items`, a float32 scalar."""
        device = next(self.model.projector.parameters()).device
        low = torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        # the model turns ids into tensors without saying where
        with low, contextlib.nullcontext() if device.type == "cpu" else device:
            return nats_of(
                self.model, collate(self.model, items, self.features, packed=self.packed)
            )


def _packed_states(model: ReportModel, batch: Batch) -> torch.Tensor:
    base = model.lm.get_base_model()
    body = getattr(base, base.base_model_prefix)
    out: torch.Tensor = body(
        inputs_embeds=batch.embeds,
        position_ids=batch.positions,
        sample_lengths=batch.lengths,
        shared_tokens=batch.shared,
        use_cache=False,
    ).last_hidden_state
    return out
