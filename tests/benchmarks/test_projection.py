"""The bounds follow from bytes and operations, and say that they are projections."""

from __future__ import annotations

from typing import Any

import pytest

from rx_edge_bench.projection import GPUS, TOWERS, project


def _rows(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["card"], row["precision"]): row for row in result["rows"]}


def test_bytes_and_bounds_of_a_7b_model() -> None:
    result = project()
    rows = _rows(result)
    assert len(rows) == len(GPUS) * 3
    # llama.cpp's own 7B files: 13.5, 7.16 and 4.08 GB
    for precision, size in (("F16", 13.5e9), ("Q8_0", 7.16e9), ("Q4_K_M", 4.08e9)):
        assert rows["L4", precision]["weight_bytes"] == pytest.approx(size, rel=0.02)
    card = rows["GeForce RTX 4090", "Q4_K_M"]
    assert card["per_token"] == pytest.approx(4.2e-3, rel=0.05)
    assert card["decode"] == pytest.approx(100 * card["per_token"])
    assert card["report"] == card["prefill"] + card["decode"] + max(card["vision"].values())
    assert card["decode_at_reported_share"] == pytest.approx(card["decode"] / 0.7)
    assert rows["L4", "Q4_K_M"]["decode_at_reported_share"] is None
    assert result["kind"].startswith("projection")


def test_proposals_save_passes_until_operations_bound_them() -> None:
    alone, drafted = _rows(project()), _rows(project(tokens_per_pass=4.2, proposed=7))
    for key, row in drafted.items():
        assert row["decode"] < alone[key]["decode"]
    wide = _rows(project(tokens_per_pass=4.2, proposed=4000))
    assert wide["RTX A4000", "Q4_K_M"]["decode"] > alone["RTX A4000", "Q4_K_M"]["decode"]


def test_what_does_not_fit_is_marked() -> None:
    rows = _rows(project(prompt_tokens=4000, new_tokens=4000))
    assert not rows["RTX A4000", "F16"]["fits"]
    assert rows["RTX A4000", "Q4_K_M"]["fits"]


def test_operations_of_a_tower() -> None:
    base = TOWERS[0]
    # 86 million weights, 1,370 tokens, two operations each, and a third more for attention
    assert base.operations == pytest.approx(2 * 85e6 * 1370 * 1.3, rel=0.05)
