"""The study of the gate itself: what it keeps, and that it goes on after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rx_edge.cli import app
from rx_edge_bench import gate_honesty, interleaved

runner = CliRunner()


def test_the_honesty_study_keeps_every_ratio(tiny_bundle: Path) -> None:
    found = gate_honesty.measure(
        tiny_bundle, runs=1, planted=1, pairs=1, repeats=1, options=("--max-new-tokens=2",)
    )
    assert [row["kind"] for row in found["runs"]] == ["A/A", "planted"]
    assert {row["verdict"] for row in found["runs"]} == {"insufficient data"}
    assert found["runs"][0]["stages"]["total"]["ratio"] > 0
    assert found["extra_encoder_call_caught"]["share"] == 1.0
    assert str(tiny_bundle) not in json.dumps(found, allow_nan=False)


def test_the_honesty_study_continues_after_a_stop(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "honesty.json"
    command = ["study", "gate-honesty", str(tiny_bundle), "--pairs", "1", "--repeats", "1"]
    command += ["--planted", "0", "--runs", "2", "--json", str(out)]
    real, calls = interleaved.run_block, []

    def stopped_in_the_second_run(side: interleaved.Side, name: str) -> dict[str, Any]:
        calls.append(name)
        if len(calls) == 7:  # one pair leaves a doubt, so a run has three looks of two blocks
            raise KeyboardInterrupt
        return real(side, name)

    monkeypatch.setattr(interleaved, "run_block", stopped_in_the_second_run)
    assert runner.invoke(app, command).exit_code != 0
    first = json.loads(out.read_text())["runs"]
    assert len(first) == 1
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.stderr
    found = json.loads(out.read_text())
    assert len(calls) == 13
    assert found["runs"][:1] == first
    assert found["false_alarms"]["of"] == 2
    assert runner.invoke(app, command).exit_code == 2  # finished
    assert runner.invoke(app, [*command[:-6], "--runs", "9", *command[-2:]]).exit_code == 2


def test_the_interval_of_a_share_is_honest_about_few_runs() -> None:
    none = gate_honesty.share(0, 40)
    assert (none["low"], none["share"]) == (0.0, 0.0)
    assert 0.08 < none["high"] < 0.09
    assert gate_honesty.share(0, 0) == {"hits": 0, "of": 0}
