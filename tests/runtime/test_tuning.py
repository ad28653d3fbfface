"""What was measured on this machine is remembered, and changes no draft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rx_edge.cli import app
from rx_edge.runtime import tuning
from rx_edge.runtime.drafting import WIDTHS
from rx_edge.runtime.session import open_session
from rx_edge_bench.latency import run_to_end

runner = CliRunner()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RX_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_profile_is_measured_kept_and_used(tiny_bundle: Path, phantom_study: Path) -> None:
    with open_session(tiny_bundle, max_new_tokens=10) as session:
        assert tuning.stored(session) is None
        before = run_to_end(session, phantom_study)
        profile = tuning.measure(session)
        assert set(profile.pass_seconds) == set(WIDTHS)
        assert profile.threads in profile.by_threads
        assert tuning.stored(session) == profile
    with open_session(tiny_bundle, max_new_tokens=10) as session:
        assert any(note.startswith("speed: as measured") for note in session.notes)
        assert session.drafter is not None
        measured = profile.pass_seconds[8] / profile.pass_seconds[1]
        assert session.drafter.costs.relative(8) == pytest.approx(measured)
        assert run_to_end(session, phantom_study).token_ids == before.token_ids
    with open_session(tiny_bundle, language="F16") as session:
        assert tuning.stored(session) is None  # another file, another profile


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"threads": "many"}'])
def test_a_damaged_profile_counts_as_none(tiny_bundle: Path, cache: Path, content: str) -> None:
    with open_session(tiny_bundle) as session:
        tuning.measure(session)
        (file,) = (cache / "speed").iterdir()
        file.write_text(content)
        assert tuning.stored(session) is None
    with open_session(tiny_bundle) as session:
        assert not any(note.startswith("speed") for note in session.notes)


def test_threads_that_the_user_set_stay(tiny_bundle: Path) -> None:
    with open_session(tiny_bundle, threads=1) as session:
        profile = tuning.measure(session)
        assert (profile.threads, profile.by_threads) == (1, {})


def test_the_command(tiny_bundle: Path) -> None:
    result = runner.invoke(app, ["tune", str(tiny_bundle), "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["threads"] >= 1
    table = runner.invoke(app, ["tune", str(tiny_bundle)])
    assert "16 tokens" in table.stdout
