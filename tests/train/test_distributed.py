"""Two processes (CPU, gloo) train what one trains; only the main one writes and speaks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from rx_edge.model.report_model import load_run
from rx_edge.train.run import train
from tests.conftest import REPOSITORY

CONFIG = REPOSITORY / "rx_edge/train/launch/fsdp2.yaml"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
ACCELERATE = (
    "-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "--num_processes=2",
)  # fmt: skip
# 12 reports in steps of 5: the last step of an epoch has two, of unequal lengths
OVERRIDES = (
    "lora.dropout=0.0", "stages.1.batch_size=5", "stages.1.epochs=2.0",
    "stages.1.validate_every=2", "engine.accumulate=2", "stages.0.epochs=0.4",
)  # fmt: skip
PATIENCE = 600.0  # seconds that two processes may take on a busy machine


@pytest.fixture(scope="module")
def alone(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_recipe, tmp_path_factory.mktemp("alone") / "run", overrides=OVERRIDES)


def assert_same_curve(run: Path, alone: Path) -> None:
    for stage in ("stage1", "stage2"):
        texts = [(r / stage / "metrics.jsonl").read_text().splitlines() for r in (run, alone)]
        found, expected = ([json.loads(line) for line in lines] for lines in texts)
        assert [line["step"] for line in found] == [line["step"] for line in expected]
        for a, b in zip(found, expected, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"stage", "seconds"}:
                assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-4), (key, a["step"])
    assert json.loads((run / "run.json").read_text())["processes"] == 2
    weights = [dict(load_run(r).named_parameters()) for r in (run, alone)]
    worst = max(float((weights[0][n] - w).abs().max()) for n, w in weights[1].items())
    assert worst < 2e-3  # rounded to float16; the last steps are as large as 2e-2


def finish(process: subprocess.Popen[str]) -> str:
    """What it said; it must have gone well."""
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, said
    return said


def start(launcher: tuple[str, ...], recipe: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    changes = [f"--set={change}" for change in OVERRIDES]
    arguments = ["-m", "rx_edge.cli", "train", str(recipe), "--out", str(out), *changes, *more]
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ddp(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A finished run of two processes, the same in the middle of stage 2, and what was said."""
    root = tmp_path_factory.mktemp("ddp")
    out, middle = root / "run", root / "middle"
    log, until = out / "stage2" / "metrics.jsonl", time.monotonic() + PATIENCE
    process = start(TORCHRUN, tiny_recipe, out)
    while not log.is_file() or log.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, finish(process)
        assert time.monotonic() < until
        time.sleep(0.001)
    (middle / "stage2").mkdir(parents=True)
    # first the point, then the log: the log may be ahead
    for file in ("stage2/progress.safetensors", "stage2/metrics.jsonl", "recipe.toml"):
        shutil.copyfile(out / file, middle / file)
    shutil.copytree(out / "stage1", middle / "stage1")
    return out, middle, finish(process)


def test_ddp_learns_what_one_process_learns(alone: Path, ddp: tuple[Path, Path, str]) -> None:
    run, _, said = ddp
    assert said.count("finished:") == 1
    assert_same_curve(run, alone)
    assert json.loads((run / "run.json").read_text())["sharded"] is False


def test_fsdp2_goes_on_from_a_point_of_ddp_and_learns_the_same(
    tiny_recipe: Path, alone: Path, ddp: tuple[Path, Path, str]
) -> None:
    run = ddp[1]
    with safe_open(run / "stage2" / "progress.safetensors", "pt") as stream:
        step = json.loads(stream.metadata()["point"])["step"]
    assert step < 6
    said = finish(start(ACCELERATE, tiny_recipe, run, "--resume"))
    assert said.count("finished:") == 1
    assert_same_curve(run, alone)
    assert json.loads((run / "run.json").read_text())["sharded"] is True
