"""Training on tiny models: what may change, what carries loss, and going on after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from rx_edge.cli import app
from rx_edge.config import ImageRecipe, StageConfig
from rx_edge.errors import ConfigError, TrainingError, UsageError
from rx_edge.model.catalogue import register
from rx_edge.model.report_model import IGNORE, ReportModel
from rx_edge.model.vision import load_vision
from rx_edge.prompting import encode
from rx_edge.train import data
from rx_edge.train.batching import Example, collate, epoch_order, examples
from rx_edge.train.data import Sample
from rx_edge.train.features import FeatureCache
from rx_edge.train.grounding import named_view
from rx_edge.train.objective import loss_of
from rx_edge.train.run import effective_recipe, train
from rx_edge.train.stages import run_stage


class Workbench:
    """What a stage needs, made from a recipe."""

    def __init__(self, recipe: Path, cache: Path) -> None:
        self.recipe = effective_recipe(recipe, [])
        torch.manual_seed(0)
        self.model = ReportModel(self.recipe).eval()
        self.features = FeatureCache(cache, self.model.vision, self.recipe.image)
        corpus = data.read("pairs", self.recipe.data["pairs"])
        self.items = examples(self.model, corpus.split("train"), 128)

    def changed_by(self, stage: StageConfig, directory: Path) -> set[str]:
        """Names of the model's tensors that running the stage changed."""
        before = {k: v.clone() for k, v in self.model.state_dict().items()}
        run_stage(self.model, stage, self.items, self.features, directory, lambda *_: None)
        after = self.model.state_dict()
        assert after.keys() == before.keys()
        return {k for k, v in before.items() if not torch.equal(v, after[k])}


@pytest.fixture
def bench(tiny_recipe: Path, tmp_path: Path) -> Workbench:
    return Workbench(tiny_recipe, tmp_path / "cache")


def losses(run: Path, *names: str) -> list[tuple[int, float]]:
    lines = [ln for n in names for ln in (run / n / "metrics.jsonl").read_text().splitlines()]
    return [(json.loads(line)["step"], json.loads(line)["loss"]) for line in lines]


def test_stages_change_only_what_they_train(bench: Workbench, tmp_path: Path) -> None:
    names = set(bench.model.state_dict())
    projector = {n for n in names if n.startswith("projector.")}
    adapter = {n for n in names if ".lora_" in n}
    assert projector
    assert adapter
    assert names - projector - adapter  # vision tower and base LM are there to be compared
    one, two = bench.recipe.stages
    assert bench.changed_by(one, tmp_path / "1") == projector
    assert bench.changed_by(two, tmp_path / "2") == projector | adapter
    warmup = replace(one, trains=("lora",))
    assert bench.changed_by(warmup, tmp_path / "3") == adapter


def test_loss_falls(tiny_run: Path) -> None:
    curve = [loss for _, loss in losses(tiny_run, "stage1", "stage2")]
    assert len(curve) == 6 + 9
    assert sum(curve[-3:]) < 0.8 * sum(curve[:3])


def test_only_report_tokens_carry_loss(bench: Workbench) -> None:
    items = sorted(bench.items, key=lambda e: len(e.ids))
    items = [items[0], items[-1]]
    assert len(items[0].ids) < len(items[1].ids)
    batch = collate(bench.model, items, bench.features)
    prompt = len(bench.model.prompt.before) + 4 + len(bench.model.prompt.after)
    for index, example in enumerate(items):
        targets = batch.targets[index]
        assert (targets[: prompt - 1] == IGNORE).all()
        assert targets[prompt - 1 :][: len(example.ids)].tolist() == list(example.ids)
        assert (targets[prompt - 1 + len(example.ids) :] == IGNORE).all()
        assert int(batch.mask[index].sum()) == prompt + len(example.ids) - 1


def test_loss_is_that_of_the_reference_model(bench: Workbench) -> None:
    """Padding, masking and the shortened head change nothing: same as one by one."""
    items = bench.items[:3]
    expected = []
    for example in items:
        with torch.inference_mode():
            soft = bench.model.projector(bench.features[example.sample.image][None])[0]
        logits = bench.model.teacher_forced(soft, list(example.ids[:-1]))
        expected.append(
            torch.nn.functional.cross_entropy(logits, torch.tensor(example.ids), reduction="none")
        )
    with torch.no_grad():
        found = loss_of(bench.model, collate(bench.model, items, bench.features))
    torch.testing.assert_close(found, torch.cat(expected).mean(), atol=1e-4, rtol=1e-4)


