"""Two recipes over seeds: shared stages are shared, differences paired, unequal ones refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rx_edge.config import TrainRecipe
from rx_edge.errors import ConfigError
from rx_edge.train.run import effective_recipe
from rx_edge_bench import stage_comparison
from rx_edge_bench.stage_comparison import _differences, compare


@pytest.fixture
def recipes(tiny_recipe: Path) -> tuple[TrainRecipe, TrainRecipe]:
    """Warm-up, then two stages or one; equal steps."""
    two = effective_recipe(tiny_recipe, ["checkpoint_every=100"])
    warm = replace(two.stages[0], name="warmup", trains=("lora",), epochs=1.0)
    one = replace(two.stages[1], name="stage1", epochs=2.0)
    first = replace(two, name="two", stages=(warm, *(replace(s, epochs=1.0) for s in two.stages)))
    return first, replace(two, name="one", stages=(warm, one))


def test_seeds_are_trained_once_and_share_their_beginning(
    recipes: tuple[TrainRecipe, TrainRecipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = compare(recipes, (0, 1), tmp_path / "work", epochs=0.67)
    json.dumps(found, allow_nan=False)
    assert found["common_stages"] == 1
    assert [s["epochs"] for s in found["recipes"]["one"]] == [1.0, 2.0 * 0.67]
    for seed in (0, 1):
        begun = [
            (tmp_path / "work" / f"{seed}-{name}" / "warmup" / "trained" / "adapter"
             / "adapter_model.safetensors").read_bytes()
            for name in ("two", "one")
        ]  # fmt: skip
        assert begun[0] == begun[1]
        ends = [
            (tmp_path / "work" / f"{seed}-{name}" / "final" / "projector.safetensors").read_bytes()
            for name in ("two", "one")
        ]
        assert ends[0] != ends[1]
    first, second = (found["runs"][name] for name in ("two", "one"))
    assert first[0]["nll"] != first[1]["nll"]
    assert first[0]["grounding"]["pairs"]["nll_right"] > 0
    per_seed = [np.subtract(b["nll_per_study"], a["nll_per_study"]).mean()
                for a, b in zip(first, second, strict=True)]  # fmt: skip
    assert [s["mean"] for s in found["difference"]["per_seed"]] == pytest.approx(per_seed)

    def trained_again(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run is not trained again")

    monkeypatch.setattr(stage_comparison, "train", trained_again)
    again = compare(recipes, (0, 1), tmp_path / "work", epochs=0.67)
    assert again["runs"] == found["runs"]
    (tmp_path / "work" / "1-one" / "metrics.json").unlink()  # killed during its proof
    rest = compare(recipes, (0, 1), tmp_path / "work", epochs=0.67)
    assert rest["difference"] == found["difference"]
    assert (rest["runs"]["one"][1]["grounding"], rest["runs"]["one"][0]) == (
        {}, found["runs"]["one"][0],
    )  # fmt: skip


def test_loss_is_that_of_the_whole_report(
    recipes: tuple[TrainRecipe, TrainRecipe], tmp_path: Path
) -> None:
    """The mean over studies is what the run's own proof calls nll_right."""
    run = compare(recipes, (0,), tmp_path)["runs"]["two"][0]
    assert np.mean(run["nll_per_study"]) == pytest.approx(
        run["grounding"]["pairs"]["nll_right"], rel=1e-4
    )


def test_unequal_recipes_are_refused(
    recipes: tuple[TrainRecipe, TrainRecipe], tmp_path: Path
) -> None:
    first, second = recipes
    longer = replace(second, stages=(second.stages[0], replace(second.stages[1], epochs=3.0)))
    with pytest.raises(ConfigError, match="optimiser steps"):
        compare((first, longer), (0,), tmp_path)
    with pytest.raises(ConfigError, match="'lora'"):
        compare((first, replace(second, lora=replace(second.lora, r=4))), (0,), tmp_path)
    with pytest.raises(ConfigError, match="each once"):
        compare(recipes, (1, 1), tmp_path)
    with pytest.raises(ConfigError, match="named 'two'"):
        compare((first, replace(second, name="two")), (0,), tmp_path)
    assert not list(tmp_path.iterdir())


def test_interval_over_seeds_holds_the_spread_between_them() -> None:
    def run(seed: int, nll: list[float]) -> dict[str, Any]:
        return {"seed": seed, "nll_per_study": nll}

    first = [run(s, [1.0] * 50) for s in range(3)]
    same = _differences(first, [run(s, [1.1] * 50) for s in range(3)])
    assert same["all"]["low"] == pytest.approx(0.1)
    apart = _differences(first, [run(s, [1.0 + s / 10] * 50) for s in range(3)])
    assert apart["all"]["mean"] == pytest.approx(0.1)
    assert apart["all"]["low"] == pytest.approx(0.0)
    assert apart["all"]["high"] == pytest.approx(0.2)
    assert [s["mean"] for s in apart["per_seed"]] == pytest.approx([0.0, 0.1, 0.2])
