"""The rules beside a reading: computed by hand, and as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rx_edge.errors import UsageError
from rx_edge.metrics.label_scores import FINDINGS
from rx_edge.model.catalogue import fetched_dir
from rx_edge_bench.label_agreement import READING_SCHEMA, kappa, measure

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
REPORTS = {
    "CXR1": ("There is a left pleural effusion.", {"Pleural Effusion": 1}),
    "CXR2": ("Possible pneumonia.", {"Pneumonia": 1}),
    "CXR3": ("No pneumothorax.", {"Pneumothorax": 0, "Cardiomegaly": 0}),
}


def reading(root: Path, **other: Any) -> Path:
    """A reading of `REPORTS`, and the reports as Open-i XML beside it."""
    rows = {}
    for name, (text, found) in REPORTS.items():
        (root / f"{name[3:]}.xml").write_text(
            f'<a><AbstractText Label="IMPRESSION">{text}</AbstractText></a>', "utf-8"
        )
        row = [found.get(finding) for finding in FINDINGS]
        rows[name] = {"pass1": row, "pass2": row, "final": row}
    document = {"schema": READING_SCHEMA, "annotator": "a test", "observations": FINDINGS}
    path = root / "labels.json"
    path.write_text(json.dumps({**document, "reports": rows, **other}), "utf-8")
    return path


def test_by_hand(tmp_path: Path) -> None:
    result = measure(reading(tmp_path), tmp_path)
    pneumonia = result["findings"]["Pneumonia"]
    assert pneumonia["reading"]["present"] == pneumonia["rules"]["uncertain"] == 1
    assert pneumonia["u-negative"] == {"precision": None, "recall": 0.0, "f1": 0.0}
    assert pneumonia["u-positive"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert pneumonia["u-ignore"] == {"precision": None, "recall": None, "f1": None}
    assert result["findings"]["Cardiomegaly"]["agreement"] == pytest.approx(2 / 3, abs=1e-4)
    assert result["f1"]["u-negative"]["micro_14"]["value"] == pytest.approx(2 / 3, abs=1e-4)
    assert result["reader_with_itself"]["Pneumonia"] == {"agreement": 1.0, "kappa": 1.0}


def test_kappa() -> None:
    assert kappa("aabb", "aabb") == 1.0
    assert kappa("aabb", "abab") == 0.0
    assert kappa("aab", "abb") == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert kappa("aa", "aa") is None


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = reading(tmp_path)
    (tmp_path / "2.xml").unlink()
    with pytest.raises(UsageError, match="CXR2 is absent: rx-edge models fetch"):
        measure(path, tmp_path)
    with pytest.raises(UsageError, match=r"'labels\.json' holds no rx-edge-labels/1"):
        measure(reading(tmp_path, schema="something else"), tmp_path)


def test_the_published_table_is_what_the_code_computes() -> None:
    reports = fetched_dir("iu-reports")
    if not reports.is_dir():
        pytest.skip("IU reports are absent: rx-edge models fetch iu-reports")
    published = json.loads((RESULTS / "label-agreement-iu100.json").read_text("utf-8"))
    assert measure(RESULTS / "labels-iu100.json", reports) == published
