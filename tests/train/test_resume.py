"""A training process that is killed goes on and ends with the same bits.

`test_training.py` stops runs from inside at every kind of step; here a real process gets SIGKILL.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rx_edge.errors import TrainingError
from rx_edge.train.engine import Engine
from rx_edge.train.progress import Point, load_progress, save_progress
from rx_edge.train.run import train
from rx_edge.train.stages import trained_of
from rx_edge.train.trainables import trainable
from tests.train.workbench import Workbench

PATIENCE = 120.0  # seconds that a process may take to reach a step on a busy machine
# long enough to be hit, with dropout, validation and steps between checkpoints
OVERRIDES = (
    "checkpoint_every=4", "stages.0.epochs=1.0", "stages.1.epochs=20.0",
    "stages.1.validate_every=3", "stages.1.patience=100",
)  # fmt: skip


def losses(run: Path) -> list[tuple[float, ...]]:
    rows = [
        json.loads(line)
        for stage in ("stage1", "stage2")
        for line in (run / stage / "metrics.jsonl").read_text().splitlines()
    ]
    return [(r["step"], r["loss"], r["grad_norm"], r.get("val_loss", 0.0)) for r in rows]


def kill_at(step: int, recipe: Path, out: Path) -> None:
    """Start training in a process of its own and kill it once `step` of stage 2 is logged."""
    overrides = [f"--set={change}" for change in OVERRIDES]
    process = subprocess.Popen(
        [sys.executable, "-m", "rx_edge.cli", "train", recipe, "--out", out, *overrides],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log, until = out / "stage2" / "metrics.jsonl", time.monotonic() + PATIENCE
    try:
        while not log.is_file() or log.read_bytes().count(b"\n") < step:
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < until
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "final").exists()


@pytest.fixture(scope="module")
def uninterrupted(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_recipe, tmp_path_factory.mktemp("whole") / "run", overrides=OVERRIDES)


def test_a_killed_process_goes_on_bit_for_bit(
    tiny_recipe: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    step, out = random.SystemRandom().randrange(2, 50), tmp_path / "run"
    told = f"killed at step {step}"
    kill_at(step, tiny_recipe, out)
    train(tiny_recipe, out, resume=True, overrides=OVERRIDES)
    assert losses(out) == losses(uninterrupted), told
    assert len(losses(out)) == 3 + 60
    files = [f.relative_to(out) for f in (out / "final").rglob("*.safetensors")]
    assert len(files) == 2
    for file in files:
        assert (out / file).read_bytes() == (uninterrupted / file).read_bytes(), (file, told)
    left = {f.name for f in (out / "stage2").iterdir()}
    assert left == {"metrics.jsonl", "trained"}, told


@pytest.fixture
def bench(tiny_recipe: Path, tmp_path: Path) -> Workbench:
    return Workbench(tiny_recipe, tmp_path / "cache")


def test_random_state_of_python_and_torch_is_part_of_the_point(
    bench: Workbench, tmp_path: Path
) -> None:
    engine = Engine(bench.recipe.engine)
    optimiser = torch.optim.AdamW(trainable(bench.model, bench.recipe.stages[0]))
    trained = trained_of(bench.model, optimiser)
    random.gauss()  # leaves a second number for the next call
    save_progress(tmp_path, trained, optimiser, Point(7, 0.1 + 0.2, 3), engine)

    def numbers() -> Sequence[float]:
        return random.gauss(), random.random(), float(torch.rand(()))

    expected = numbers()
    numbers()
    assert load_progress(tmp_path, trained, optimiser, engine) == Point(7, 0.1 + 0.2, 3)
    assert numbers() == expected


def test_a_point_of_another_recipe_or_number_of_processes_is_refused(
    bench: Workbench, tmp_path: Path
) -> None:
    engine = Engine(bench.recipe.engine)
    one, two = bench.recipe.stages

    def prepared(stage: object) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
        optimiser = torch.optim.AdamW(trainable(bench.model, stage))  # type: ignore[arg-type]
        return trained_of(bench.model, optimiser), optimiser

    save_progress(tmp_path, *prepared(one), Point(1), engine)
    with pytest.raises(TrainingError, match="does not fit the recipe"):
        load_progress(tmp_path, *prepared(two), engine)
    engine.processes = 2
    with pytest.raises(TrainingError, match="written by 1 processes .*; resume with 1"):
        load_progress(tmp_path, *prepared(one), engine)
