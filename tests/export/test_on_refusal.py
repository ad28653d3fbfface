"""What fails verification is left out only when asked to, and never the default artefact."""

from __future__ import annotations

from pathlib import Path

import pytest

from rx_edge.bundle import open_bundle
from rx_edge.config import ExportConfig
from rx_edge.errors import VerificationError
from rx_edge.runtime.session import open_session
from rx_edge_export import tolerances
from rx_edge_export.export import export

PAIR = ("gguf:F16", "gguf:IQ4_NL")


@pytest.fixture(autouse=True)
def impossible_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """No 4-bit file can be this close."""
    monkeypatch.setitem(tolerances.PREFILL_KL, "IQ4_NL", 1e-12)


def test_a_refused_artefact_fails_the_export(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"prefill_logits of llm\.IQ4_NL"):
        export(tiny_run, tmp_path / "out", config=ExportConfig(language=PAIR))
    assert list(tmp_path.iterdir()) == []


def test_a_refused_artefact_is_left_out_and_named(tiny_run: Path, tmp_path: Path) -> None:
    config = ExportConfig(language=PAIR, on_refusal="drop")
    manifest = export(tiny_run, tmp_path / "out", config=config)
    assert [a.name for a in manifest.language] == ["gguf:F16"]
    assert "llm.IQ4_NL.gguf" not in manifest.files
    assert not (tmp_path / "out" / "llm.IQ4_NL.gguf").exists()
    assert "IQ4_NL" not in (tmp_path / "out" / "sbom.cdx.json").read_text("utf-8")
    assert any(
        note.startswith("refused and left out: llm.IQ4_NL.gguf (prefill_logits")
        for note in manifest.verification.notes
    )
    assert any(not s["passed"] for s in manifest.lineage["refused"])
    assert open_bundle(tmp_path / "out").manifest.verification.passed
    open_session(tmp_path / "out").close()


def test_the_default_artefact_cannot_be_left_out(tiny_run: Path, tmp_path: Path) -> None:
    config = ExportConfig(language=PAIR[::-1], on_refusal="drop")
    with pytest.raises(VerificationError, match=r"prefill_logits of llm\.IQ4_NL"):
        export(tiny_run, tmp_path / "out", config=config)
    assert list(tmp_path.iterdir()) == []
