"""One stage of training: what may change, the optimiser, the loop.

Stage 1 aligns the projector with a frozen LM; stage 2 fine-tunes LoRA and projector. A stage is
data + a list of what it trains, so that text-only warm-ups and one-stage controls are recipes,
not code.

Does not cover: which stages there are (the recipe) and the run directory (`run.py`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rx_edge.config import StageConfig
from rx_edge.errors import TrainingError
from rx_edge.model.language import hidden_states
from rx_edge.model.report_model import IGNORE, ReportModel
from rx_edge.train.batching import Batch, Example, collate, epoch_order
from rx_edge.train.features import FeatureCache
from rx_edge.train.progress import load_progress, save_progress
from rx_edge.train.trainables import trainable

Tick = Callable[[int, int, float], None]  # step, steps, loss


def loss_of(model: ReportModel, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood in nats per report token.

    Logits are computed only where there is a target: the vocabulary head is a fifth of a small LM.
    """
    hidden = hidden_states(model.lm, batch.embeds, batch.mask)
    wanted = batch.targets != IGNORE
    logits = model.lm.get_output_embeddings()(hidden[wanted])
    return torch.nn.functional.cross_entropy(logits, batch.targets[wanted])


def run_stage(
    model: ReportModel,
    stage: StageConfig,
    items: list[Example],
    features: FeatureCache | None,
    directory: Path,
    tick: Tick,
) -> None:
    """Train one stage to its end, from its last checkpoint if there is one.

    Raises:
        TrainingError: the loss is not finite.
    """
    recipe = model.recipe
    directory.mkdir(parents=True, exist_ok=True)
    parameters = trainable(model, stage)
    optimiser = torch.optim.AdamW(
        parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay, betas=(0.9, 0.95)
    )
    per_epoch = math.ceil(len(items) / stage.batch_size)
    steps = max(1, round(per_epoch * stage.epochs))
    torch.manual_seed(recipe.seed)
    step = load_progress(directory, model, optimiser)
    log = _Log(directory / "metrics.jsonl", step)
    model.lm.train()  # dropout of the adapter; nothing else in these LMs behaves differently
    while step < steps:
        epoch, offset = divmod(step, per_epoch)
        batches = epoch_order(items, stage.batch_size, recipe.seed, stage.name, epoch)
        for batch_items in batches[offset : offset + steps - step]:
            started = time.perf_counter()
            rate = _set_rate(optimiser, stage, step, steps)
            batch = collate(model, batch_items, features)
            loss = loss_of(model, batch)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"stage {stage.name!r}: the loss is {loss.item()} at step {step}; lower "
                    f"learning_rate (now {stage.learning_rate}) and resume"
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(parameters, stage.max_grad_norm)
            optimiser.step()
            step += 1
            log.write(
                stage=stage.name, step=step, loss=loss.item(), learning_rate=rate,
                grad_norm=float(norm), tokens=int(batch.mask.sum()),
                seconds=round(time.perf_counter() - started, 3),
            )  # fmt: skip
            tick(step, steps, loss.item())
            if step % recipe.checkpoint_every == 0:
                save_progress(directory, model, optimiser, step)
    model.eval()


def _set_rate(optimiser: torch.optim.Optimizer, stage: StageConfig, step: int, steps: int) -> float:
    """Linear warm-up, then cosine down to a tenth."""
    warm = max(1, round(steps * stage.warmup_fraction))
    if step < warm:
        factor = (step + 1) / warm
    else:
        progress = (step - warm) / max(1, steps - warm)
        factor = 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
    for group in optimiser.param_groups:
        group["lr"] = stage.learning_rate * factor
    return stage.learning_rate * factor


class _Log:
    """metrics.jsonl; on resume, lines after the checkpoint are cut, as those steps run again."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
        # a kill can leave half a line; it has no newline
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")

    def write(self, **values: Any) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")
