"""The latency gate: planted faults are caught, and what cannot be compared is refused.

Nothing here asserts a time: where blocks are timed, only their structure is looked at.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from rx_edge.cli import app
from rx_edge.config import RuntimeConfig
from rx_edge.errors import BackendError, BundleError, UsageError, VerificationError
from rx_edge.runtime.session import open_session
from rx_edge_bench import block, comparison, gate, gate_honesty, interleaved
from rx_edge_bench.environment import environment, fingerprint
from tests.conftest import REPOSITORY

runner = CliRunner()
SHORT = ("--max-new-tokens=4", "--repeats=1", "--threads=1")
TEXT_FREE = ("encoder_calls", "encoder_images", "prefill_calls", "prefill_tokens")


@pytest.fixture(scope="module")
def counted(tiny_bundle: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tiny bundle as it is, and with every image encoded twice."""
    return gate_honesty.count_with_two_encoder_calls(tiny_bundle)


@pytest.fixture(scope="module")
def real_block(tiny_bundle: Path) -> dict[str, Any]:
    return interleaved.run_block(interleaved.Side(tiny_bundle, options=SHORT), "A")


def blocks(real: dict[str, Any], factor: float, *, run: str = "r", count: int = 10) -> Any:
    """Synthetic blocks: a real one whose medians are seeded noise around `factor` seconds."""
    rng = np.random.default_rng(round(factor * 1000))
    rows = []
    for noise in np.exp(rng.normal(0.0, 0.01, count)):
        median = dict.fromkeys(comparison.STAGES, float(factor * noise))
        rows.append({**copy.deepcopy(real), "median": median})
    return interleaved.document(rows, "A", run)


def saved(path: Path, document: Any) -> str:
    path.write_text(json.dumps(document), encoding="utf-8")
    return str(path)


def test_every_engine_call_is_counted(
    counted: tuple[dict[str, Any], Any], tiny_bundle: Path
) -> None:
    honest, _ = counted
    with open_session(tiny_bundle, runtime=RuntimeConfig(drafts=False)) as session:
        report, _ = block._draft(session, block.first_canary(session))
        plain = block.count_work(session, block.first_canary(session))["work"]["next"]
    timings, first = report.timings, honest["work"]["first"]
    assert first["encoder_calls"] == first["encoder_images"] == 1
    assert first["prefill_tokens"] == timings.prompt_tokens
    assert plain["decode_passes"] == plain["decode_tokens"] == timings.decode_passes
    assert honest["work"]["next"]["prefill_tokens"] < timings.prompt_tokens  # the prefix is cached
    assert first["new_tokens"] == len(report.token_ids)
    assert first["logit_bytes"] > 0
    assert first["weight_bytes"] == sum(
        (tiny_bundle / name).stat().st_size for name in ("vision.onnx", "llm.Q8_0.gguf")
    )


def test_counts_do_not_depend_on_the_clock(tiny_bundle: Path) -> None:
    """Drafting learns from the seconds of a pass; while counting it must not."""
    found = []
    for pause in (0.0, 0.003):
        with open_session(tiny_bundle) as session:
            step = session.language.step

            def slow(ids: Any, step: Any = step, pause: float = pause) -> Any:
                time.sleep(pause * len(ids))
                return step(ids)

            assert session.drafter is not None
            session.drafter.costs.add(4, 1e-6 + pause)  # as if `rx-edge tune` had run here
            session.language.step = slow  # type: ignore[method-assign]
            found.append(block.count_work(session, block.first_canary(session)))
    assert found[0] == found[1]


def test_counting_leaves_the_session_as_it_was(tiny_bundle: Path) -> None:
    with open_session(tiny_bundle) as session:
        parts = (session.vision, session.language, session.drafter)
        block.count_work(session, block.first_canary(session))
        assert (session.vision, session.language, session.drafter) == parts


def test_an_extra_encoder_call_is_a_regression(counted: tuple[Any, Any]) -> None:
    honest, wasteful = counted
    found = gate.check_work(wasteful, {"counted": honest})
    assert found.verdict == "regression"
    changes = {(c.draft, c.name, c.before, c.now) for c in found.work}
    assert ("first", "encoder_calls", 1, 2) in changes
    assert ("next", "encoder_calls", 1, 2) in changes
    assert "REGRESSION" in found.table()


