"""The rule labels beside a reading: precision, recall, F1 and kappa of each finding.

The reference is a file of labels made by reading Open-i reports without the rules in sight; it
says who read them and how. Its `final` labels count, its two passes give the reader's agreement
with itself.

The rules were changed after they had been seen beside `results/labels-iu100.json`, so figures from
it flatter them; `results/label-agreement-iu100-unseen.json` holds those from before.

Does not cover: sides.
"""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rx_edge.errors import UsageError
from rx_edge.metrics.bootstrap import Figure, Table, resampled, sampled
from rx_edge.metrics.label_scores import (
    DEFAULT_POLICY,
    FINDINGS,
    FIVE,
    POLICIES,
    labels,
    macro,
    micro,
    per_finding,
    status_sums,
)
from rx_edge.train.data.openi_xml import section
from rx_edge_bench.comparison import read_json

SCHEMA = "rx-edge-label-agreement/1"
READING_SCHEMA = "rx-edge-labels/1"
RULES = "tuned on the reading results/labels-iu100.json"
NOT_MENTIONED = "not mentioned"
STATUSES = {1: "present", -1: "uncertain", 0: "absent", None: NOT_MENTIONED}
DIGITS = 4
Labels = Mapping[str, str]  # finding -> status, of one report
FIGURES: dict[str, Figure] = {
    "micro_14": micro(),
    "macro_14": macro(),
    "micro_5": micro(FIVE),
    "macro_5": macro(FIVE),
}


def measure(reading: Path, reports: Path) -> dict[str, Any]:
    """Compare `labels` of the reports with what a reader found in them.

    Args:
        reading: a file of schema `READING_SCHEMA`.
        reports: directory of the Open-i XML files, as `rx-edge models fetch iu-reports` leaves it.

    Returns:
        JSON-ready, schema `SCHEMA`: per finding its counts, kappa over the four statuses, and
        precision, recall and F1 of "present" under each policy; F1 over findings with 95 %
        intervals over reports; the reader's agreement with itself.

    Raises:
        UsageError: another kind of file, or a report that is not there.
    """
    document = read_json(reading)
    if document.get("schema") != READING_SCHEMA:
        raise UsageError(f"{reading.name!r} holds no {READING_SCHEMA}")
    first, second, wanted = (_column(document, name) for name in ("pass1", "pass2", "final"))
    found = [labels(_text(reports, name)) for name in document["reports"]]
    tables: dict[str, Table] = {
        policy: np.asarray([status_sums(a, b, policy) for a, b in zip(wanted, found, strict=True)])
        for policy in POLICIES
    }
    return {
        "schema": SCHEMA,
        "reading": reading.name,
        "reading_sha256": hashlib.sha256(reading.read_bytes()).hexdigest(),
        "annotator": document["annotator"],
        "rules": RULES,
        "reports": len(found),
        "default_policy": DEFAULT_POLICY,
        "f1": {policy: _f1(table) for policy, table in tables.items()},
        "findings": _findings(wanted, found, tables),
        "reader_with_itself": {f: _agreement(f, first, second) for f in FINDINGS},
    }


def kappa(one: Sequence[str], other: Sequence[str]) -> float | None:
    """Cohen's kappa of two lists of categories; None where chance alone agrees everywhere."""
    agreed = sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
    chance = sum(one.count(c) * other.count(c) for c in set(one)) / len(one) ** 2
    return None if chance == 1 else (agreed - chance) / (1 - chance)


def _column(document: dict[str, Any], name: str) -> list[Labels]:
    """One pass over the reports, in the file's order; what is not mentioned has no key."""
    observations: list[str] = document["observations"]
    return [
        {f: STATUSES[v] for f, v in zip(observations, row[name], strict=True) if v is not None}
        for row in document["reports"].values()
    ]


def _text(reports: Path, name: str) -> str:
    try:
        root = ET.parse(reports / f"{name.removeprefix('CXR')}.xml").getroot()
    except OSError as error:
        raise UsageError(f"report {name} is absent: rx-edge models fetch iu-reports") from error
    return "\n".join(section(root, label) for label in ("FINDINGS", "IMPRESSION"))


def _f1(table: Table) -> dict[str, dict[str, float | None]]:
    counts = resampled(len(table))
    estimates = {n: sampled(f, table, counts).estimate() for n, f in FIGURES.items()}
    return {
        name: {"value": _short(e.value), "low": _short(e.low), "high": _short(e.high)}
        for name, e in estimates.items()
    }


def _findings(
    wanted: Sequence[Labels], found: Sequence[Labels], tables: Mapping[str, Table]
) -> dict[str, Any]:
    scored = {policy: per_finding(table) for policy, table in tables.items()}
    return {
        finding: {
            "reading": _counts(finding, wanted),
            "rules": _counts(finding, found),
            **_agreement(finding, wanted, found),
            **{policy: _scores(scored[policy][finding]) for policy in tables},
        }
        for finding in FINDINGS
    }


def _scores(counts: Mapping[str, float | None]) -> dict[str, float | None]:
    tp, fp, fn = (counts[name] or 0.0 for name in ("tp", "fp", "fn"))
    return {
        "precision": _short(tp / (tp + fp)) if tp + fp else None,
        "recall": _short(tp / (tp + fn)) if tp + fn else None,
        "f1": _short(counts["f1"]),
    }


def _counts(finding: str, reports: Sequence[Labels]) -> dict[str, int]:
    statuses = _statuses(finding, reports)
    return {status: statuses.count(status) for status in STATUSES.values()}


def _agreement(
    finding: str, one: Sequence[Labels], other: Sequence[Labels]
) -> dict[str, float | None]:
    """Share of reports with the same status, and kappa over the four statuses."""
    a, b = _statuses(finding, one), _statuses(finding, other)
    same = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
    return {"agreement": _short(same), "kappa": _short(kappa(a, b))}


def _statuses(finding: str, reports: Sequence[Labels]) -> list[str]:
    return [report.get(finding, NOT_MENTIONED) for report in reports]


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)
