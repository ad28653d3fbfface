"""`rx-edge train`: a recipe in, a run directory out.

    RUN/
      recipe.toml          the effective recipe, overrides included
      run.json             seed, versions, commit, base weights: what made this
      data_manifest.json   per corpus: counts, what was dropped, hashes of every study (no ids)
      features/            cached patch features (may be deleted)
      <stage>/             metrics.jsonl, progress.safetensors while running, trained/ when done
      final/               projector.safetensors + adapter/ : what `rx-edge export` reads
      tensorboard/         a view of the metrics, where the recipe asks for it
      metrics.json         held-out figures of final/, after rounding to `export_dtype`

A killed run goes on with `--resume` from the last checkpoint and ends with the same bits. Of
several processes only the main one writes; all must see the same directory.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import rx_edge
from rx_edge.config import StageConfig, TrainRecipe
from rx_edge.config_io import load_toml, override, to_mapping
from rx_edge.errors import ConfigError, TrainingError, UsageError
from rx_edge.model.catalogue import locate
from rx_edge.model.digest import weights_digest
from rx_edge.model.report_model import ReportModel, load_trained
from rx_edge.model.vision import check_normalisation
from rx_edge.prompting import takes_indication
from rx_edge.train import data
from rx_edge.train.batching import Example, examples
from rx_edge.train.checkpoint import save_trained, write_json
from rx_edge.train.checks import check_corpora, check_recipe
from rx_edge.train.data.images import naming
from rx_edge.train.engine import Engine
from rx_edge.train.features import FeatureCache, Features, live
from rx_edge.train.grounding import prove
from rx_edge.train.progress import clean, whole
from rx_edge.train.qlora import quantise
from rx_edge.train.stages import run_stage
from rx_edge.train.trainables import trains_vision

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
        ConfigError: the recipe, or a corpus of it, cannot be trained on.
        UsageError: `out` exists without `resume`, or the other way round.
        TrainingError: resuming with another recipe, or the loss is not finite.
    """
    recipe = effective_recipe(recipe_path, overrides)
    check_recipe(recipe, recipe_path)
    engine = Engine(recipe.engine)
    if engine.main:
        _open_run(recipe, out, resume)
    engine.wait()
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    torch.manual_seed(recipe.seed)
    check_normalisation(recipe.model.vision, recipe.image)
    corpora = {name: data.read(name, config) for name, config in recipe.data.items()}
    check_corpora(recipe, corpora)
    model = ReportModel(recipe)
    if engine.main:
        write_json(out / "run.json", _environment(recipe, model, engine))
        told = takes_indication(recipe.prompt)
        manifest = {name: _manifest(corpus, told) for name, corpus in corpora.items()}
        write_json(out / "data_manifest.json", manifest)
    else:
        progress = _silent
    run = _Run(recipe, out, corpora, engine, progress)
    model = run.stages(model)
    if engine.main:
        save_trained(model, out / "final", getattr(torch, recipe.export_dtype))
        load_trained(model, out / "final")  # measure what was saved, rounding included
        write_json(out / "metrics.json", run.measure(model))
    engine.wait()
    engine.accelerator.end_training()
    return out


def _silent(*_: Any) -> None:
    """Progress of the processes that show none."""


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


