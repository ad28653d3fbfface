"""Two recipes at equal optimiser steps, over several seeds: what do two stages bring?

Every seed trains both recipes, held-out studies are scored by both, and a difference is taken study
by study. Where the recipes begin with the same stages, what the first run of a seed has made of
them is copied into the second: the same seed gives the same tensors.

    WORK/SEED-RECIPE/    a run directory of `rx-edge train`; a killed study goes on from it

Does not cover: what the recipes train (`rx_edge/train/recipes/`), texts (`rx-edge evaluate`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rx_edge.config import StageConfig, TrainRecipe
from rx_edge.config_io import load_toml, to_mapping
from rx_edge.errors import ConfigError
from rx_edge.model.report_model import ReportModel, load_run
from rx_edge.train import data
from rx_edge.train.batching import Example, examples
from rx_edge.train.features import FeatureCache
from rx_edge.train.objective import Objective
from rx_edge.train.run import Progress, train
from rx_edge.types import FloatArray
from rx_edge_bench.environment import environment, fingerprint

SCHEMA = "rx-edge-stages/1"
RESAMPLES = 10_000
GROUNDING = (
    "view_accuracy",
    "view_accuracy_mean_prompt",
    "nll_right",
    "nll_swapped",
    "nll_mean_prompt",
    "nll_swapped_minus_right",
    "body_nll_swapped_minus_right",
)


def compare(
    recipes: Sequence[TrainRecipe],
    seeds: Sequence[int],
    work: Path,
    *,
    epochs: float = 1.0,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Train and score; differences are second minus first, in nats per report token.

    Args:
        recipes: two, with the same data and the same number of optimiser steps with images.
        work: directory of the runs; finished ones in it are not trained again.
        epochs: factor on the epochs of all stages that only one of the recipes has.

    Returns:
        JSON-ready: per seed and recipe the loss on held-out studies and the grounding figures;
        the paired difference per seed (bootstrap over studies) and over all (seeds and studies).

    Raises:
        ConfigError: the recipes are not comparable.
        UsageError, TrainingError: as `rx-edge train`.
    """
    first, second = (_scaled(r, _common(*recipes), epochs) for r in recipes)
    _check(first, second, seeds)
    found: dict[str, list[dict[str, Any]]] = {first.name: [], second.name: []}
    for seed in seeds:
        for recipe in (first, second):
            out = work / f"{seed}-{recipe.name}"
            wanted = replace(recipe, seed=seed)
            if not (out / "final").is_dir():  # appears at once, with all its files
                _train(wanted, out, work / f"{seed}-{first.name}", progress)
            found[recipe.name].append({"seed": seed, **_scored(out)})
            progress("runs", sum(map(len, found.values())), 2 * len(seeds), recipe.name)
    return {
        "schema": SCHEMA,
        "recipes": {r.name: [to_mapping(stage) for stage in r.stages] for r in (first, second)},
        "common_stages": len(_common(first, second)),
        "runs": found,
        "difference": _differences(found[first.name], found[second.name]),
        "fingerprint": fingerprint(),
        "environment": environment(),
    }


def _common(first: TrainRecipe, second: TrainRecipe) -> tuple[StageConfig, ...]:
    """The stages with which both begin."""
    same = []
    for one, other in zip(first.stages, second.stages, strict=False):
        if one != other:
            break
        same.append(one)
    return tuple(same)


def _scaled(recipe: TrainRecipe, common: tuple[StageConfig, ...], factor: float) -> TrainRecipe:
    own = [replace(s, epochs=s.epochs * factor) for s in recipe.stages[len(common) :]]
    return replace(recipe, stages=(*common, *own))


