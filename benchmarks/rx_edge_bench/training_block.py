"""One block of the training study: a fresh process that trains one stage one way.

    python -P -m rx_edge_bench.training_block (prepare | rx-edge | trainer) < TASK.json

`trainer` is the plain way: the vision tower in the model's forward (frozen, without gradients),
padded batches, logits at every position, transformers' own loss. It is spared what would be slow
for no reason of principle: images are read as prepared pixels, the loss is logged without a
progress bar, nothing is saved. The reports of every step are ours, and so is its learning rate.

Does not cover: starting blocks in turn (`training.py`).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rx_edge import image
from rx_edge.config import StageConfig, TrainRecipe
from rx_edge.config_io import from_mapping
from rx_edge.errors import ConfigError, RxEdgeError
from rx_edge.model.report_model import IGNORE, ReportModel
from rx_edge.radiograph import open_radiograph
from rx_edge.train import data
from rx_edge.train.batching import Example, epoch_order, examples
from rx_edge.train.engine import Engine
from rx_edge.train.features import FeatureCache
from rx_edge.train.objective import Objective
from rx_edge.train.stages import rate_factor, run_stage
from rx_edge.train.trainables import trainable
from rx_edge_bench.resources import peak_bytes


@dataclass
class Task:
    """The same for both sides.

    Attributes:
        stage: with `epochs` set to exactly `steps` optimiser steps.
    """

    model: ReportModel
    stage: StageConfig
    items: list[Example]
    held_out: list[Example]
    features: FeatureCache
    work: Path
    steps: int

    @property
    def engine(self) -> Engine:
        """Of this single process."""
        return Engine(self.model.recipe.engine)


def read_task(plain: dict[str, Any]) -> Task:
    """Model, reports and features of a task; the seed decides the fresh tensors.

    Raises:
        ConfigError: the stage's data has no images, or too few for the steps, or two views.
    """
    recipe = from_mapping(TrainRecipe, plain["recipe"], where="task")
    if recipe.prompt.views != "one":
        raise ConfigError(
            f"prompt.views is {recipe.prompt.views!r}; the plain way is written for one image of a "
            "study: set prompt.views = 'one' and the views of its corpora to 'frontal'"
        )
    recipe = replace(recipe, seed=plain["seed"], checkpoint_every=10**9)
    stage = next(s for s in recipe.stages if s.name == plain["stage"])
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    torch.manual_seed(recipe.seed)
    model = ReportModel(recipe)
    corpora = {name: data.read(name, recipe.data[name]) for name in stage.data}
    items, held_out = (
        [
            e
            for name, corpus in corpora.items()
            for e in examples(model, corpus.split(split), recipe.data[name].max_target_tokens)
        ]
        for split in ("train", "val")
    )
    if not items or not held_out or any(e.sample.image is None for e in (*items, *held_out)):
        raise ConfigError(f"stage {stage.name!r} needs train and val studies with images")
    work = Path(plain["work"])
    features = FeatureCache(work / "features", model.vision, recipe.image)
    paths = [e.sample.image for e in items if e.sample.image is not None]
    table = model.lm.get_input_embeddings().weight
    model.projector.start_at_scale(features(paths[:16]), float(table.std()))
    per_epoch = -(-len(items) // stage.batch_size)
    if plain["steps"] > per_epoch:
        raise ConfigError(f"{plain['steps']} steps; an epoch of the stage has {per_epoch}")
    stage = replace(stage, epochs=plain["steps"] / per_epoch, validate_every=0, patience=0)
    return Task(model, stage, items, held_out, features, work, plain["steps"])


def pixels_file(work: Path, path: Path) -> Path:
    """Where the prepared pixels (3, S, S) float32 of an image are."""
    return work / "pixels" / f"{hashlib.sha256(str(path).encode()).hexdigest()}.npy"


def prepare(task: Task) -> dict[str, Any]:
    """Pixels for one side, features for the other, and what the latter cost."""
    (task.work / "pixels").mkdir(exist_ok=True)
    paths = [e.sample.image for e in (*task.items, *task.held_out) if e.sample.image]
    for path in paths:
        pixels = image.prepare(open_radiograph(path), task.model.recipe.image)[0]
        np.save(pixels_file(task.work, path), pixels)
    started = time.perf_counter()
    task.features.fill(paths)
    seconds = time.perf_counter() - started
    counts = {"train_studies": len(task.items), "val_studies": len(task.held_out)}
    return {**counts, "feature_seconds": seconds}


def ours(task: Task) -> dict[str, Any]:
    """`run_stage` as `rx-edge train` calls it."""
    ends: list[float] = []
    directory = task.work / f"ours-{task.model.recipe.seed}"
    run_stage(
        task.model, task.stage, task.items, task.features, directory,
        lambda *_: ends.append(time.perf_counter()),
    )  # fmt: skip
    lines = (directory / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    tokens = [row["tokens"] for row in rows]
    return _result(task, ends, tokens, [row["loss"] for row in rows])


class PlainModel(nn.Module):
    """Pixels and padded token ids to a loss, as vision-language models are commonly written.

    Attributes:
        tokens: real tokens of every forward so far that carry a report on.
        padded: all that were computed.
    """

    def __init__(self, model: ReportModel) -> None:
        super().__init__()
        self.model = model
        self.tokens: list[int] = []
        self.padded: list[int] = []

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
    ) -> Any:
        """(B, 3, S, S), and (B, T) each -> transformers' output with `loss` and all logits."""
        with torch.no_grad():
            patches = self.model.vision(pixel_values)
        soft = self.model.projector(patches)
        embeds = self.model.lm.get_input_embeddings()(input_ids)
        start = len(self.model.prompt.before)
        embeds = torch.cat([embeds[:, :start], soft, embeds[:, start + soft.shape[1] :]], dim=1)
        # the last id of a report is computed here and not needed: it does not count as work done
        self.tokens.append(int(attention_mask.sum()) - len(attention_mask))
        self.padded.append(attention_mask.numel())
        return self.model.lm(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels)


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Reports as prompt + report ids in our order; the image slot holds placeholders."""

    def __init__(self, task: Task) -> None:
        stage, seed = task.stage, task.model.recipe.seed
        batches = epoch_order(task.items, stage.batch_size, seed, stage.name, 0)
        self.task, self.items = task, [example for batch in batches for example in batch]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.items[index]
        prompt = self.task.model.prompt_for(example.indication)
        assert example.sample.image is not None
        slot = [0] * self.task.model.projector.tokens
        head = [*prompt.before, *slot, *prompt.after]
        return {
            "pixel_values": np.load(pixels_file(self.task.work, example.sample.image)),
            "input_ids": [*head, *example.ids],
            "labels": [IGNORE] * len(head) + list(example.ids),
        }


def padded(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right-padded to the longest."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    return {
        "pixel_values": torch.from_numpy(np.stack([row["pixel_values"] for row in rows])),
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORE),
    }


def trainer(task: Task) -> dict[str, Any]:
    """transformers' Trainer on `PlainModel`."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Ends(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    stage, model = task.stage, PlainModel(task.model)
    optimiser = torch.optim.AdamW(
        trainable(task.model, stage), lr=stage.learning_rate, weight_decay=stage.weight_decay,
        betas=(0.9, 0.95),
    )  # fmt: skip
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: rate_factor(stage, step, task.steps)
    )
    running = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(task.work / "trainer"), max_steps=task.steps, report_to=[],
            per_device_train_batch_size=stage.batch_size, max_grad_norm=stage.max_grad_norm,
            save_strategy="no", logging_steps=1, disable_tqdm=True, seed=task.model.recipe.seed,
            remove_unused_columns=False, dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
            bf16=task.engine.dtype == torch.bfloat16, use_cpu=task.engine.device.type == "cpu",
        ),
        train_dataset=Rows(task), data_collator=padded, optimizers=(optimiser, rates),
        callbacks=[Ends()],
    )  # fmt: skip
    running.train()
    losses = [row["loss"] for row in running.state.log_history if "loss" in row]
    waste = 1 - sum(model.tokens) / sum(model.padded)
    task.model.eval()
    return {**_result(task, ends, model.tokens, losses), "padding": waste}


def _result(
    task: Task, ends: list[float], tokens: list[int], losses: list[float]
) -> dict[str, Any]:
    """Of a side; peak memory is read before the val loss is computed."""
    peak, seconds = peak_bytes(), ends[-1] - ends[0]
    counted = sum(tokens[1:])  # the first step warms up
    engine = task.engine
    passes = [engine.passes([e], lambda e: len(e.ids)) for e in task.held_out]
    held = sum(len(e.ids) for e in task.held_out)
    objective = Objective(task.model.eval(), task.features)
    return {
        "seconds": seconds,
        "tokens": counted,
        "tokens_per_second": counted / seconds,
        "peak_rss_bytes": peak,
        "losses": losses,
        "val_loss": engine.loss(objective, passes, held),
    }


def main(arguments: Sequence[str]) -> int:
    """Write one JSON document; 0, or a line on stderr and 1."""
    output, sys.stdout = sys.stdout, sys.stderr  # Trainer prints its log
    try:
        side = {"prepare": prepare, "rx-edge": ours, "trainer": trainer}[arguments[0]]
        result = side(read_task(json.load(sys.stdin)))
    except RxEdgeError as error:
        sys.stderr.write(f"rx-edge: {error}\n")
        return 1
    output.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