def test_targets_are_cut_at_a_sentence_end(bench: Workbench) -> None:
    tokenizer, end = bench.model.tokenizer, bench.model.prompt.end
    first, text = "The lungs are clear.", "The lungs are clear. The heart is large."
    short, whole = encode(tokenizer, first), encode(tokenizer, text)

    def ids(limit: int, *, complete: bool = True) -> list[int]:
        sample = Sample("i", "p", None, None, text, complete, "train")
        return list(examples(bench.model, [sample], limit)[0].ids)

    assert ids(len(whole)) == [*whole, end]
    assert ids(len(whole), complete=False) == whole  # the end is not known: never learned
    assert ids(len(whole) - 1) == short
    assert ids(3) == short[:3]


def test_order_depends_on_seed_stage_and_epoch_and_loses_nothing() -> None:
    sample = Sample("i", "p", None, None, "", True, "train")
    items = [Example(sample, tuple(range(n))) for n in range(1, 40)]
    order = epoch_order(items, 4, 0, "s", 0)
    assert order == epoch_order(items, 4, 0, "s", 0)
    assert sorted((e for b in order for e in b), key=lambda e: len(e.ids)) == items
    assert {len(b) for b in order} <= {3, 4}
    for other in ((1, "s", 0), (0, "t", 0), (0, "s", 1)):
        assert epoch_order(items, 4, *other) != order


@pytest.mark.parametrize(("stage", "step", "every"), [("stage1", 3, 1), ("stage2", 5, 2)])
def test_killed_run_goes_on_as_if_nothing_happened(
    tiny_recipe: Path, tiny_run: Path, tmp_path: Path, stage: str, step: int, every: int
) -> None:
    def kill(what: str, done: int, *_: Any) -> None:
        if (what, done) == (stage, step):
            raise KeyboardInterrupt

    out, overrides = tmp_path / "run", [f"checkpoint_every={every}"]
    with pytest.raises(KeyboardInterrupt):
        train(tiny_recipe, out, overrides=overrides, progress=kill)
    assert not (out / "final").exists()
    with (out / stage / "metrics.jsonl").open("a") as stream:
        stream.write('{"stage": "st')  # a kill in the middle of a line
    train(tiny_recipe, out, resume=True, overrides=overrides)
    names = ("stage1", "stage2")
    assert losses(out, *names) == losses(tiny_run, *names)
    for file in ("projector.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / "final" / file).read_bytes() == (tiny_run / "final" / file).read_bytes()
    assert not list(out.rglob("*.part"))


def test_resume_is_refused_where_it_would_mix_runs(tiny_recipe: Path, tmp_path: Path) -> None:
    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with pytest.raises(UsageError, match="holds no run to resume"):
        train(tiny_recipe, out, resume=True)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_recipe, out, progress=kill)
    with pytest.raises(UsageError, match="exists; add --resume"):
        train(tiny_recipe, out)
    with pytest.raises(TrainingError, match="the recipe differs from"):
        train(tiny_recipe, out, resume=True, overrides=["seed=1"])


def test_a_loss_that_is_not_finite_stops_the_run(bench: Workbench, tmp_path: Path) -> None:
    with torch.no_grad():
        next(bench.model.projector.parameters())[0] = float("nan")
    with pytest.raises(TrainingError, match=r"'stage1': the loss is nan at step 0; lower learning"):
        bench.changed_by(bench.recipe.stages[0], tmp_path / "1")
    assert not (tmp_path / "1" / "progress.safetensors").exists()


