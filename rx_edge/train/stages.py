"""One stage of training: the optimiser and the loop.

Stage 1 aligns the projector with a frozen LM; stage 2 fine-tunes LoRA and projector. A stage is
data + a list of what it trains, so that text-only warm-ups and one-stage controls are recipes,
not code.

Does not cover: which stages there are (the recipe), the run directory (`run.py`), how a step is
computed (`engine.py`, `objective.py`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rx_edge.config import StageConfig
from rx_edge.model.report_model import ReportModel
from rx_edge.train.batching import Example, epoch_order, sequence_length
from rx_edge.train.dropout import use_cpu_dropout
from rx_edge.train.engine import Engine, finite
from rx_edge.train.features import Features
from rx_edge.train.log import Log
from rx_edge.train.objective import Objective
from rx_edge.train.packing import packed_attention
from rx_edge.train.progress import load_best, load_progress, save_best, save_progress
from rx_edge.train.trainables import trainable, trains_vision

Tick = Callable[[int, int, float], None]  # step, steps, loss


def run_stage(
    model: ReportModel,
    stage: StageConfig,
    items: Sequence[Example],
    features: Features | None,
    directory: Path,
    tick: Tick,
    *,
    held_out: Sequence[Example] = (),
    engine: Engine | None = None,
    board: Path | None = None,
) -> None:
    """Train one stage to its end, from its last checkpoint if there is one.

    Args:
        features: of the items' images; None for text only.
        held_out: what validation losses are taken on.
        board: directory for TensorBoard, or None.

    Raises:
        TrainingError: the loss or a gradient is not finite, or the checkpoint does not fit.
        ConfigError: the LM cannot be packed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    engine = engine or Engine(model.recipe.engine)
    trainable(model, stage)
    if engine.device.type == "cpu":
        use_cpu_dropout(model.lm)
    packed = model.recipe.engine.packing
    objective = Objective(model, features, packed=packed, dtype=engine.dtype)
    with contextlib.ExitStack() as stack:
        if packed:
            stack.enter_context(packed_attention(model.lm))
        stack.enter_context(_training(model))
        # a tower may hold tensors that its features do not depend on (DINOv2's mask token)
        unused = features is None or trains_vision(stage)
        wrapped = engine.wrap(objective, some_unused=unused)
        stack.callback(engine.release)
        optimiser = torch.optim.AdamW(
            trainable(model, stage), lr=stage.learning_rate, weight_decay=stage.weight_decay,
            betas=(0.9, 0.95),
        )  # fmt: skip
        loop = _Loop(model, stage, wrapped, optimiser, directory, engine, items, held_out)
        loop.run(tick, board)


