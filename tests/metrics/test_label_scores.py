"""F1 of rule labels, checked by hand, under each policy."""

from __future__ import annotations

import numpy as np
import pytest

from rx_edge.metrics.bootstrap import Table, whole
from rx_edge.metrics.label_scores import (
    FINDINGS,
    FIVE,
    POLICIES,
    Policy,
    label_sums,
    labels,
    macro,
    micro,
    per_finding,
)
from rx_edge.metrics.labels import _MENTIONS

PAIRS = [
    ("There is a left pleural effusion.", "There is a pleural effusion."),  # TP
    ("No pleural effusion.", "There is a pleural effusion."),  # FP
    ("Cardiomegaly. A nodule.", "Cardiomegaly."),  # TP, FN
    ("Possible pneumonia.", "There is pneumonia."),  # by policy
]


def table(policy: Policy) -> Table:
    return np.asarray([label_sums(a, b, policy) for a, b in PAIRS])


@pytest.mark.parametrize(
    ("policy", "counts"),
    [("u-negative", (2, 2, 1)), ("u-positive", (3, 1, 1)), ("u-ignore", (2, 1, 1))],
)
def test_the_policy_decides_about_uncertain_findings(
    policy: Policy, counts: tuple[int, int, int]
) -> None:
    sums = table(policy)
    assert tuple(sums.sum(0).reshape(14, 3).sum(0).tolist()) == counts
    tp, fp, fn = counts
    assert whole(micro(), sums) == pytest.approx(2 * tp / (2 * tp + fp + fn))


def test_macro_is_the_mean_over_findings_that_occur() -> None:
    sums = table("u-negative")
    # effusion 2/3, cardiomegaly 1, lesion 0 (missed), pneumonia 0 (invented)
    assert whole(macro(), sums) == pytest.approx((2 / 3 + 1) / 4)
    assert whole(macro(FIVE), sums) == pytest.approx((2 / 3 + 1) / 2)
    assert whole(micro(FIVE), sums) == pytest.approx(2 * 2 / (2 * 2 + 1))


def test_the_table_of_findings_adds_up() -> None:
    found = per_finding(table("u-negative"))
    assert list(found) == list(FINDINGS)
    assert found["Pleural Effusion"] == {
        "f1": pytest.approx(2 / 3), "support": 1, "tp": 1, "fp": 1, "fn": 0,
    }  # fmt: skip
    assert found["Fracture"]["f1"] is None


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_report_agrees_and_an_empty_one_misses_everything(policy: Policy) -> None:
    text = "Cardiomegaly. There is a left pleural effusion. No pneumothorax."
    same = np.asarray([label_sums(text, text, policy)])
    assert [whole(f, same) for f in (micro(), macro(), micro(FIVE), macro(FIVE))] == [1.0] * 4
    nothing = np.asarray([label_sums(text, "", policy)])
    assert [whole(f, nothing) for f in (micro(), macro())] == [0.0, 0.0]
    assert nothing.sum() == 2.0  # both findings are missed, the absent one is not one


def test_present_wins_within_a_report() -> None:
    assert labels("No effusion. Possible effusion.")["Pleural Effusion"] == "uncertain"
    assert labels("A left effusion. No right effusion.")["Pleural Effusion"] == "present"


@pytest.mark.parametrize(
    ("text", "clear"),
    [
        ("No effusion. No acute disease.", True),
        ("A pacemaker. No acute disease.", True),
        ("Cardiomegaly. No acute disease.", False),
        ("Possible nodule. No acute disease.", False),
    ],
)
def test_no_finding_is_a_label_of_the_whole_report(text: str, clear: bool) -> None:
    assert ("No Finding" in labels(text)) is clear


def test_the_findings_are_those_of_the_rules() -> None:
    assert set(FINDINGS) == {*_MENTIONS, "No Finding"}
    assert len(FINDINGS) == 14
    assert set(FIVE) < set(FINDINGS)