class _Run:
    """The stages of a run, and what they share."""

    def __init__(
        self,
        recipe: TrainRecipe,
        out: Path,
        corpora: Mapping[str, data.Corpus],
        engine: Engine,
        progress: Progress,
    ) -> None:
        self.recipe, self.out, self.corpora = recipe, out, corpora
        self.engine, self.progress = engine, progress

    def stages(self, model: ReportModel) -> ReportModel:
        """Run every stage that is not finished; the model with the result, in main memory."""
        self.features = self._cache(model)
        frozen = [s for s in self.recipe.stages if not trains_vision(s)]
        self._fill({name for stage in frozen for name in stage.data})
        self._start_projector(model)
        for stage in self.recipe.stages:
            model = self._stage(model, stage)
        return model

    def measure(self, model: ReportModel) -> dict[str, Any]:
        """The image-matters proof on the held-out part of every corpus that has images."""
        out: dict[str, Any] = {}
        for name, corpus in self.corpora.items():
            held = [e for s in ("val", "test") for e in self._examples(model, [name], s)]
            provable = len({e.sample.patient for e in held}) > 1 and any(
                e.sample.view for e in held
            )
            if provable and all(e.sample.image for e in held):
                self.progress(f"measuring on {name}", 0, 1, "")
                train_items = self._examples(model, [name], "train")
                figures = prove(model, train_items, held, self.features, model.recipe.seed)
                out[name] = {"split": "val+test", "dropped": corpus.dropped, **figures}
                self.progress(f"measuring on {name}", 1, 1, "")
        return out

    def _cache(self, model: ReportModel) -> FeatureCache:
        return FeatureCache(self.out / "features", model.vision, self.recipe.image)

    def _fill(self, names: Iterable[str]) -> None:
        tower = self.features.tower
        tower.to(self.engine.device)
        with self.engine.main_first():
            _fill_features(self.features, [self.corpora[n] for n in sorted(names)], self.progress)
        tower.cpu()

    def _start_projector(self, model: ReportModel) -> None:
        train = [s for c in self.corpora.values() for s in c.split("train")]
        paths = [path for s in train for path in s.images][:16]
        if paths:
            table = model.lm.get_input_embeddings().weight
            model.projector.start_at_scale(self.features(paths), float(table.std()))

    def _stage(self, model: ReportModel, stage: StageConfig) -> ReportModel:
        directory, engine = self.out / stage.name, self.engine
        if not (directory / "trained").is_dir():
            items = self._examples(model, stage.data, "train")
            kinds = {e.sample.image is not None for e in items}
            if len(kinds) > 1:
                raise ConfigError(
                    f"stage {stage.name!r} mixes image and text-only corpora; use two stages"
                )
            if self.recipe.engine.load_in_4bit:
                quantise(model.lm, engine.dtype)
            run_stage(
                model, stage, items, self._features(model, stage) if kinds == {True} else None,
                directory,
                lambda step, steps, loss: self.progress(
                    stage.name, step, steps, f"loss {loss:.3f}"
                ),
                held_out=self._examples(model, stage.data, "val"), engine=engine,
                board=self.out / "tensorboard" / stage.name
                if self.recipe.engine.tensorboard else None,
            )  # fmt: skip
            model = _in_main_memory(model, engine)
            if engine.main:
                save_trained(model, directory / "trained", torch.float32)
                clean(directory)
            engine.wait()
        load_trained_stage(model, directory)
        if trains_vision(stage):
            self.features = self._cache(model)
        return model

    def _features(self, model: ReportModel, stage: StageConfig) -> Features:
        return live(model.vision, self.recipe.image) if trains_vision(stage) else self.features

    def _examples(self, model: ReportModel, names: Sequence[str], split: str) -> list[Example]:
        return [
            example
            for name in names
            for example in examples(
                model, self.corpora[name].split(split), self.recipe.data[name].max_target_tokens
            )
        ]


def _fill_features(
    features: FeatureCache, corpora: Iterable[data.Corpus], progress: Progress
) -> None:
    images = [(s, path) for corpus in corpora for s in corpus.samples for path in s.images]
    for done, (sample, path) in enumerate(images, 1):
        with naming(sample, path):
            features.fill([path])
        progress("vision features", done, len(images), "")


def load_trained_stage(model: ReportModel, directory: Path) -> None:
    """Load the float32 result of a finished stage."""
    load_trained(model, directory / "trained")


@torch.no_grad()
def _in_main_memory(model: ReportModel, engine: Engine) -> ReportModel:
    """The model as it can be saved: a new one, where the old is in shards or in 4 bits."""
    if not engine.sharded and not model.recipe.engine.load_in_4bit:
        return model.cpu()
    fresh = ReportModel(model.recipe).eval()
    found = dict(model.named_parameters())
    for name, parameter in fresh.named_parameters():
        if found[name].is_floating_point():  # else 4 bits of what is in `fresh` already
            parameter.copy_(whole(found[name]))
    return fresh


def _manifest(corpus: data.Corpus, told: bool) -> dict[str, Any]:
    """Counts and hashes; ids are hashed too, as a hospital's may identify a patient.

    Lateral images and indications (where the model is `told` them) have a column only in a corpus
    that has some. An indication is hashed with its target: alone, it could be guessed.
    """
    columns: dict[str, Callable[[data.Sample], str]] = {
        "split": lambda s: s.split,
        "sha256(id)": lambda s: _short(s.id.encode()),
        "sha256(target)": lambda s: _short(s.target.encode()),
        "sha256(image file)": lambda s: _short(s.image.read_bytes()) if s.image else "-",
    }
    if any(s.lateral for s in corpus.samples):
        columns["sha256(lateral file)"] = lambda s: (
            _short(s.lateral.read_bytes()) if s.lateral else "-"
        )
    if told and any(s.indication for s in corpus.samples):
        columns["sha256(target,indication)"] = lambda s: (
            _short(f"{s.target}\0{s.indication}".encode()) if s.indication else "-"
        )
    samples = sorted(corpus.samples, key=lambda s: (s.split, s.id))
    rows = [" ".join(column(s) for column in columns.values()) for s in samples]
    return {
        "counts": {split: len(corpus.split(split)) for split in data.SPLITS},
        "dropped": corpus.dropped,
        "columns": " ".join(columns),
        "studies": rows,
        "sha256": hashlib.sha256("\n".join(rows).encode()).hexdigest(),
    }


def _environment(recipe: TrainRecipe, model: ReportModel, engine: Engine) -> dict[str, Any]:
    packages = (
        "torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "pillow", "pydicom"
    )  # fmt: skip
    return {
        "rx_edge": rx_edge.__version__,
        "git_commit": _git_commit(),
        "seed": recipe.seed,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": engine.processes,
        "sharded": engine.sharded,
        "device": engine.device.type,
        "precision": str(engine.dtype).removeprefix("torch."),
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
