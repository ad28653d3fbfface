"""Two views and an indication: read, batched, trained, measured, and refused where pointless."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rx_edge.config import PromptConfig, TrainRecipe
from rx_edge.config_io import load_toml
from rx_edge.errors import ConfigError, InputError
from rx_edge.model.report_model import load_run
from rx_edge.train.batching import Example, collate, examples, sequence_length, soft_prompts
from rx_edge.train.data import Corpus
from rx_edge.train.features import live
from rx_edge.train.grounding import _means, _swapped, prove
from rx_edge.train.objective import nats_of
from rx_edge.train.run import _manifest, train
from tests.conftest import Once
from tests.train import corpora
from tests.train.workbench import Workbench, assert_same_step

TEMPLATE = PromptConfig().template.replace("{image}", "{image}\nIndication: {indication}")
BOTH = ["prompt.views=frontal+lateral", "data.pairs.views=frontal+lateral"]
TOLD = f"prompt.template={json.dumps(TEMPLATE)}"
SOFT = 4  # tokens of an image


@pytest.fixture(scope="session")
def root(once: Once) -> Path:
    return once("two-views", corpora.two_views)


@pytest.fixture
def changes(root: Path) -> list[str]:
    """Turns the tiny recipe into one of two views with indications."""
    return ["data.pairs.reader=mimic-cxr", f"data.pairs.path={root}", *BOTH, TOLD]


@pytest.fixture
def bench(tiny_recipe: Path, changes: list[str], tmp_path: Path) -> Workbench:
    return Workbench(tiny_recipe, tmp_path / "cache", *changes)


def nats(bench: Workbench, items: Sequence[Example]) -> float:
    with torch.no_grad():
        return float(nats_of(bench.model, collate(bench.model, items, bench.features)))


def test_packed_is_padded_with_and_without_a_lateral_image(bench: Workbench) -> None:
    assert [len(e.sample.images) for e in bench.items] == [2, 1] * 3
    assert [e.indication for e in bench.items] == [*(f"cough for {n} days." for n in range(5)), ""]
    padded = bench.step(bench.items, packing=False)
    assert_same_step(bench.step(bench.items, packing=True), padded)
    assert_same_step(bench.step(bench.items, packing=True, accumulate=2), padded)


def test_a_batch_is_as_long_as_it_was_planned(bench: Workbench) -> None:
    batch = collate(bench.model, bench.items, bench.features)
    planned = [sequence_length(bench.model, e) for e in bench.items]
    assert batch.mask.sum(1).tolist() == planned
    one, two = (replace(bench.items[0], ids=(1,), indication="") for _ in range(2))
    one = replace(one, sample=replace(one.sample, lateral=None))
    assert sequence_length(bench.model, two) - sequence_length(bench.model, one) == SOFT


def test_the_loss_is_that_of_the_reference_model(bench: Workbench) -> None:
    """Frontal, then lateral in the one slot, with the indication in the text after them."""
    items, total = bench.items[:2], 0.0
    for example in items:
        with torch.inference_mode():
            order = (example.sample.image, example.sample.lateral)
            of_images = [bench.model.projector(bench.features[p][None])[0] for p in order if p]
            soft = torch.cat(of_images)
            logits = bench.model.teacher_forced(soft, list(example.ids[:-1]), example.indication)
            loss = torch.nn.functional.cross_entropy(
                logits, torch.tensor(example.ids), reduction="sum"
            )
        total += float(loss)
    assert nats(bench, items) == pytest.approx(total, rel=1e-5)


def test_the_lateral_image_and_the_indication_reach_the_loss(bench: Workbench) -> None:
    example = bench.items[0]
    other = bench.items[2]
    sample = example.sample
    versions = [
        example,
        replace(example, indication=other.indication),
        replace(example, indication=""),
        replace(example, sample=replace(sample, lateral=other.sample.lateral)),
        replace(example, sample=replace(sample, lateral=None)),
        replace(example, sample=replace(sample, image=sample.lateral, lateral=sample.image)),
    ]
    found = sorted(nats(bench, [version]) for version in versions)
    assert min(b - a for a, b in itertools.pairwise(found)) > 1e-3


def test_a_live_tower_sees_every_view(bench: Workbench) -> None:
    features = live(bench.model.vision, bench.recipe.image)
    with torch.no_grad():
        found = soft_prompts(bench.model, bench.items, features)
        kept = soft_prompts(bench.model, bench.items, bench.features)
    assert [len(soft) for soft in kept if soft is not None] == [2 * SOFT, SOFT] * 3
    for one, other in zip(found, kept, strict=True):
        torch.testing.assert_close(one, other)


def test_an_indication_is_fitted_once_and_only_where_it_is_read(bench: Workbench) -> None:
    sample = replace(bench.items[0].sample, indication="cough " * 100)
    (example,) = examples(bench.model, [sample], 128)
    assert 0 < len(example.indication) < len(sample.indication)
    assert sample.indication.startswith(example.indication)
    end = bench.recipe.prompt.end_of_report
    with pytest.raises(InputError, match=r"study 's50000000': the indication contains") as error:
        examples(bench.model, [replace(sample, indication=f"cough {end}")], 128)
    assert "cough" not in str(error.value)
    bench.model.recipe = replace(bench.recipe, prompt=PromptConfig())
    assert examples(bench.model, [replace(sample, indication=end)], 128)[0].indication == ""


def test_the_mean_prompt_is_of_as_many_views() -> None:
    ones, twos = [torch.full((2, 3), v) for v in (1.0, 2.0, 6.0)], [torch.full((4, 3), 8.0)]
    one, two, other = _means([*ones, *twos], [torch.zeros(n, 3) for n in (2, 4, 6)])
    assert torch.equal(one, torch.full((2, 3), 3.0))
    assert torch.equal(two, twos[0])
    assert torch.equal(other, one)  # no training study has three: that of the usual number


def test_the_proof_swaps_all_images_and_keeps_the_indication(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, str]] = []
    faithful = type(bench.model).prompt_embeddings

    def spy(model: Any, soft: torch.Tensor, indication: str = "") -> torch.Tensor:
        seen.append((len(soft), indication))
        return faithful(model, soft, indication)

    monkeypatch.setattr(type(bench.model), "prompt_embeddings", spy)
    samples = [*bench.corpus.split("val"), *bench.corpus.split("test")]
    held_out = examples(bench.model, samples, 128)
    found = prove(bench.model, bench.items, held_out, bench.features, seed := 1)
    assert (found["studies"], found["studies_with_view"]) == (4, 4)
    swapped = [held_out[i] for i in _swapped(held_out, seed)]
    expected = {
        (SOFT * len(images.sample.images), told.indication)
        for others in (held_out, swapped)
        for images, told in zip(others, held_out, strict=True)
    }
    assert set(seen) == expected
    assert len(expected) > 4  # a study of one view got the images of one of two, or the other way
    values = [found[f"nll_{name}"] for name in ("right", "swapped", "mean_prompt")]
    assert len(set(values)) == 3


def test_manifests_know_what_is_read_and_old_ones_stay(bench: Workbench) -> None:
    corpus = bench.corpus
    plain = Corpus(tuple(replace(s, lateral=None, indication="") for s in corpus.samples))
    old = _manifest(plain, told=True)
    assert old["columns"] == "split sha256(id) sha256(target) sha256(image file)"
    lateral_unread = Corpus(tuple(replace(s, lateral=None) for s in corpus.samples))
    assert _manifest(lateral_unread, told=False) == old
    new = _manifest(corpus, told=True)
    rows = [row.split() for row in new["studies"]]
    assert [row[:4] for row in rows] == [row.split() for row in old["studies"]]
    assert {len(row) for row in rows} == {len(new["columns"].replace(" file", "").split())} == {6}
    assert [row[4] == "-" for row in rows].count(True) == 5
    assert [row[5] == "-" for row in rows].count(True) == 1
    first = corpus.split("train")[0]
    for changed in (replace(first, indication="x"), replace(first, lateral=first.image)):
        others = tuple(s for s in corpus.samples if s.id != first.id)
        assert _manifest(Corpus((changed, *others)), told=True)["sha256"] != new["sha256"]


def test_a_killed_run_of_two_views_goes_on(
    tiny_recipe: Path, changes: list[str], tmp_path: Path
) -> None:
    """Train, kill, resume: the same bits; and the run knows what it reads."""

    def kill(what: str, done: int, *_: Any) -> None:
        if (what, done) == ("stage2", 1):
            raise KeyboardInterrupt

    short = [*changes, "stages.0.epochs=1.0", "stages.1.epochs=2.0"]
    whole = train(tiny_recipe, tmp_path / "whole", overrides=short)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_recipe, tmp_path / "killed", overrides=short, progress=kill)
    again = train(tiny_recipe, tmp_path / "killed", resume=True, overrides=short)
    for file in ("final/projector.safetensors", "metrics.json", "data_manifest.json"):
        assert (again / file).read_bytes() == (whole / file).read_bytes()
    recipe = load_toml(again / "recipe.toml", TrainRecipe)
    assert (recipe.prompt.views, recipe.prompt.template) == ("frontal+lateral", TEMPLATE)
    model = load_run(again)
    assert model.prompt_for("cough") != model.prompt
    figures = json.loads((again / "metrics.json").read_text())["pairs"]
    assert (figures["studies"], figures["studies_with_view"]) == (4, 4)
    told = [*again.rglob("*.json"), *again.rglob("*.jsonl"), *again.rglob("*.toml")]
    assert not any("days" in file.read_text("utf-8") for file in told)
    assert len(list((again / "features").glob("*.safetensors"))) == 15


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (BOTH[:1], r"prompt\.views is 'frontal\+lateral' and no stage reads .* one of: pairs"),
        (BOTH[1:], r"data\.pairs\.views is 'frontal\+lateral' and prompt\.views 'one'"),
    ],
)
def test_views_of_prompt_and_corpora_belong_together(
    tiny_recipe: Path, tmp_path: Path, overrides: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        train(tiny_recipe, tmp_path / "run", overrides=overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([TOLD], r"has an \{indication\} slot, and no training study of pairs has an indication"),
        (BOTH, "no training study of pairs has a lateral image here"),
    ],
)
def test_what_no_study_fills_would_never_be_learned(
    tiny_recipe: Path, tmp_path: Path, overrides: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        train(tiny_recipe, tmp_path / "run", overrides=overrides)
