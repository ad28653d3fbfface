"""`--recipe all` on the tiny model: every format in one export, and the same bytes twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rx_edge.bundle import MANIFEST, open_bundle
from rx_edge.cli import app
from rx_edge.model.report_model import load_run
from rx_edge.runtime.session import Session, open_session
from rx_edge.types import SoftPrompt
from rx_edge_bench.latency import run_to_end
from rx_edge_export import calibration, recipes, targets, verify_drafts
from rx_edge_export import verify as verify_module
from rx_edge_export.export import export
from rx_edge_export.golden import Drafts
from rx_edge_export.reference import draft

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


def test_every_vision_file_is_judged_by_its_own_soft_prompts(
    everything: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU, tensorrt:int8 runs under the name of another file's artefact."""
    encoded: list[str] = []

    def encode(session: Session, drafts: Drafts) -> list[SoftPrompt]:
        encoded.append(session.vision_artifact.file)
        return verify_drafts.encode(session, drafts)

    monkeypatch.setattr(verify_module, "encode_all", encode)
    model = load_run(tiny_run)
    studies = calibration.load(None, [], model.recipe.image, calibration.MINIMUM).check[:2]
    bundle = open_bundle(everything)
    verify_module.verify(bundle, drafts=draft(model, studies))
    assert sorted(encoded) == sorted({a.file for a in bundle.manifest.vision})
