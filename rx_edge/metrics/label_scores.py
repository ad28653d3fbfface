"""F1 of the CheXpert-phrase rule labels of `labels.py`: draft against reference.

The same rules read both texts, so their mistakes partly cancel: this measures agreement of two
texts, not truth. They are not the CheXpert labeller and not CheXbert; published CheXbert F1
cannot be compared with them.

What "uncertain" counts as is a policy that changes the figure, so it is always named:

- u-positive: uncertain counts as present.
- u-negative: uncertain counts as absent. The default, as in `deployment_loss`.
- u-ignore: a finding is not counted in a study where either text is uncertain about it.

A finding that no text mentions has no F1 and is left out of macro averages; its support shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias, get_args

import numpy as np

from rx_edge.config import EvaluateConfig, UncertainPolicy
from rx_edge.metrics.bootstrap import Figure, Table, ratio
from rx_edge.metrics.labels import facts

Policy: TypeAlias = UncertainPolicy
POLICIES: tuple[Policy, ...] = get_args(Policy)
DEFAULT_POLICY: Policy = EvaluateConfig().uncertain

FINDINGS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")

_F1 = np.array([[2.0, 2.0], [0.0, 1.0], [0.0, 1.0]])  # TP, FP, FN -> 2 TP, 2 TP + FP + FN


def labels(text: str) -> dict[str, str]:
    """Finding -> "present", "uncertain" or "absent"; the first of these wins within a report.

    "No Finding" is a label of the whole report: no other finding, devices aside, is in the way.
    """
    order = ("absent", "uncertain", "present")
    found: dict[str, str] = {}
    for fact in facts(text):
        before = found.get(fact.finding, "absent")
        found[fact.finding] = max(before, fact.status, key=order.index)
    others = (status for f, status in found.items() if f not in ("No Finding", "Support Devices"))
    if any(status != "absent" for status in others):
        found.pop("No Finding", None)
    return found


def label_sums(reference: str, draft: str, policy: Policy = DEFAULT_POLICY) -> list[float]:
    """`status_sums` of two texts."""
    return status_sums(labels(reference), labels(draft), policy)


def status_sums(
    wanted: Mapping[str, str], found: Mapping[str, str], policy: Policy = DEFAULT_POLICY
) -> list[float]:
    """TP, FP and FN of each of the 14 findings, 42 numbers in the order of `FINDINGS`."""
    out: list[float] = []
    for finding in FINDINGS:
        pair = wanted.get(finding, "absent"), found.get(finding, "absent")
        if policy == "u-ignore" and "uncertain" in pair:
            out += [0.0, 0.0, 0.0]
            continue
        positive = ("present", "uncertain") if policy == "u-positive" else ("present",)
        a, b = pair[0] in positive, pair[1] in positive
        out += [float(a and b), float(b and not a), float(a and not b)]
    return out


def micro(findings: tuple[str, ...] = FINDINGS) -> Figure:
    """F1 over all (study, finding) pairs together, from sums (R, 42); NaN without a positive."""
    columns = _columns(findings)

    def figure(sums: Table) -> Table:
        counts = sums[:, columns].reshape(len(sums), len(findings), 3).sum(1)
        return ratio(counts @ _F1)

    return figure


def macro(findings: tuple[str, ...] = FINDINGS) -> Figure:
    """Mean F1 of the findings that have one, from sums (R, 42)."""
    columns = _columns(findings)

    def figure(sums: Table) -> Table:
        counts = sums[:, columns].reshape(len(sums), len(findings), 3) @ _F1  # (R, findings, 2)
        each = ratio(counts.reshape(-1, 2)).reshape(len(sums), len(findings))
        there = np.isfinite(each)
        scored = np.stack([np.where(there, each, 0.0).sum(1), there.sum(1)], axis=1)
        return ratio(scored.astype(np.float64))

    return figure


def per_finding(table: Table) -> dict[str, dict[str, float | None]]:
    """Counts and F1 of each finding over studies (studies, 42); support = TP + FN."""
    sums = table.sum(0).reshape(len(FINDINGS), 3)
    out: dict[str, dict[str, float | None]] = {}
    for finding, (tp, fp, fn) in zip(FINDINGS, sums.tolist(), strict=True):
        f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None
        out[finding] = {"f1": f1, "support": tp + fn, "tp": tp, "fp": fp, "fn": fn}
    return out


def _columns(findings: tuple[str, ...]) -> list[int]:
    return [3 * FINDINGS.index(f) + k for f in findings for k in range(3)]