def test_a_gradient_that_overflows_stops_the_run_with_the_weights_as_they_were(
    bench: Workbench, tmp_path: Path
) -> None:
    """A hook blows up one gradient: the loss is fine, the step would not be."""
    weight = next(bench.model.projector.parameters())
    before = weight.clone()
    weight.requires_grad_(True)
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match=r"the gradient's norm is (nan|inf) at step 0"):
        bench.changed_by(bench.recipe.stages[0], tmp_path / "1")
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed", "expected key=value"),
        ("seed=x", "seed is 'x'; int is expected"),
        ("sede=1", "unknown key 'sede'; did you mean 'seed'"),
        ("image.sise=1", "unknown key 'sise'"),
        ("imag.size=1", "there is no 'imag' in the recipe"),
        ("stages.9.epochs=1", "there is no '9' in the recipe"),
        ("seed.x=1", "'x' is no key there"),
    ],
)
def test_wrong_override(tiny_recipe: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        effective_recipe(tiny_recipe, [override])


def test_overrides(tiny_recipe: Path) -> None:
    changes = ["seed=3", "name=a b", "lora.r=2", "stages.1.epochs=0.5", 'lora.targets=["q_proj"]']
    plain, found = effective_recipe(tiny_recipe, []), effective_recipe(tiny_recipe, changes)
    lora = replace(plain.lora, r=2, targets=("q_proj",))
    later = (plain.stages[0], replace(plain.stages[1], epochs=0.5))
    assert found == replace(plain, seed=3, name="a b", lora=lora, stages=later)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages=[]", r"no \[\[stages\]\]"),
        ("stages.1.name=stage1", "a name of its own"),
        ('stages.0.data=["pears"]', r"uses data \['pears'\]; known: pairs"),
        ("stages.0.data=[]", r"uses data \[\]"),
    ],
)
def test_recipe_that_cannot_run(
    tiny_recipe: Path, tmp_path: Path, override: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        train(tiny_recipe, tmp_path / "run", overrides=[override])
    assert not (tmp_path / "run").exists()


def test_cached_features_are_found_only_for_the_same_inputs(
    tiny_base: Path, tmp_path: Path
) -> None:
    cache, study = tmp_path / "cache", tmp_path / "a.png"
    tower, recipe = load_vision(str(tiny_base / "vit"), 56), ImageRecipe(size=56)

    def added(image_recipe: ImageRecipe, grey: int) -> int:
        Image.new("L", (64, 80), grey).save(study)
        known = len(list(cache.glob("*.safetensors"))) if cache.is_dir() else 0
        FeatureCache(cache, tower, image_recipe).fill([study])
        return len(list(cache.glob("*"))) - known

    assert added(recipe, 9) == 1
    assert added(recipe, 9) == 0
    assert added(recipe, 10) == 1  # pixels
    assert added(replace(recipe, mean=(0.5, 0.5, 0.5)), 9) == 1  # preprocessing
    with torch.no_grad():
        next(tower.parameters()).add_(1)
    assert added(recipe, 9) == 1  # weights


def test_run_files_name_no_machine_and_no_study(
    tiny_recipe: Path,
    tiny_base: Path,
    tiny_pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RX_EDGE_CACHE", str(tmp_path / "cache"))
    register("v", tiny_base / "vit")
    register("l", tiny_base / "llama")
    names = ["model.vision=v", "model.language=l", "stages.0.epochs=0.3", "stages.1.epochs=0.3"]
    out = train(tiny_recipe, tmp_path / "run", overrides=names)
    files = [*out.rglob("*.json"), *out.rglob("*.jsonl"), *out.rglob("*.safetensors")]
    assert {"run.json", "data_manifest.json", "metrics.json"} <= {f.name for f in files}
    for file in files:
        content = file.read_bytes()
        for secret in (tiny_base, tiny_pairs, tmp_path, Path.home(), "study-"):
            assert str(secret).encode() not in content, (file.name, secret)
    manifest = json.loads((out / "data_manifest.json").read_text())["pairs"]
    assert manifest["counts"] == {"train": 12, "val": 4, "test": 4}
    assert len(set(manifest["studies"])) == 20


@pytest.mark.parametrize(
    ("text", "view"),
    [
        ("Frontal chest radiograph. The lateral view is", "frontal"),
        (" LATERAL chest", "lateral"),
        ("Frontal and lateral chest radiograph.", None),
        ("The lungs are clear. Lateral", None),
        ("", None),
    ],
)
def test_named_view(text: str, view: str | None) -> None:
    assert named_view(text) == view


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.name=final", "names a directory"),
        ("stages.0.name=../x", "names a directory"),
        ("stages.0.batch_size=0", "batch_size >= 1"),
        ("lora.r=0", r"lora.r is 0; it must be at least 1"),
        ("lora.dropout=1.0", r"lora.dropout is 1.0; it must be in \[0, 1\)"),
        ("stages.1.learning_rate=-1e-3", "stages.1.learning_rate is -0.001; it must be above 0"),
        ("stages.0.learning_rate=nan", "learning_rate is nan"),
        ("stages.0.max_grad_norm=0.0", "max_grad_norm is 0.0"),
        ("stages.0.warmup_fraction=1.5", "warmup_fraction is 1.5"),
        ("stages.0.weight_decay=-0.1", "weight_decay is -0.1; it must be 0 or more"),
        ("stages.0.epochs=0.0", "epochs > 0"),
        ("checkpoint_every=0", "at least 1"),
    ],
)
def test_values_that_would_fail_late_are_refused_early(
    tiny_recipe: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tiny_recipe, tmp_path / "run", overrides=[override])
    assert not (tmp_path / "run").exists()


def test_a_recipe_is_named_or_a_file(tmp_path: Path) -> None:
    runner = CliRunner()
    wrong = runner.invoke(app, ["train", "dem0", "--out", str(tmp_path / "run")])
    assert wrong.exit_code == 2
    assert "no such recipe; did you mean 'demo'" in wrong.output
    changes = ["--set=data.iu.path=/nowhere", "--out", str(tmp_path / "run")]
    shipped = runner.invoke(app, ["train", "demo", *changes])  # found, read, and its data missed
    assert shipped.exit_code != 0
    assert "/nowhere" in shipped.output
