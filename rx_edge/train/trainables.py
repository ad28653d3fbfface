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
    if "vision" in stage.trains:
        chosen += [p for n, p in model.vision.named_parameters() if ".lora_" not in n]
    if "vision-lora" in stage.trains:
        chosen += [p for n, p in model.vision.named_parameters() if ".lora_" in n]
    if "lm" in stage.trains:
        chosen += [p for n, p in model.lm.named_parameters() if ".lora_" not in n]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def trains_vision(stage: StageConfig) -> bool:
    """Whether features computed before or during the stage are stale after one of its steps."""
    return not {"vision", "vision-lora"}.isdisjoint(stage.trains)
