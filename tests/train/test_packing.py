"""Packing and splitting a step change nothing but where it is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from rx_edge.errors import ConfigError
from rx_edge.train.batching import collate
from rx_edge.train.objective import nats_of
from rx_edge.train.packing import packed_attention, packs
from tests.factories import tiny_gpt2_dir
from tests.train.workbench import GPT2_TARGETS, Workbench, assert_same_step


@pytest.fixture(params=["llama", "gpt2"])
def bench(request: Any, tiny_recipe: Path, tmp_path: Path) -> Workbench:
    overrides = []
    if request.param == "gpt2":
        overrides = [f"model.language={tiny_gpt2_dir(tmp_path / 'gpt2')}", GPT2_TARGETS]
    return Workbench(tiny_recipe, tmp_path / "cache", *overrides)


def test_rows_lose_nothing_and_keep_to_the_limit() -> None:
    lengths = [7, 3, 9, 30, 4, 4, 1]
    rows = packs(list(range(7)), lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(7))
    assert [3] in rows  # longer than the limit: alone
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows if row != [3])
    assert len(rows) == 4  # 30 | 9 1 | 7 3 | 4 4: none fewer is possible
    assert rows == packs(list(range(7)), lengths, 10)


def test_packed_loss_and_gradients_are_those_of_padded_rows(bench: Workbench) -> None:
    items = bench.items[:5]
    assert len({len(e.ids) for e in items}) == 5
    assert_same_step(bench.step(items, packing=True), bench.step(items, packing=False))


def test_the_constant_start_is_computed_once(bench: Workbench) -> None:
    items, start = bench.items[:3], len(bench.model.prompt.before)
    batch = collate(bench.model, items, bench.features, packed=True)
    alone = [collate(bench.model, [e], bench.features).embeds.shape[1] for e in items]
    assert batch.shared == start
    assert batch.lengths == tuple(n - start for n in alone)
    assert batch.embeds.shape[1] == sum(alone) - 2 * start
    assert batch.positions is not None
    assert [int(batch.positions[0, start + n]) for n in (0, alone[0] - start)] == [start, start]


def test_a_step_is_the_same_in_parts(bench: Workbench) -> None:
    """Parts have other numbers of report tokens: a mean of means would differ."""
    items = bench.items[:7]
    whole = bench.step(items, packing=False)
    assert_same_step(bench.step(items, packing=False, accumulate=3), whole)
    assert_same_step(bench.step(items, packing=True, accumulate=2), whole)
    assert_same_step(bench.step(items, packing=True, pack_tokens=130), whole)
    assert_same_step(bench.step(items, packing=True, accumulate=99), whole)


def test_a_sample_does_not_see_its_neighbours(bench: Workbench) -> None:
    def middle(first: int, last: int, *, blind: bool = True) -> float:
        chosen = [bench.items[first], bench.items[2], bench.items[last]]
        batch = collate(bench.model, chosen, bench.features, packed=True)
        assert batch.lengths is not None
        a, n, _ = batch.lengths
        a += batch.shared
        only = torch.full_like(batch.targets, -100)
        only[:, a : a + n] = batch.targets[:, a : a + n]
        batch = replace(batch, targets=only)
        if not blind:  # the whole row as one sample, for comparison
            batch = replace(batch, lengths=(sum(batch.lengths),))
        with torch.no_grad(), packed_attention(bench.model.lm):
            return float(nats_of(bench.model, batch))

    expected = middle(0, 1)
    for neighbours in ((3, 4), (5, 0), (1, 1)):
        assert middle(*neighbours) == pytest.approx(expected, abs=1e-4, rel=1e-6)
        assert abs(middle(*neighbours, blind=False) - expected) > 0.1


def test_a_packed_model_still_pads_and_generates(bench: Workbench) -> None:
    items = bench.items[:3]
    with torch.no_grad():
        padded = nats_of(bench.model, collate(bench.model, items, bench.features))
        soft = bench.model.projector(bench.features([items[0].sample.image]))[0]
        plain = bench.model.greedy(soft, 8)
        with packed_attention(bench.model.lm):
            inside = nats_of(bench.model, collate(bench.model, items, bench.features))
            assert bench.model.greedy(soft, 8) == plain
    torch.testing.assert_close(inside, padded)
    assert bench.model.lm.config._attn_implementation == "sdpa"


def test_what_cannot_be_packed_is_refused() -> None:
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 9}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    windowed = MistralForCausalLM(MistralConfig(**tiny, **heads, sliding_window=32))
    config = MistralConfig(**tiny, **heads, sliding_window=None)
    eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for lm, reason in ((windowed, "attends within 32 tokens"), (eager, "uses 'eager' attention")):
        with pytest.raises(ConfigError, match=f"{reason}.*set engine.packing = false"):
            packed_attention(lm).__enter__()