def test_less_work_is_an_improvement_and_passes(counted: tuple[Any, Any]) -> None:
    honest, wasteful = counted
    found = gate.check_work(honest, {"counted": wasteful})
    assert found.verdict == "none"
    assert "improved: update the baseline" in found.table()
    assert gate.check_work(honest, {"counted": honest}).work == ()


def test_the_committed_counts_of_the_tiny_model_still_hold(counted: tuple[Any, Any]) -> None:
    """Training differs between processors in the last bit, so its text may: not these counts."""
    committed = gate.read_baseline(REPOSITORY / "benchmarks/baselines/work-tiny.json")["counted"]
    for draft in ("first", "next"):
        for name in TEXT_FREE:
            assert counted[0]["work"][draft][name] == committed["work"][draft][name], (draft, name)


def test_another_text_or_study_is_refused(counted: tuple[dict[str, Any], Any]) -> None:
    honest, _ = counted
    other, here = {**honest, "text_sha256": "0" * 64}, {"fingerprint": fingerprint()}
    with pytest.raises(VerificationError, match="different drafts"):
        gate.check_work(other, {**here, "counted": honest})
    elsewhere = gate.check_work(other, {"fingerprint": "another", "counted": honest})
    assert elsewhere.verdict == "insufficient data"
    for name in comparison.IDENTITY:
        with pytest.raises(UsageError, match=name):
            gate.check_work({**honest, name: "other"}, {"counted": honest})


def test_a_block_is_a_process_with_its_medians(real_block: dict[str, Any]) -> None:
    assert real_block["schema"] == block.SCHEMA
    assert set(comparison.IDENTITY) <= real_block.keys()
    assert real_block["median"].keys() <= set(comparison.STAGES)
    assert all(len(seconds) == 1 for seconds in real_block["seconds"].values())
    assert real_block["work"]["first"]["new_tokens"] <= 4
    text = json.dumps(real_block)
    assert str(Path.home()) not in text
    assert "/tmp" not in text


def test_a_failed_block_says_why(tmp_path: Path, tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"side A failed: bundle .* is refused"):
        interleaved.run_block(interleaved.Side(tmp_path), "A")
    usage = interleaved.Side(tiny_bundle, options=("--repeats=0",))
    with pytest.raises(UsageError, match="at least one draft"):
        interleaved.run_block(usage, "A")
    broken = interleaved.Side(tiny_bundle, python=tmp_path / "python")
    with pytest.raises(BackendError, match="does not start"):
        interleaved.run_block(broken, "A")


def test_a_lever_can_be_switched_off(tiny_bundle: Path, real_block: dict[str, Any]) -> None:
    side = interleaved.Side(tiny_bundle, options=(*SHORT, "--off=drafts", "--off=prefix_cache"))
    without = interleaved.run_block(side, "B")
    assert without["text_sha256"] == real_block["text_sha256"]
    assert without["work"]["first"]["decode_tokens"] == without["work"]["first"]["decode_passes"]
    assert without["work"]["next"] == without["work"]["first"]
    with pytest.raises(UsageError, match="--off"):
        interleaved.run_block(replace(side, options=("--off=draft",)), "B")


