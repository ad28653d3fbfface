"""Every shipped recipe, and every family of towers, trains: the loss falls, nothing else changes.

The recipes are run as they are, on random models of their families and a handful of studies; only
names of models, batch sizes and epochs are replaced.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rx_edge.config import (
    CorpusConfig,
    EngineConfig,
    ImageRecipe,
    LoraSettings,
    ModelConfig,
    PromptConfig,
    StageConfig,
    TrainRecipe,
)
from rx_edge.config_io import load_toml, to_mapping
from rx_edge.errors import ConfigError, ModelError, UsageError
from rx_edge.model.parts import PARTS, trained_parts
from rx_edge.model.report_model import load_run, part_state
from rx_edge.model.sentencepiece_check import check
from rx_edge.train import recipes, run
from tests import factories
from tests.conftest import Once
from tests.train import corpora

LANGUAGES: dict[str, Callable[[Path], Path]] = {
    "demo": factories.tiny_llama_dir,
    "gpt2-l": factories.tiny_gpt2_dir,
    "gpt2-s": factories.tiny_gpt2_dir,
    "llama-radDino-518": factories.tiny_llama_dir,
    "one-stage-control": factories.tiny_llama_dir,
    "openllama-7b": factories.tiny_openllama_dir,
    "openllama-7b-two-views": factories.tiny_openllama_dir,
}
Changes = list[tuple[tuple[str, ...], dict[str, bool]]]  # of each stage: trains, name -> changed


@pytest.fixture
def data(tiny_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The corpora that the recipes name, in their published layouts."""
    splits = ["train"] * 6 + ["validate", "test"]
    rows = [(f"x{i}", 50000000 + i, 10000000 + i, split) for i, split in enumerate(splits)]
    rows += [(f"l{i}", 50000000 + i, 10000000 + i, "train") for i in (0, 3)]
    monkeypatch.setenv("RX_EDGE_MIMIC_CXR", str(corpora.mimic(tmp_path / "mimic", rows)))
    monkeypatch.setenv("RX_EDGE_IU_REPORTS", str(corpora.openi(tmp_path / "openi")))
    monkeypatch.setenv("RX_EDGE_CXR_PAIRS", str(tiny_pairs))


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> Changes:
    """What every stage of a run changed, bit for bit, over all tensors of the model."""
    faithful, found = run.run_stage, []

    def run_stage(model: Any, stage: Any, *rest: Any, **named: Any) -> None:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        faithful(model, stage, *rest, **named)
        after = model.state_dict()
        assert after.keys() == before.keys()
        found.append((stage.trains, {k: not torch.equal(v, after[k]) for k, v in before.items()}))

    monkeypatch.setattr(run, "run_stage", run_stage)
    return found


def group(name: str) -> str:
    """What of `StageConfig.trains` names this tensor."""
    if name.startswith("lm."):
        return "lora" if ".lora_" in name else "lm"
    if name.startswith("vision."):
        return "vision-lora" if ".lora_" in name else "vision"
    return name.partition(".")[0]


def check_changes(changes: Changes) -> None:
    for trains, changed in changes:
        for name, did in changed.items():
            # a mask token is of pre-training, and some towers' last blocks feed a CLS token only
            if group(name) != "vision" or group(name) not in trains:
                assert did == (group(name) in trains), (trains, name)
        seen = [did for name, did in changed.items() if group(name) == "vision"]
        assert sum(seen) >= (0.8 * len(seen) if "vision" in trains else 0)


def losses(out: Path, stage: str) -> list[float]:
    lines = (out / stage / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def check_run(out: Path) -> None:
    recipe = load_toml(out / "recipe.toml", TrainRecipe)
    curve = [loss for stage in recipe.stages for loss in losses(out, stage.name)]
    assert sum(curve[-3:]) < 0.9 * sum(curve[:3]), curve
    model = load_run(out)
    first, end = (
        model.tokenizer.id_to_token(i) for i in (model.prompt.before[0], model.prompt.end)
    )
    assert (first == "<s>") == recipe.prompt.add_bos
    assert end == recipe.prompt.end_of_report
    for part in trained_parts(recipe):
        saved, loaded = load_file(out / "final" / PARTS[part]), part_state(model, part)
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[n].float(), loaded[n]) for n in saved)


def test_every_recipe_is_covered_here() -> None:
    assert recipes.names() == sorted(LANGUAGES)


@pytest.mark.parametrize("name", sorted(LANGUAGES))
def test_a_recipe_trains(
    name: str, data: None, observed: Changes, once: Once, tmp_path: Path
) -> None:
    build = LANGUAGES[name]
    vision = once("towers/dinov2", lambda path: factories.tiny_tower_dir(path, "dinov2"))
    changes = [
        f"model.vision={vision}",
        f"model.language={once(f'lms/{build.__name__}', build)}",
        "threads=1",
        "engine.device=cpu",
    ]
    stages = load_toml(recipes.find(name), TrainRecipe).stages
    for index in range(len(stages)):
        changes += [f"stages.{index}.epochs=4.0", f"stages.{index}.batch_size=3"]
    out = run.train(recipes.find(name), tmp_path / "run", overrides=changes)
    assert [trains for trains, _ in observed] == [stage.trains for stage in stages]
    check_changes(observed)
    check_run(out)


