"""A tiny model with its examples and features, made from a recipe, for tests of a single step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rx_edge.config import StageConfig
from rx_edge.model.report_model import ReportModel
from rx_edge.train import data
from rx_edge.train.batching import Example, examples
from rx_edge.train.engine import Engine
from rx_edge.train.features import FeatureCache
from rx_edge.train.objective import Objective
from rx_edge.train.packing import packed_attention
from rx_edge.train.run import effective_recipe
from rx_edge.train.stages import run_stage
from rx_edge.train.trainables import trainable

GPT2_TARGETS = 'lora.targets=["c_attn", "c_proj", "c_fc"]'


class Workbench:
    """What a stage needs. Reports differ in length; adapters act from the start."""

    def __init__(self, recipe: Path, cache: Path, *overrides: str) -> None:
        self.recipe = effective_recipe(recipe, ["lora.dropout=0.0", *overrides])
        torch.manual_seed(0)
        self.model = ReportModel(self.recipe).eval()
        with torch.no_grad():
            for name, parameter in self.model.lm.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(0, 0.1)
        self.features = FeatureCache(cache, self.model.vision, self.recipe.image)
        self.corpus = data.read("pairs", self.recipe.data["pairs"])
        self.items = self.examples("train")

    def examples(self, split: str) -> list[Example]:
        """Those of a split, with targets of 9 to 23 tokens."""
        found = examples(self.model, self.corpus.split(split), 128)
        ids = [(*range(5, 13 + 2 * (i % 8)), *e.ids[-1:]) for i, e in enumerate(found)]
        return [replace(e, ids=tuple(i)) for e, i in zip(found, ids, strict=True)]

    def step(self, items: Sequence[Example], **engine: Any) -> tuple[float, dict[str, Any]]:
        """Loss and gradients of one step of stage 2, computed as `engine` says."""
        trainable(self.model, self.recipe.stages[1])
        config = replace(self.recipe.engine, **engine)
        self.model.zero_grad()
        objective = Objective(self.model, self.features, packed=config.packing)
        tokens = sum(len(e.ids) for e in items)
        runner = Engine(config)
        passes = runner.passes(items, lambda e: 40 + len(e.ids))
        with packed_attention(self.model.lm):
            loss = runner.gradients(objective, passes, tokens)
        gradients = {
            n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None
        }
        return loss, gradients

    def run(self, stage: StageConfig, directory: Path, **more: Any) -> None:
        """The stage from its start."""
        run_stage(self.model, stage, self.items, self.features, directory, lambda *_: None, **more)


def assert_same_step(found: tuple[float, Any], expected: tuple[float, Any]) -> None:
    """Equal within rounding of float32."""
    assert abs(found[0] - expected[0]) < 1e-5
    assert found[1].keys() == expected[1].keys()
    assert any(float(g.abs().max()) > 1e-3 for g in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)
