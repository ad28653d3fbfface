"""`rx-edge train`: a recipe in, a run directory out.

    RUN/
      recipe.toml          the effective recipe, overrides included
      run.json             seed, versions, commit, base weights: what made this
      data_manifest.json   per corpus: counts, what was dropped, hashes of every study (no ids)
      features/            cached patch features (may be deleted)
      <stage>/             metrics.jsonl, progress.safetensors while running, trained/ when done
      final/               projector.safetensors + adapter/ : what `rx-edge export` reads
      metrics.json         held-out figures of final/, after rounding to `export_dtype`

A killed run goes on with `--resume` from the last checkpoint, on the same loss curve.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import rx_edge
from rx_edge.config import StageConfig, TrainRecipe, load_toml, override, to_mapping
from rx_edge.errors import ConfigError, TrainingError, UsageError
from rx_edge.model.catalogue import locate
from rx_edge.model.digest import weights_digest
from rx_edge.model.report_model import ReportModel, load_trained
from rx_edge.train import data
from rx_edge.train.batching import Example, examples
from rx_edge.train.checkpoint import save_trained, write_json
from rx_edge.train.data.images import naming
from rx_edge.train.features import FeatureCache
from rx_edge.train.grounding import prove
from rx_edge.train.stages import run_stage

_RESERVED = ("final", "features")  # directories of the run that are no stages
Progress = Callable[[str, int, int, str], None]  # what, done, of, detail


def effective_recipe(path: Path, overrides: Sequence[str]) -> TrainRecipe:
    """The recipe with `key.sub=value` overrides applied.

    Raises:
        ConfigError: unknown key, wrong type, or an override that is not key=value.
    """
    return override(load_toml(path, TrainRecipe), overrides, where=str(path))


def train(
    recipe_path: Path,
    out: Path,
    *,
    resume: bool = False,
    overrides: Sequence[str] = (),
    progress: Progress = lambda *_: None,
) -> Path:
    """Run every stage of the recipe and measure the result.

    Raises:
        UsageError: `out` exists without `resume`, or the other way round.
        TrainingError: resuming with another recipe, or the loss is not finite.
    """
    recipe = effective_recipe(recipe_path, overrides)
    _check(recipe, recipe_path)
    _open_run(recipe, out, resume)
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    torch.manual_seed(recipe.seed)
    corpora = {name: data.read(name, config) for name, config in recipe.data.items()}
    model = ReportModel(recipe)
    write_json(out / "run.json", _environment(recipe, model))
    write_json(out / "data_manifest.json", {n: _manifest(c) for n, c in corpora.items()})
    features = FeatureCache(out / "features", model.vision, recipe.image)
    _fill_features(features, corpora, progress)
    _start_projector(model, corpora, features)
    for stage in recipe.stages:
        _stage(model, stage, corpora, features, out, progress)
    save_trained(model, out / "final", getattr(torch, recipe.export_dtype))
    load_trained(model, out / "final")  # measure what was saved, rounding included
    write_json(out / "metrics.json", _measure(model, corpora, features, progress))
    return out


def _check(recipe: TrainRecipe, path: Path) -> None:
    if not recipe.stages:
        raise ConfigError(f"{path}: no [[stages]]: nothing to train")
    names = [s.name for s in recipe.stages]
    if "" in names or len(set(names)) != len(names):
        raise ConfigError(f"{path}: every stage needs a name of its own, got {names}")
    if recipe.checkpoint_every < 1:
        raise ConfigError(f"{path}: checkpoint_every is {recipe.checkpoint_every}; at least 1")
    for stage in recipe.stages:
        if not stage.name.replace("-", "").replace("_", "").isalnum() or stage.name in _RESERVED:
            raise ConfigError(
                f"{path}: stage name {stage.name!r} must be letters, digits, '-' or '_', and "
                f"none of {', '.join(_RESERVED)}: it names a directory of the run"
            )
        if stage.batch_size < 1 or not 0 < stage.epochs < float("inf"):
            raise ConfigError(
                f"{path}: stage {stage.name!r} has batch_size {stage.batch_size} and epochs "
                f"{stage.epochs}; batch_size >= 1 and epochs > 0 are needed"
            )
        unknown = [d for d in stage.data if d not in recipe.data]
        if unknown or not stage.data:
            raise ConfigError(
                f"{path}: stage {stage.name!r} uses data {list(stage.data)}; "
                f"known: {', '.join(recipe.data) or 'none'}"
            )


def _open_run(recipe: TrainRecipe, out: Path, resume: bool) -> None:
    import tomli_w

    effective, file = tomli_w.dumps(to_mapping(recipe)), out / "recipe.toml"
    if resume:
        if not file.is_file():
            raise UsageError(f"--resume: {str(out)!r} holds no run to resume")
        if file.read_text("utf-8") != effective:
            raise TrainingError(
                f"--resume: the recipe differs from {str(file)!r}; resume with the same recipe "
                "and overrides, or start a new run"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{str(out)!r} exists; add --resume to go on, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(effective, encoding="utf-8")


def _fill_features(
    features: FeatureCache, corpora: Mapping[str, data.Corpus], progress: Progress
) -> None:
    samples = [s for c in corpora.values() for s in c.samples if s.image is not None]
    for done, sample in enumerate(samples, 1):
        with naming(sample) as path:
            features.fill([path])
        progress("vision features", done, len(samples), "")


def _start_projector(
    model: ReportModel, corpora: Mapping[str, data.Corpus], features: FeatureCache
) -> None:
    paths = [s.image for c in corpora.values() for s in c.split("train") if s.image is not None]
    if paths:
        table = model.lm.get_input_embeddings().weight
        sample = torch.stack([features[p] for p in paths[:16]])
        model.projector.start_at_scale(sample, float(table.std()))


def _stage(
    model: ReportModel,
    stage: StageConfig,
    corpora: Mapping[str, data.Corpus],
    features: FeatureCache,
    out: Path,
    progress: Progress,
) -> None:
    directory = out / stage.name
    if (directory / "trained").is_dir():
        load_trained_stage(model, directory)
        return
    items = _examples(model, corpora, stage.data, "train")
    with_image = {e.sample.image is not None for e in items}
    if len(with_image) > 1:
        raise ConfigError(f"stage {stage.name!r} mixes image and text-only corpora; use two stages")
    run_stage(
        model, stage, items, features if with_image == {True} else None, directory,
        lambda step, steps, loss: progress(stage.name, step, steps, f"loss {loss:.3f}"),
    )  # fmt: skip
    save_trained(model, directory / "trained", torch.float32)
    (directory / "progress.safetensors").unlink(missing_ok=True)


def load_trained_stage(model: ReportModel, directory: Path) -> None:
    """Load the float32 result of a finished stage."""
    load_trained(model, directory / "trained")


def _examples(
    model: ReportModel, corpora: Mapping[str, data.Corpus], names: Sequence[str], split: str
) -> list[Example]:
    return [
        example
        for name in names
        for example in examples(
            model, corpora[name].split(split), model.recipe.data[name].max_target_tokens
        )
    ]


def _measure(
    model: ReportModel,
    corpora: Mapping[str, data.Corpus],
    features: FeatureCache,
    progress: Progress,
) -> dict[str, Any]:
    """The image-matters proof on the held-out part of every corpus that has images."""
    out: dict[str, Any] = {}
    for name, corpus in corpora.items():
        held = [e for s in ("val", "test") for e in _examples(model, corpora, [name], s)]
        provable = len({e.sample.patient for e in held}) > 1 and any(e.sample.view for e in held)
        if provable and all(e.sample.image for e in held):
            progress(f"measuring on {name}", 0, 1, "")
            train_items = _examples(model, corpora, [name], "train")
            figures = prove(model, train_items, held, features, model.recipe.seed)
            out[name] = {"split": "val+test", "dropped": corpus.dropped, **figures}
            progress(f"measuring on {name}", 1, 1, "")
    return out


def _manifest(corpus: data.Corpus) -> dict[str, Any]:
    """Counts and hashes; ids are hashed too, as a hospital's may identify a patient."""
    rows = [
        " ".join(
            (s.split, _short(s.id.encode()), _short(s.target.encode()),
             _short(s.image.read_bytes()) if s.image else "-")
        )
        for s in sorted(corpus.samples, key=lambda s: (s.split, s.id))
    ]  # fmt: skip
    return {
        "counts": {split: len(corpus.split(split)) for split in data.SPLITS},
        "dropped": corpus.dropped,
        "columns": "split sha256(id) sha256(target) sha256(image file)",
        "studies": rows,
        "sha256": hashlib.sha256("\n".join(rows).encode()).hexdigest(),
    }


def _environment(recipe: TrainRecipe, model: ReportModel) -> dict[str, Any]:
    packages = ("torch", "transformers", "peft", "tokenizers", "numpy", "pillow", "pydicom")
    return {
        "rx_edge": rx_edge.__version__,
        "git_commit": _git_commit(),
        "seed": recipe.seed,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "packages": {p: metadata.version(p) for p in packages},
        "base": {
            "vision": _base(recipe.model.vision, weights_digest(model.vision)),
            "language": _base(recipe.model.language, ""),
        },
    }


def _base(name: str, used_digest: str) -> dict[str, Any]:
    source = Path(locate(name)) / "rx_edge_source.json"
    known = json.loads(source.read_text("utf-8")) if source.is_file() else {}
    return {"name": name, "source": known, "used_weights_sha256": used_digest}


def _git_commit() -> str:
    result = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or "unknown"


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _set(plain: Any, keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        try:
            plain = plain[int(key)] if isinstance(plain, list) else plain[key]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ConfigError(f"--set {override!r}: there is no {key!r} in the recipe") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"--set {override!r}: {keys[-1]!r} is no key there")
    plain[keys[-1]] = value