class _Loop:
    """The steps of one stage in one process."""

    def __init__(
        self,
        model: ReportModel,
        stage: StageConfig,
        objective: Any,
        optimiser: Any,
        directory: Path,
        engine: Engine,
        items: Sequence[Example],
        held_out: Sequence[Example],
    ) -> None:
        self.model, self.stage, self.directory, self.engine = model, stage, directory, engine
        self.objective, self.optimiser = objective, optimiser
        self.items, self.held_out = items, sorted(held_out, key=lambda e: len(e.ids))
        self.trained = trained_of(model, optimiser)
        self.per_epoch = math.ceil(len(items) / stage.batch_size)
        self.steps = max(1, round(self.per_epoch * stage.epochs))
        torch.manual_seed(model.recipe.seed + engine.rank)  # dropout differs between processes
        self.point = load_progress(directory, self.trained, optimiser, engine)

    def run(self, tick: Tick, board: Path | None) -> None:
        """From the last point to the end of the stage, early or not."""
        engine, point, every = self.engine, self.point, self.model.recipe.checkpoint_every
        path = self.directory / "metrics.jsonl"
        log = Log(path, point.step, board) if engine.main else None
        for step in self._from(point.step):
            if self._stopped():
                break
            started = time.perf_counter()
            values = self._step(step)
            point.step += 1
            values |= self._validated()
            if log:
                log.write(
                    stage=self.stage.name, step=point.step, **values,
                    seconds=round(time.perf_counter() - started, 3),
                )  # fmt: skip
                tick(point.step, self.steps, values["loss"])
            if point.step % every == 0:
                if log:
                    log.sync()
                save_progress(self.directory, self.trained, self.optimiser, point, engine)
        if log:
            log.close()
        engine.wait()
        if self.stage.patience and point.best is not None:
            load_best(self.directory, self.trained)

    def _from(self, step: int) -> Iterator[list[Example]]:
        """The reports of every step that is left."""
        while step < self.steps:
            epoch, offset = divmod(step, self.per_epoch)
            seed, name = self.model.recipe.seed, self.stage.name
            batches = epoch_order(self.items, self.stage.batch_size, seed, name, epoch)
            rest = batches[offset : offset + self.steps - step]
            yield from rest
            step += len(rest)

    def _step(self, items: list[Example]) -> dict[str, Any]:
        stage, step = self.stage, self.point.step
        rate = stage.learning_rate * rate_factor(stage, step, self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        tokens = sum(len(e.ids) for e in items)
        self.optimiser.zero_grad(set_to_none=True)
        passes = self.engine.passes(items, self._length)
        loss = self.engine.gradients(self.objective, passes, tokens)
        norm = self.engine.clip(list(self.trained.values()), stage.max_grad_norm)
        finite(loss, norm, stage.name, step, stage.learning_rate)
        self.optimiser.step()
        return {
            "loss": loss, "learning_rate": rate, "grad_norm": norm,
            "tokens": sum(map(self._length, items)), "report_tokens": tokens,
        }  # fmt: skip

    def _validated(self) -> dict[str, float]:
        """The validation loss, where one is due."""
        every, point = self.stage.validate_every, self.point
        if not every or point.step % every or not self.held_out:
            return {}
        size, held = self.stage.batch_size, self.held_out
        passes = [
            self.engine.passes(held[i : i + size], self._length) for i in range(0, len(held), size)
        ]
        self.model.lm.eval()
        loss = self.engine.loss(self.objective, passes, sum(len(e.ids) for e in held))
        self.model.lm.train()
        if point.best is None or loss < point.best:
            point.best, point.since_best = loss, 0
            if self.stage.patience:
                save_best(self.directory, self.trained, self.engine)
        else:
            point.since_best += 1
        return {"val_loss": loss}

    def _stopped(self) -> bool:
        return 0 < self.stage.patience <= self.point.since_best

    def _length(self, example: Example) -> int:
        return sequence_length(self.model, example)


def trained_of(model: ReportModel, optimiser: Any) -> dict[str, torch.nn.Parameter]:
    """The optimiser's tensors by name, in its order."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: p for group in optimiser.param_groups for p in group["params"]}


@contextlib.contextmanager
def _training(model: ReportModel) -> Iterator[None]:
    """Dropout of the adapter inside, none outside; activations kept or not, as the recipe says."""
    checkpointing = model.recipe.engine.gradient_checkpointing
    if checkpointing:
        _checkpointing(model, "enable", {"use_reentrant": False})
    model.lm.train()
    try:
        yield
    finally:
        model.eval()
        if checkpointing:
            _checkpointing(model, "disable")


def _checkpointing(model: ReportModel, verb: str, *arguments: Any) -> None:
    base = model.lm.get_base_model()
    # transformers renamed it after 5.17, and warns of the old name
    name = "activation" if hasattr(base, f"activation_checkpointing_{verb}") else "gradient"
    getattr(base, f"{name}_checkpointing_{verb}")(*arguments)


def rate_factor(stage: StageConfig, step: int, steps: int) -> float:
    """Part of the peak learning rate: linear warm-up, then cosine down to a tenth."""
    warm = max(1, round(steps * stage.warmup_fraction))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
