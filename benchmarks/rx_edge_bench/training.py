"""Our training step against what a research group would write (transformers' Trainer + peft).

Both train the same stage of the same recipe: base weights, LoRA, projector, reports, report tokens,
optimiser, learning rates, precision and threads. Blocks of both run in turn, each in a fresh
process (`training_block.py`): tokens per second, where only real tokens count, peak memory, every
loss, and the loss on the val split at the end, computed for both by the same code. A block's seed
decides order and dropout; both sides of a pair see the same reports in the same steps, but their
dropout differs: the spread between pairs is the noise that a difference in loss is compared with.

Does not cover: GPUs, several processes, disks (pixels and features are prepared before).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rx_edge.config import TrainRecipe
from rx_edge.config_io import to_mapping
from rx_edge.errors import ConfigError, TrainingError
from rx_edge_bench.environment import environment, fingerprint
from rx_edge_bench.latency import spread

SCHEMA = "rx-edge-training/1"
SIDES = ("rx-edge", "trainer")
LONGEST = 3600.0  # seconds of one block
PACKAGES = ("torch", "transformers", "peft", "accelerate")

Tick = Callable[[str, int, int, str], None]


def measure(
    recipe: TrainRecipe,
    stage: str,
    work: Path,
    *,
    steps: int,
    pairs: int,
    tick: Tick = lambda *_: None,
) -> dict[str, Any]:
    """Blocks of both sides in turn.

    Args:
        stage: name of the recipe's stage, whose data has images.
        work: empty directory for pixels, features and the blocks' runs.
        steps: optimiser steps of a block; the first is the warm-up and is not timed.

    Returns:
        JSON-ready: the blocks, medians of both sides, the ratio of each pair, and whether the
        difference of the val losses is within the noise.

    Raises:
        ConfigError: no such stage, or fewer than two steps.
        TrainingError: a block failed; the message holds its last line.
    """
    if stage not in [s.name for s in recipe.stages]:
        names = ", ".join(s.name for s in recipe.stages)
        raise ConfigError(f"--stage is {stage!r}; the recipe has: {names}")
    if steps < 2 or pairs < 1:
        raise ConfigError(f"{steps} steps, {pairs} pairs; at least 2 steps (one warms up), 1 pair")
    task = {"recipe": to_mapping(recipe), "stage": stage, "steps": steps, "work": str(work)}
    prepared = _block("prepare", {**task, "seed": recipe.seed})
    tick("blocks", 0, 2 * pairs, "prepared")
    blocks: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for pair in range(pairs):
        for side in SIDES if pair % 2 == 0 else SIDES[::-1]:
            blocks[side].append(_block(side, {**task, "seed": recipe.seed + pair}))
            tick("blocks", sum(map(len, blocks.values())), 2 * pairs, side)
    return {
        "schema": SCHEMA,
        "recipe": recipe.name,
        "language": Path(recipe.model.language).name,  # never a path of this machine
        "vision": Path(recipe.model.vision).name,
        "stage": stage,
        "steps": steps,
        "prepared": prepared,
        **summary(blocks),
        "blocks": blocks,
        "fingerprint": fingerprint(),
        "environment": {**environment(), "training_packages": _versions()},
    }


def summary(blocks: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Both sides in figures, and whether their val losses agree.

    They agree where the mean difference over pairs is within three of its standard errors; below
    four pairs there is no verdict.
    """
    paired = list(zip(*(blocks[side] for side in SIDES), strict=True))
    keys = ("tokens_per_second", "peak_rss_bytes", "val_loss")
    rates, peaks = ([a[key] / b[key] for a, b in paired] for key in keys[:2])
    losses = [a["val_loss"] - b["val_loss"] for a, b in paired]
    mean = statistics.fmean(losses)
    error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 3 else None
    return {
        "sides": {s: {k: spread([b[k] for b in blocks[s]]) for k in keys} for s in SIDES},
        "trainer_padding": spread([b["padding"] for b in blocks["trainer"]]),
        "tokens_per_second_ratio": spread(rates),
        "peak_rss_ratio": spread(peaks),
        "val_loss_difference": {
            "mean": mean,
            "standard_error": error,
            "agree": None if error is None else abs(mean) <= 3 * error,
        },
    }


def _block(side: str, task: dict[str, Any]) -> dict[str, Any]:
    # -P: the working directory may hold modules of the same names
    command = [sys.executable, "-P", "-m", "rx_edge_bench.training_block", side]
    try:
        done = subprocess.run(
            command, input=json.dumps(task), capture_output=True, text=True, check=False,
            timeout=LONGEST,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TrainingError(
            f"a block of {side} took more than {LONGEST:.0f} s; use fewer steps"
        ) from error
    if done.returncode:
        raise TrainingError(f"a block of {side} failed: {_last_line(done.stderr)}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _last_line(text: str) -> str:
    lines: Sequence[str] = text.strip().splitlines() or ["no message"]
    return lines[-1].removeprefix("rx-edge: ")


def _versions() -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in PACKAGES}