def _check(first: TrainRecipe, second: TrainRecipe, seeds: Sequence[int]) -> None:
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds are {list(seeds)}; at least one, and each once")
    if first.name == second.name:
        raise ConfigError(f"both recipes are named {first.name!r}; their runs need names")
    for key in ("model", "image", "prompt", "lora", "data", "export_dtype"):
        if getattr(first, key) != getattr(second, key):
            raise ConfigError(f"the recipes differ in {key!r}: then stages are not what differs")
    seen = [[(s.batch_size, s.epochs, s.data) for s in r.stages] for r in (first, second)]
    passes = [sum(epochs / size for size, epochs, _ in stages) for stages in seen]
    if abs(passes[0] - passes[1]) > 1e-9 or {s[2] for s in seen[0]} != {s[2] for s in seen[1]}:
        raise ConfigError(
            f"{first.name} and {second.name} see other data or take other numbers of optimiser "
            "steps; make epochs / batch_size equal in sum"
        )


def _train(recipe: TrainRecipe, out: Path, earlier: Path, progress: Progress) -> None:
    """A run of its own; features and common stages come from an earlier one with this seed."""
    import tomli_w

    plan = out.with_suffix(".toml")
    plan.parent.mkdir(parents=True, exist_ok=True)
    plan.write_text(tomli_w.dumps(to_mapping(recipe)), encoding="utf-8")
    if earlier != out and earlier.is_dir() and not out.exists():
        begun = load_toml(earlier / "recipe.toml", TrainRecipe)
        out.mkdir()
        for name in ("features", *(stage.name for stage in _common(begun, recipe))):
            shutil.copytree(earlier / name, out / name)
        shutil.copyfile(plan, out / "recipe.toml")
    train(plan, out, resume=out.exists(), progress=progress)


def _scored(run: Path) -> dict[str, Any]:
    """Nats and tokens of every held-out study with an image, and the run's grounding figures.

    A run that was stopped while it took those has none: the losses do not need them.
    """
    model = load_run(run)
    items = _held_out(model)
    features = FeatureCache(run / "features", model.vision, model.recipe.image)
    objective = Objective(model, features)
    with torch.inference_mode():
        nats = [float(objective([item])) for item in items]
    tokens = [len(item.ids) for item in items]
    proof = run / "metrics.json"
    measured = json.loads(proof.read_text("utf-8")) if proof.is_file() else {}
    return {
        "studies": len(items),
        "nll": sum(nats) / sum(tokens),
        "nll_per_study": [n / t for n, t in zip(nats, tokens, strict=True)],
        "grounding": {
            name: {key: figures[key] for key in GROUNDING} for name, figures in measured.items()
        },
    }


def _held_out(model: ReportModel) -> list[Example]:
    found = []
    for name, config in model.recipe.data.items():
        corpus = data.read(name, config)
        samples = [s for split in ("val", "test") for s in corpus.split(split) if s.images]
        found += examples(model, samples, config.max_target_tokens)
    return found


def _differences(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, Any]:
    """Second minus first, per study: positive where the first is better."""
    table = np.asarray(
        [
            np.subtract(b["nll_per_study"], a["nll_per_study"])
            for a, b in zip(first, second, strict=True)
        ]
    )  # (seeds, studies)
    rng = np.random.default_rng(0)
    seeds, studies = table.shape
    resampled = [
        table[rng.integers(0, seeds, seeds)][:, rng.integers(0, studies, studies)].mean()
        for _ in range(RESAMPLES)
    ]
    return {
        "unit": "nats per report token, mean over studies; positive: the first recipe is better",
        "per_seed": [
            {"seed": run["seed"], **_interval(row, rng)}
            for run, row in zip(first, table, strict=True)
        ],
        "all": {"mean": float(table.mean()), **_limits(resampled)},
    }


def _interval(row: FloatArray, rng: np.random.Generator) -> dict[str, float]:
    means = row[rng.integers(0, len(row), (RESAMPLES, len(row)))].mean(1)
    return {"mean": float(row.mean()), **_limits(means)}


def _limits(means: Any) -> dict[str, float]:
    low, high = np.quantile(means, [0.025, 0.975])
    return {"low": float(low), "high": float(high)}
