"""`--recipe all` on the tiny model: every format in one export, and the same bytes twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rx_edge.bundle import MANIFEST, open_bundle
from rx_edge.cli import app
from rx_edge.runtime.session import open_session
from rx_edge_bench.latency import run_to_end
from rx_edge_export import recipes, targets
from rx_edge_export.export import export

runner = CliRunner()


@pytest.fixture(scope="module")
def everything(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("all") / "bundle"
    export(tiny_run, out, config=recipes.load("all"))
    return out


def test_one_command_makes_and_verifies_every_format(everything: Path) -> None:
    manifest = open_bundle(everything).manifest
    assert {a.name for a in manifest.vision} == set(targets.VISION)
    assert {a.name for a in manifest.language} == set(targets.LANGUAGE)
    tested = {s.artifact for s in manifest.verification.stages}
    for artifact in (*manifest.vision, *manifest.language, *manifest.stock):
        assert artifact.file in tested, artifact.name
    for artifact in manifest.vision:
        if artifact.format == "vision_tensorrt":
            assert set(artifact.details["tensorrt"]["engines"]) == {"sm89", "sm120"}
            assert any(
                f"machine: {artifact.name} (" in note for note in manifest.verification.notes
            )
    assert (everything / "sbom.cdx.json").is_file()
    assert (everything / "stock" / "README.md").is_file()


def test_the_same_export_gives_the_same_bytes(
    everything: Path, tiny_run: Path, tmp_path: Path
) -> None:
    export(tiny_run, tmp_path / "again", config=recipes.load("all"))
    first, second = (
        json.loads((root / MANIFEST).read_text("utf-8"))
        for root in (everything, tmp_path / "again")
    )
    assert first.pop("created") <= second.pop("created")
    assert first["files"] == second["files"]
    assert first == second


@pytest.mark.parametrize("name", targets.LANGUAGE)
def test_every_language_artefact_drafts(everything: Path, phantom_study: Path, name: str) -> None:
    with open_session(everything, language=name, max_new_tokens=8) as session:
        report = run_to_end(session, phantom_study)
    assert len(report.token_ids) == 8 or report.finish == "end"
    assert name.split(":")[1] in report.provenance["language"]


@pytest.mark.parametrize("name", ["onnx:fp32", "onnx:fp16", "onnx:int8"])
def test_every_vision_artefact_drafts(everything: Path, phantom_study: Path, name: str) -> None:
    with open_session(everything, vision=name, max_new_tokens=8) as session:
        assert name.split(":")[1] in run_to_end(session, phantom_study).provenance["vision"]


def test_verify_on_the_command_line(everything: Path, tmp_path: Path) -> None:
    html = tmp_path / "page.html"
    result = runner.invoke(app, ["verify", str(everything), "--json", "--html", str(html)])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["passed"]
    assert len([n for n in found["notes"] if n.startswith("not run on this machine")]) == 3
    assert all({"stage", "value", "tolerance"} <= set(s) for s in found["stages"])
    assert "not run on this machine: tensorrt:fp8" in html.read_text("utf-8")
