"""What a plan predicts is what an export makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rx_edge.cli import app
from rx_edge.config import ExportConfig, ModelConfig
from rx_edge.errors import ModelError, UsageError
from rx_edge.model.projector import Projector, soft_tokens
from rx_edge.model.vision import grid_of, load_vision
from rx_edge_export import gguf_quantize, llm_gguf, plan, recipes, targets
from rx_edge_export.export import export
from tests.conftest import DEMO_RUN
from tests.factories import IMAGE_SIZE, TOWERS, tiny_gpt2_dir, tiny_llama_dir, tiny_tower_dir

runner = CliRunner()


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_sound_and_can_be_planned(name: str, tiny_run: Path) -> None:
    config = recipes.load(name)
    made = plan.make(tiny_run, config, tiny_run)
    assert len(made.rows) == len(config.vision) + len(config.language) + config.stock + 1
    assert not made.problems(config.memory_gb)


def test_recipes_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'workstation-8gb'"):
        recipes.load("workstation8gb")
    assert recipes.load(None, ["n_ctx=2048"]) == ExportConfig(n_ctx=2048)
    assert recipes.load("cpu", ["stock=true"]).stock


@pytest.mark.parametrize("make", [tiny_llama_dir, tiny_gpt2_dir])
@pytest.mark.parametrize("width", [64, 256])
def test_predicted_sizes_of_gguf_files(tmp_path: Path, make: object, width: int) -> None:
    sizes = {"n_embd": width} if make is tiny_gpt2_dir else {"hidden_size": width}
    directory: Path = make(tmp_path / "hf", **sizes)  # type: ignore[operator]
    architecture = plan.gguf_architectures.read(directory / "config.json")
    llm_gguf.write(directory, tmp_path / "f.gguf", dtype="f32", name="x")
    for file_type in gguf_quantize.FILE_TYPES:
        gguf_quantize.quantize(
            tmp_path / "f.gguf", tmp_path / "q.gguf", file_type=file_type, threads=1
        )
        wanted = (tmp_path / "q.gguf").stat().st_size
        header = (tmp_path / "f.gguf").stat().st_size - 4 * sum(
            plan._count(t) for t in architecture.tensors
        )
        found = sum(plan._gguf_bytes(t, file_type, architecture) for t in architecture.tensors)
        assert found == pytest.approx(wanted - header, rel=0.12), file_type


@pytest.mark.parametrize("family", TOWERS)
def test_predicted_soft_tokens(tmp_path: Path, family: str) -> None:
    directory = str(tiny_tower_dir(tmp_path / family, family))
    grid = grid_of(directory, IMAGE_SIZE)
    assert grid == load_vision(directory, IMAGE_SIZE).grid
    for pooling in ("none", "resampler", "average-2x2", "pixel-shuffle-2x2", "pixel-shuffle-4x4"):
        config = ModelConfig(pooling=pooling, queries=5)  # type: ignore[arg-type]
        if pooling[-1].isdigit() and grid % int(pooling[-1]):
            continue
        projector = Projector(config, grid=grid, width=32, lm_width=8)
        found = projector(torch.zeros(1, grid * grid, 32))
        assert soft_tokens(config, grid) == projector.tokens == found.shape[1]


@pytest.mark.slow
def test_predicted_sizes_of_the_demo(demo_bundle: Path) -> None:
    made = plan.make(DEMO_RUN, ExportConfig(), demo_bundle)
    for row in made.rows:
        wanted = (demo_bundle / row.file).stat().st_size
        assert row.disk == pytest.approx(wanted, rel=0.05), row


def test_a_run_that_still_measures_itself_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "metrics.json").unlink()
    with pytest.raises(ModelError, match=r"not a finished .*metrics.json is missing; wait for it"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_made(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="needs .* GB at run time and the recipe allows"):
        export(tiny_run, tmp_path / "out", config=ExportConfig(memory_gb=1e-4))
    monkeypatch.setattr(plan, "memory_free", lambda: 1000)
    with pytest.raises(UsageError, match="GB of memory and 0.0 GB are free"):
        export(tiny_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_dry_run_makes_nothing(tiny_run: Path, tmp_path: Path) -> None:
    arguments = ["export", str(tiny_run), "--out", str(tmp_path / "out"), "--recipe", "all"]
    result = runner.invoke(app, [*arguments, "--dry-run", "--json"])
    assert result.exit_code == 0, result.stderr
    plan_ = json.loads(result.stdout)
    assert {r["file"] for r in plan_["rows"]} >= {t.file for t in targets.VISION.values()}
    assert plan_["problems"] == []
    assert runner.invoke(app, [*arguments, "--dry-run"]).exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_cannot_be_planned(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"recipe\.toml is missing"):
        plan.make(tmp_path, ExportConfig(), tmp_path)


def test_unknown_targets_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    for option, names, says in (
        ("vision", ("onnx:int9",), "did you mean 'onnx:int8'"),
        ("language", (), "--llm is empty"),
        ("language", ("gguf:F16", "gguf:F16"), "named twice"),
    ):
        with pytest.raises(UsageError, match=says):
            plan.make(tiny_run, ExportConfig(**{option: names}), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="makes onnx:fp32 only"):
        export(
            tiny_run,
            tmp_path / "o",
            config=ExportConfig(llm_exporter="optimum", language=("onnx:int8",)),
        )
    with pytest.raises(UsageError, match="needs a GGUF language model"):
        export(tiny_run, tmp_path / "o", config=ExportConfig(stock=True, language=("onnx:fp32",)))
