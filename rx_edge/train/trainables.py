"""What a stage may change: the tensors that its `trains` names.

Does not cover: the loop (`stages.py`), saving what was trained (`checkpoint.py`).
"""

from __future__ import annotations

import torch

from rx_edge.config import StageConfig
from rx_edge.model.report_model import ReportModel


def trainable(model: ReportModel, stage: StageConfig) -> list[torch.nn.Parameter]:
    """Switch gradients on for what the stage trains, and off for everything else."""
    model.requires_grad_(False)
    chosen = []
    if "projector" in stage.trains:
        chosen += list(model.projector.parameters())
    if "lora" in stage.trains:
        chosen += [p for n, p in model.lm.named_parameters() if ".lora_" in n]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen
