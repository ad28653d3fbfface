"""The training study: both sides compute the same loss, count the same tokens, and run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rx_edge.config import PromptConfig
from rx_edge.config_io import to_mapping
from rx_edge.errors import ConfigError, TrainingError
from rx_edge.train.batching import collate
from rx_edge.train.objective import loss_of
from rx_edge.train.run import effective_recipe
from rx_edge_bench import training_block
from rx_edge_bench.training import SIDES, measure, summary
from rx_edge_bench.training_block import PlainModel, Rows, Task, padded, read_task
from tests.train.corpora import two_views


def task_of(recipe: Path, work: Path, *changes: str, steps: int = 3) -> Task:
    effective = effective_recipe(recipe, ["lora.dropout=0.0", *changes])
    plain = {"recipe": to_mapping(effective), "stage": "stage2", "steps": steps}
    return read_task({**plain, "work": str(work), "seed": 0})


def test_both_sides_see_the_same_loss_and_the_same_tokens(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    task = task_of(tiny_recipe, tmp_path)
    training_block.prepare(task)
    rows, plain = Rows(task), PlainModel(task.model.eval())
    rows.items[0] = replace(rows.items[0], ids=rows.items[0].ids[:3])  # so that one is padded
    with torch.no_grad():
        out = plain(**padded([rows[i] for i in range(4)]))
        batch = collate(task.model, rows.items[:4], task.features)
        torch.testing.assert_close(out.loss, loss_of(task.model, batch), atol=1e-5, rtol=1e-5)
    assert plain.tokens == [int(batch.mask.sum())]
    assert plain.padded[0] > plain.tokens[0] + 4
    assert out.logits.shape[1] == batch.embeds.shape[1] + 1  # every position, as planned


def test_an_indication_is_in_the_prompt_of_both_sides(tiny_recipe: Path, tmp_path: Path) -> None:
    template = PromptConfig().template.replace("{image}", "{image}\n{indication}")
    told = f"prompt.template={json.dumps(template)}"
    corpus = ["data.pairs.reader=mimic-cxr", f"data.pairs.path={two_views(tmp_path / 'm')}"]
    task = task_of(tiny_recipe, tmp_path, told, *corpus, steps=1)
    training_block.prepare(task)
    task.items[0] = replace(task.items[0], indication="cough and a long history of fever")
    rows, plain = Rows(task), PlainModel(task.model.eval())
    with torch.no_grad():
        out = plain(**padded([rows[i] for i in range(6)]))
        batch = collate(task.model, rows.items, task.features)
        torch.testing.assert_close(out.loss, loss_of(task.model, batch), atol=1e-5, rtol=1e-5)
    both = ["prompt.views=frontal+lateral", "data.pairs.views=frontal+lateral"]
    with pytest.raises(ConfigError, match="the plain way is written for one image of a study"):
        task_of(tiny_recipe, tmp_path, told, *corpus, *both)


def test_both_sides_train(tiny_recipe: Path, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for side in ("ours", "trainer"):
        task = task_of(tiny_recipe, tmp_path)
        if side == "ours":
            prepared = training_block.prepare(task)
            assert prepared["train_studies"] == 12
            assert prepared["val_studies"] == 4
        before = {n: p.clone() for n, p in task.model.named_parameters()}
        found[side] = getattr(training_block, side)(task)
        changed = {n for n, p in task.model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {n for n in before if n.startswith("projector.") or ".lora_" in n}
    ours, theirs = found["ours"], found["trainer"]
    for one in (ours, theirs):
        assert len(one["losses"]) == 3
        assert one["tokens_per_second"] == one["tokens"] / one["seconds"]
        assert one["losses"][-1] < one["losses"][0]
        assert one["val_loss"] < one["losses"][0]
        assert one["peak_rss_bytes"] > 1e8
    # the same reports in the same steps, without dropout
    assert ours["tokens"] == theirs["tokens"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)
    assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-3)
    json.dumps(found, allow_nan=False)


def blocks(*differences: float) -> dict[str, list[dict[str, float]]]:
    base = {"peak_rss_bytes": 2e9, "padding": 0.2}
    return {
        SIDES[0]: [
            {**base, "tokens_per_second": 300.0, "peak_rss_bytes": 1e9, "val_loss": 1.5 + d}
            for d in differences
        ],
        SIDES[1]: [{**base, "tokens_per_second": 100.0, "val_loss": 1.5} for _ in differences],
    }


@pytest.mark.parametrize(
    ("differences", "agree"),
    [
        ((0.01, -0.01, 0.02, -0.01), True),
        ((0.10, 0.11, 0.10, 0.11), False),
        ((0.01, -0.01, 0.02), None),
    ],
)
def test_losses_agree_within_the_noise_of_the_pairs(
    differences: tuple[float, ...], agree: bool | None
) -> None:
    found = summary(blocks(*differences))
    assert found["tokens_per_second_ratio"]["median"] == 3.0
    assert found["peak_rss_ratio"]["median"] == 0.5
    assert found["trainer_padding"]["median"] == 0.2
    assert found["val_loss_difference"]["agree"] is agree


def test_what_cannot_be_compared_is_refused(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = effective_recipe(tiny_recipe, [])
    with pytest.raises(ConfigError, match=r"--stage is 'x'; the recipe has: stage1, stage2"):
        measure(recipe, "x", tmp_path, steps=2, pairs=1)
    with pytest.raises(ConfigError, match="an epoch of the stage has 3"):
        task_of(tiny_recipe, tmp_path, steps=4)
    with pytest.raises(ConfigError, match="at least 2 steps"):
        measure(recipe, "stage1", tmp_path, steps=1, pairs=1)
    absent = effective_recipe(tiny_recipe, ["data.pairs.path=/nowhere"])
    with pytest.raises(TrainingError, match=r"a block of prepare failed: .*'/nowhere"):
        measure(absent, "stage1", tmp_path, steps=2, pairs=1)