@pytest.mark.parametrize("family", factories.TOWERS)
def test_a_tower_of_every_family_is_trained(
    family: str, tiny_recipe: Path, observed: Changes, once: Once, tmp_path: Path
) -> None:
    vision = once(f"towers/{family}", lambda path: factories.tiny_tower_dir(path, family))
    changes = [
        f"model.vision={vision}",
        'stages.0.trains=["projector", "vision"]',
        "stages.0.learning_rate=3e-3",
        "stages.0.epochs=3.0",
    ]
    if family in ("dinov2", "swin"):
        changes.append('stages.1.trains=["projector", "lora", "vision-lora"]')
    if family == "swin":  # 7 x 7 features
        changes += ["model.pooling=resampler", "model.queries=4"]
    if family in ("siglip", "vit"):
        language = once("lms/tiny_gpt2_dir", factories.tiny_gpt2_dir)
        targets = 'lora.targets=["c_attn", "c_proj", "c_fc"]'
        changes += [f"model.language={language}", targets]
    out = run.train(tiny_recipe, tmp_path / "run", overrides=changes)
    check_changes(observed)
    check_run(out)
    first = losses(out, "stage1")
    assert sum(first[-3:]) < sum(first[:3])


def test_the_control_takes_as_many_steps_as_the_demo() -> None:
    demo, control = (load_toml(recipes.find(n), TrainRecipe) for n in ("demo", "one-stage-control"))
    warmup, one, two = demo.stages
    same, both = control.stages
    assert (control.model, control.data, control.image) == (demo.model, demo.data, demo.image)
    assert (control.lora, control.prompt, same) == (demo.lora, demo.prompt, warmup)
    assert (both.epochs, both.batch_size) == (one.epochs + two.epochs, one.batch_size)
    assert one.batch_size == two.batch_size
    assert set(both.trains) == {*one.trains, *two.trains}
    assert (both.data, both.learning_rate) == (two.data, two.learning_rate)


# what a recipe is about; the reason is its heading. alpha goes with r, std with mean
STATED = {"name", "licence", "data", "trains", "reader", "path", "alpha", "std", "validate_every"}
TABLES: dict[str, Any] = {
    "": TrainRecipe(), "model": ModelConfig(), "image": ImageRecipe(), "prompt": PromptConfig(),
    "lora": LoraSettings(), "engine": EngineConfig(), "data": CorpusConfig(),
    "stages": StageConfig(),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in recipes.names() if n != "demo"])
def test_what_differs_from_a_default_says_why(name: str) -> None:
    """A comment is directly above it, or above an earlier line that says the same."""
    table, above, told = "", "", set()
    for line in recipes.find(name).read_text("utf-8").splitlines():
        if line.startswith("["):
            table = line.strip("[]").partition(".")[0]
        elif "=" in line and not line.startswith("#"):
            ((key, value),) = tomllib.loads(line).items()
            if key not in STATED and value != to_mapping(TABLES[table]).get(key):
                assert above.startswith("#") or line in told, line
                told.add(line)
        above = line


def test_the_recipe_of_two_views_differs_in_what_is_read_only() -> None:
    one, two = (
        load_toml(recipes.find(f"openllama-7b{n}"), TrainRecipe) for n in ("", "-two-views")
    )
    prompt, mimic = replace(one.prompt, template="", views="frontal+lateral"), one.data["mimic"]
    assert replace(two.prompt, template="") == prompt
    assert two.prompt.template.replace("Indication: {indication}\n", "") == one.prompt.template
    data = {"mimic": replace(mimic, views="frontal+lateral")}
    assert two == replace(one, name=two.name, prompt=two.prompt, data=data)


def test_a_recipe_is_found_by_name() -> None:
    assert recipes.find("demo") == Path(recipes.__file__).parent / "demo.toml"
    assert recipes.find("some/where.toml") == Path("some/where.toml")
    with pytest.raises(UsageError, match="did you mean 'gpt2-s'.* demo, gpt2-l, .*openllama-7b"):
        recipes.find("gpt2s")


def test_a_wrong_fast_tokenizer_is_refused_before_training(
    data: None, once: Once, tmp_path: Path
) -> None:
    language = factories.tiny_openllama_dir(tmp_path / "lm")
    check(language)
    file = language / "tokenizer.json"
    spec = json.loads(file.read_text("utf-8"))
    spec["model"]["merges"].reverse()  # loads and runs, and splits otherwise
    file.write_text(json.dumps(spec), "utf-8")
    vision = once("towers/dinov2", lambda path: factories.tiny_tower_dir(path, "dinov2"))
    changes = [f"model.vision={vision}", f"model.language={language}", "threads=1"]
    with pytest.raises(ModelError, match="splits .* differently from tokenizer.model"):
        run.train(recipes.find("openllama-7b"), tmp_path / "run", overrides=changes)
    file.unlink()
    with pytest.raises(ModelError, match=r"a tokenizer\.model and no tokenizer\.json .* make one"):
        run.train(recipes.find("openllama-7b"), tmp_path / "run2", overrides=changes)


def test_what_a_stage_cannot_train_is_refused(tiny_recipe: Path) -> None:
    with pytest.raises(
        ConfigError, match="valid: 'projector', 'lora', 'vision', 'vision-lora', 'lm'"
    ):
        run.effective_recipe(tiny_recipe, ['stages.0.trains=["tower"]'])
