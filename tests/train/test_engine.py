"""The engine's axes: checkpointed activations, bfloat16, early stopping, TensorBoard."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rx_edge.config import EngineConfig, StageConfig
from rx_edge.errors import ConfigError, MissingExtraError, ModelError
from rx_edge.model.report_model import load_run
from rx_edge.train import stages
from rx_edge.train.engine import Engine
from rx_edge.train.features import live
from rx_edge.train.log import Log
from rx_edge.train.objective import Objective
from rx_edge.train.packing import packed_attention
from rx_edge.train.qlora import quantise
from rx_edge.train.run import train
from tests.factories import tiny_gpt2_dir
from tests.train.workbench import GPT2_TARGETS, Workbench, assert_same_step


@pytest.fixture
def bench(tiny_recipe: Path, tmp_path: Path) -> Workbench:
    return Workbench(tiny_recipe, tmp_path / "cache")


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("packing", [True, False])
def test_gradient_checkpointing_computes_twice_and_the_same(
    bench: Workbench, packing: bool
) -> None:
    layer, calls = bench.model.lm.get_base_model().model.layers[0], []
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    plain = bench.step(bench.items[:4], packing=packing)
    assert len(calls) == 1
    calls.clear()
    recipe = replace(bench.recipe, engine=EngineConfig(gradient_checkpointing=True))
    bench.model.recipe = recipe
    with stages._training(bench.model):
        saving = bench.step(bench.items[:4], packing=packing)
    assert len(calls) == 2
    assert_same_step(saving, plain)
    calls.clear()
    bench.step(bench.items[:4], packing=packing)
    assert len(calls) == 1  # and off again outside


def test_bfloat16_computes_coarsely_and_keeps_float32_weights(bench: Workbench) -> None:
    items, found = bench.items[:4], {}
    seen: set[torch.dtype] = set()
    projection = bench.model.lm.get_base_model().model.layers[0].mlp.down_proj.base_layer
    projection.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    for dtype in (torch.float32, torch.bfloat16):
        objective = Objective(bench.model, bench.features, packed=True, dtype=dtype)
        with torch.no_grad(), packed_attention(bench.model.lm):
            nats = objective(items)
        assert nats.dtype == torch.float32
        found[dtype] = float(nats)
    assert seen == {torch.float32, torch.bfloat16}
    assert found[torch.bfloat16] != found[torch.float32]
    assert found[torch.bfloat16] == pytest.approx(found[torch.float32], rel=0.05)
    assert Engine(EngineConfig(device="cpu")).dtype == torch.float32  # by default, on a CPU
    assert Engine(EngineConfig(precision="bfloat16")).dtype == torch.bfloat16
    stage = replace(bench.recipe.stages[1], epochs=0.4)
    bench.run(stage, bench.features.directory, engine=Engine(EngineConfig(precision="bfloat16")))
    assert {p.dtype for p in bench.model.parameters()} == {torch.float32}


def stopping(bench: Workbench, **changes: Any) -> StageConfig:
    settings = {"epochs": 4.0, "batch_size": 3, "validate_every": 1, "patience": 2}
    return replace(bench.recipe.stages[0], **settings | changes)


def test_a_stage_that_does_not_improve_stops(bench: Workbench, tmp_path: Path) -> None:
    held_out = bench.examples("val")
    bench.run(stopping(bench, learning_rate=0.0), tmp_path / "1", held_out=held_out)
    found = lines(tmp_path / "1")
    assert [line["step"] for line in found] == [1, 2, 3]  # the first is the best, then patience
    assert len({line["val_loss"] for line in found}) == 1


def test_the_best_weights_are_kept(bench: Workbench, tmp_path: Path) -> None:
    """Held-out reports of other words: every step of training makes them less likely."""
    held_out = [replace(e, ids=tuple(range(200, 200 + len(e.ids)))) for e in bench.examples("val")]
    stage = stopping(bench, trains=("projector", "lora"), learning_rate=2e-2, patience=3)
    bench.run(stage, tmp_path / "1", held_out=held_out)
    losses = [line["val_loss"] for line in lines(tmp_path / "1")]
    best = min(losses)
    assert losses.index(best) == len(losses) - 1 - stage.patience
    assert losses[-1] > best + 0.1
    engine = Engine(replace(bench.recipe.engine, packing=False))
    objective = Objective(bench.model, bench.features)
    passes = engine.passes(held_out, lambda e: len(e.ids))
    kept = engine.loss(objective, [passes], sum(len(e.ids) for e in held_out))
    assert kept == pytest.approx(best, abs=1e-4)


def test_without_patience_validation_only_reports(bench: Workbench, tmp_path: Path) -> None:
    stage = stopping(bench, validate_every=2, patience=0, epochs=1.0)
    bench.run(stage, tmp_path / "1", held_out=bench.examples("val"))
    assert ["val_loss" in line for line in lines(tmp_path / "1")] == [False, True] * 2
    assert not (tmp_path / "1" / "best.safetensors").exists()


def test_live_features_are_those_of_the_cache_and_carry_gradients(bench: Workbench) -> None:
    paths = [e.sample.image for e in bench.items[:3] if e.sample.image]
    found = live(bench.model.vision, bench.recipe.image)(paths)
    torch.testing.assert_close(found, bench.features(paths), atol=1e-5, rtol=1e-5)
    weight = next(bench.model.vision.parameters()).requires_grad_(True)
    live(bench.model.vision, bench.recipe.image)(paths).sum().backward()
    assert weight.grad is not None


def test_tensorboard_shows_what_the_log_holds(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(tmp_path / "metrics.jsonl", 0, tmp_path / "board")
    for step in (1, 2, 3):
        log.write(stage="s", step=step, loss=1 / step)
    log.close()
    resumed = Log(tmp_path / "metrics.jsonl", 1, tmp_path / "board")
    resumed.write(stage="s", step=2, loss=0.25)
    resumed.close()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    shown = {e.step: e.value for e in events.Scalars("loss")}
    assert shown == {1: 1.0, 2: 0.25}
    assert {line["step"]: line["loss"] for line in lines(tmp_path)} == shown


def test_tensorboard_that_is_absent_is_said_before_anything_starts(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r'pip install "rx-edge\[tensorboard\]"'):
        train(tiny_recipe, tmp_path / "run", overrides=["engine.tensorboard=true"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("engine.pack_tokens=0", "engine.pack_tokens is 0; at least 1"),
        ("engine.accumulate=0", "engine.accumulate is 0; at least 1"),
        ("stages.0.patience=2", "patience 2 and validate_every 0; .* set validate_every too"),
        ("stages.0.validate_every=-1", "validate_every -1"),
        ("stages.0.name=tensorboard", "names a directory"),
    ],
)
def test_an_engine_that_cannot_run_is_refused_early(
    tiny_recipe: Path, tmp_path: Path, override: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        train(tiny_recipe, tmp_path / "run", overrides=[override])
    assert not (tmp_path / "run").exists()


def test_four_bits_are_for_training_only(tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = ["engine.load_in_4bit=true", "stages.0.epochs=0.4", "lora.dropout=0.0"]
    run = train(tiny_recipe, out, overrides=changes)
    plain = train(tiny_recipe, tmp_path / "plain", overrides=changes[1:])
    curve, other = ([line["loss"] for line in lines(r / "stage2")] for r in (run, plain))
    assert curve[0] != other[0]  # coarser products
    assert curve[-1] < 0.8 * curve[0]
    parameters = dict(load_run(out).named_parameters())
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    base = dict(load_run(tmp_path / "plain").named_parameters())
    frozen = [n for n in base if n.startswith("lm.") and ".lora_" not in n]
    assert len(frozen) > 10
    assert all(torch.equal(parameters[n], base[n]) for n in frozen)


def test_four_bits_reach_every_frozen_layer_and_no_other(
    bench: Workbench, tiny_recipe: Path, tmp_path: Path
) -> None:
    lora = {n: p.clone() for n, p in bench.model.lm.named_parameters() if ".lora_" in n}
    assert quantise(bench.model.lm, torch.float32) == 2 * 7  # layers x linear layers
    packed = {n for n, p in bench.model.lm.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 2 * 7
    assert all(".layers." in n and ".lora_" not in n for n in packed)
    after = dict(bench.model.lm.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in lora.items())
    gpt2 = Workbench(
        tiny_recipe, tmp_path / "c", GPT2_TARGETS,
        f"model.language={tiny_gpt2_dir(tmp_path / 'gpt2')}",
    )  # fmt: skip
    with pytest.raises(ModelError, match="'gpt2' has no linear layers"):
        quantise(gpt2.model.lm, torch.float32)


def test_bitsandbytes_that_is_absent_is_said_before_anything_starts(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r'pip install "rx-edge\[qlora\]"'):
        train(tiny_recipe, tmp_path / "run", overrides=["engine.load_in_4bit=true"])
    assert not (tmp_path / "run").exists()