def test_sides_take_turns(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(interleaved, "run_block", lambda _, name: order.append(name) or {})
    side = interleaved.Side(tiny_bundle)
    one, other = interleaved.measure_pairs(side, side, 3)
    assert "".join(order) == "ABBAAB"
    assert one["run"] == other["run"]
    assert len(one["blocks"]) == len(other["blocks"]) == 3


def test_the_other_side_is_recognised(tiny_bundle: Path, tmp_path: Path) -> None:
    def side(path: Path | None) -> interleaved.Side:
        return interleaved.reference(tiny_bundle, path)[0]

    assert side(None) == interleaved.Side(tiny_bundle)
    assert side(REPOSITORY).source == REPOSITORY
    assert side(Path(sys.executable)).python == Path(sys.executable)
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").touch()
    assert side(other).bundle == other
    with pytest.raises(UsageError, match="neither a bundle"):
        side(tmp_path / "nothing")


def test_another_source_tree_runs_there(tiny_bundle: Path, tmp_path: Path) -> None:
    """Side A imports the rx_edge of the tree that was named, not the installed one."""
    package = tmp_path / "rx_edge"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the other tree')\n", "utf-8")
    side = interleaved.reference(tiny_bundle, tmp_path)[0]
    with pytest.raises(BackendError, match="the other tree"):
        interleaved.run_block(side, "A")
    found = gate.check_time(
        side, interleaved.Side(tiny_bundle), pairs=7, tolerance=1.05, tick=lambda *_: None
    )
    assert found[0].verdict == "insufficient data"
    assert "the reference does not run" in found[0].notes[0]


def test_a_planted_slowdown_is_a_regression(real_block: dict[str, Any]) -> None:
    a, b = blocks(real_block, 1.0), blocks(real_block, 1.15)
    assert comparison.compare(a, b).verdict == "regression"
    assert comparison.compare(b, a).verdict == "none"
    assert comparison.compare(a, a).verdict == "none"
    assert comparison.compare(a, b, tolerance=1.3).verdict == "suspicious"


@pytest.mark.parametrize(
    ("slow", "wild", "looks", "verdict"),
    [
        (1.0, 0, 1, "none"),
        (1.15, 0, 1, "regression"),
        (1.15, 2, 2, "regression"),
        (1.15, 4, 3, "regression"),
        (1.0, 3, 2, "none"),
    ],
)
def test_a_doubt_is_looked_at_again(
    real_block: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    slow: float,
    wild: int,
    looks: int,
    verdict: str,
) -> None:
    """A neighbour slows `wild` of the first seven blocks of a side down, and then goes away."""
    made = {
        name: blocks(real_block, factor)["blocks"] for name, factor in (("A", 1.0), ("B", slow))
    }
    calls = {"A": -1, "B": 0}  # the first block of A only warms the page cache

    def block_of(_: interleaved.Side, name: str) -> dict[str, Any]:
        number, calls[name] = calls[name], calls[name] + 1
        found = copy.deepcopy(made[name][number % len(made[name])])
        beside = ("A" if slow > 1 else "B") == name and 0 <= number < wild
        for stage in comparison.DECIDING:
            found["median"][stage] *= 1.3 if beside else 1.0
        return found

    monkeypatch.setattr(interleaved, "run_block", block_of)
    side = interleaved.Side(Path("bundle"))
    found, one, other = gate.check_time(side, side, pairs=7, tolerance=1.05, tick=lambda *_: None)
    assert found.verdict == verdict
    assert calls == {"A": 7 * looks, "B": 7 * looks}
    assert one is not None
    assert other is not None
    assert len(one["blocks"]) == len(other["blocks"]) == 7 * looks


def test_a_slower_stage_alone_is_suspicious(real_block: dict[str, Any]) -> None:
    a, b = blocks(real_block, 1.0), blocks(real_block, 1.0)
    for row in b["blocks"]:
        row["median"]["vision"] *= 1.5
    found = comparison.compare(a, b)
    assert found.stages is not None
    assert found.stages["vision"].verdict == "regression"
    assert found.verdict == "suspicious"


def test_a_noisy_machine_gives_no_verdict(real_block: dict[str, Any]) -> None:
    a, b = blocks(real_block, 1.0), blocks(real_block, 1.0)
    for number, row in enumerate(b["blocks"]):
        row["median"]["total"] *= 1.5 if number % 2 else 0.7
    found = comparison.compare(a, b)
    assert found.verdict == "insufficient data"
    assert comparison.NOISY in found.notes


def test_more_work_at_the_same_speed_is_suspicious(real_block: dict[str, Any]) -> None:
    a, b = blocks(real_block, 1.0), blocks(real_block, 1.0)
    for row in b["blocks"]:
        row["work"]["next"]["prefill_tokens"] += 1
    found = comparison.compare(a, b)
    assert found.verdict == "suspicious"
    assert "more work" in found.table()


def test_files_that_were_measured_apart_say_so(real_block: dict[str, Any]) -> None:
    a, b = blocks(real_block, 1.0, run="one"), blocks(real_block, 1.0, run="two", count=9)
    assert comparison.APART in comparison.compare(a, b).notes


def test_exit_codes_of_compare(real_block: dict[str, Any], tmp_path: Path) -> None:
    files = {
        "a": blocks(real_block, 1.0),
        "slow": blocks(real_block, 1.2),
        "few": blocks(real_block, 1.0, count=6, run="few"),
        "elsewhere": {**blocks(real_block, 1.0), "fingerprint": "0" * 12},
        "text": blocks({**real_block, "text_sha256": "1" * 64}, 1.0),
        "study": blocks({**real_block, "pixel_sha256": "1" * 64}, 1.0),
        "latency": {"schema": "rx-edge-latency/1"},
    }
    paths = {name: saved(tmp_path / f"{name}.json", found) for name, found in files.items()}
    expected = {"a": 0, "slow": 4, "few": 5, "elsewhere": 2, "text": 3, "study": 2, "latency": 2}
    for name, code in expected.items():
        result = runner.invoke(app, ["bench", "compare", paths["a"], paths[name]])
        assert result.exit_code == code, (name, result.stderr)
    forced = ["bench", "compare", paths["a"], paths["elsewhere"], "--force-machine"]
    result = runner.invoke(app, forced)
    assert result.exit_code == 5
    assert comparison.ELSEWHERE in result.stderr


def test_the_gate_from_the_command_line(tiny_bundle: Path, tmp_path: Path) -> None:
    baseline, out = tmp_path / "baseline.json", tmp_path / "gate.json"
    command = ["bench", "gate", str(tiny_bundle), "--set=--max-new-tokens=4", "--baseline"]
    missing = runner.invoke(app, [*command, str(baseline)])
    assert missing.exit_code == 2
    accepted = runner.invoke(app, [*command, str(baseline), "--update-baseline"])
    assert accepted.exit_code == 0, accepted.stderr
    assert "commit it" in accepted.stderr
    result = runner.invoke(app, [*command, str(baseline), "--json", str(out)])
    assert result.exit_code == 0, result.stderr
    assert json.loads(out.read_text("utf-8"))["verdict"] == "none"
    before = baseline.read_text("utf-8")
    found = json.loads(before)
    found["counted"]["work"]["next"]["decode_passes"] -= 1
    saved(baseline, found)
    worse = runner.invoke(app, [*command, str(baseline)])
    assert worse.exit_code == 4
    assert "next draft, decode_passes" in worse.stderr
    assert json.loads(baseline.read_text("utf-8")) == found  # never changed implicitly


def test_a_gate_without_anything_to_compare_with_gives_no_verdict(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["bench", "gate", str(tiny_bundle)])
    assert result.exit_code == 5, result.stderr
    few = ["bench", "gate", str(tiny_bundle), "--against", str(tiny_bundle), "--pairs", "1"]
    assert runner.invoke(app, few).exit_code == 5
    bad = ["bench", "gate", str(tiny_bundle), "--set-b", "threads"]
    assert runner.invoke(app, bad).exit_code == 2


def test_blocks_from_the_command_line(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "blocks.json"
    command = ["bench", str(tiny_bundle), "--blocks", "1", "--repeats", "1", "--json", str(out)]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert comparison.read_blocks(out)["fingerprint"] == fingerprint()
    gate.write_baseline(tmp_path / "b.json", {}, comparison.read_blocks(out))
    assert comparison.read_blocks(tmp_path / "b.json") == comparison.read_blocks(out)


def test_a_fingerprint_tells_machines_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = fingerprint()
    assert mine == fingerprint()
    assert len(mine) == 12
    assert {"governor", "physical_cores_allowed", "llama_cpp"} <= environment().keys()
    monkeypatch.setattr("rx_edge_bench.environment.cpu_model", lambda: "another CPU")
    assert fingerprint() != mine


def test_a_slowed_engine_computes_the_same(tiny_bundle: Path) -> None:
    with open_session(tiny_bundle, max_new_tokens=3) as session:
        study = block.first_canary(session)
        plain = block.count_work(session, study)
        session.language = block.Slowed(session.language, 1.5)  # type: ignore[assignment]
        session.vision = block.Slowed(session.vision, 1.5)  # type: ignore[assignment]
        assert block.count_work(session, study)["text_sha256"] == plain["text_sha256"]


def test_two_texts_in_one_session_are_refused(tiny_bundle: Path) -> None:
    with open_session(tiny_bundle, max_new_tokens=3) as session:
        report, _ = block._draft(session, block.first_canary(session))
    with pytest.raises(VerificationError, match="two different drafts"):
        block._one_text([report, replace(report, token_ids=(1, 2, 3))])
