"""The plugin as a lab meets it: a test run of its own, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytest_plugins = ["pytester"]
PLUGIN = "rx_edge_bench.pytest_plugin"

TEST = """
def test_not_slower(latency_gate):
    result = latency_gate({bundle!r}, baseline={baseline!r})
    assert result.verdict == "none"

def test_something_else():
    pass
"""


def test_it_is_registered_and_light() -> None:
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        points = tomllib.load(file)["project"]["entry-points"]["pytest11"]
    assert points == {PLUGIN: PLUGIN}
    code = f"import sys, {PLUGIN}; sys.exit('rx_edge' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_gate_in_a_foreign_test_run(
    pytester: pytest.Pytester, tiny_bundle: Path, tmp_path: Path
) -> None:
    from rx_edge_bench import gate, interleaved

    counted = gate.gate(interleaved.Side(tiny_bundle)).counted
    baseline = tmp_path / "baseline.json"
    gate.write_baseline(baseline, counted)
    pytester.makepyfile(TEST.format(bundle=str(tiny_bundle), baseline=str(baseline)))
    run = ("-p", PLUGIN, "--strict-markers", "-p", "no:cacheprovider")
    pytester.runpytest_subprocess(*run).assert_outcomes(passed=2)
    left = pytester.runpytest_subprocess(*run, "-m", "not latency_gate")
    left.assert_outcomes(passed=1, deselected=1)
    counted["work"]["next"]["encoder_calls"] = 0
    gate.write_baseline(baseline, counted)
    worse = pytester.runpytest_subprocess(*run)
    worse.assert_outcomes(failed=1, passed=1)
    worse.stdout.fnmatch_lines(["*next draft, encoder_calls: 0 -> 1*REGRESSION*"])
    baseline.unlink()
    missing = pytester.runpytest_subprocess(*run)
    missing.assert_outcomes(failed=1, passed=1)
    missing.stdout.fnmatch_lines(["*latency gate: *cannot be read*"])
