"""Facts of a report: finding, present or absent, side."""

from __future__ import annotations

import pytest

from rx_edge.metrics.labels import Fact, facts, flips


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("There is a left pleural effusion.", {("Pleural Effusion", "present", "left")}),
        ("No pleural effusion.", {("Pleural Effusion", "absent", "")}),
        (
            "No focal consolidation, pleural effusion or pneumothorax.",
            {
                ("Consolidation", "absent", ""),
                ("Pleural Effusion", "absent", ""),
                ("Pneumothorax", "absent", ""),
            },
        ),
        (
            "No effusion but a large right pneumothorax.",
            {("Pleural Effusion", "absent", ""), ("Pneumothorax", "present", "right")},
        ),
        ("Possible right basilar atelectasis.", {("Atelectasis", "uncertain", "right")}),
        ("Pneumonia cannot be excluded.", {("Pneumonia", "uncertain", "")}),
        ("Bilateral ground-glass opacities.", {("Lung Opacity", "present", "both")}),
        (
            "Opacity on the left, which may represent pneumonia.",
            {("Lung Opacity", "present", "left"), ("Pneumonia", "uncertain", "left")},
        ),
        ("A possible nodule.", {("Lung Lesion", "uncertain", "")}),
        ("A nodule cannot be excluded.", {("Lung Lesion", "uncertain", "")}),
        ("Calcified granuloma after granulomatous infection.", set()),
        (
            "No significant change in the right effusion.",
            {("Pleural Effusion", "present", "right")},
        ),
        ("The heart is mildly enlarged.", {("Cardiomegaly", "present", "")}),
        ("The heart is not enlarged.", {("Cardiomegaly", "absent", "")}),
        ("Borderline heart size.", {("Cardiomegaly", "uncertain", "")}),
        (
            "Heart size and pulmonary vascularity appear within normal limits.",
            {("Cardiomegaly", "absent", "")},
        ),
        ("Normal cardiomediastinal contours.", {("Enlarged Cardiomediastinum", "absent", "")}),
        ("The heart is enlarged, the spine is normal.", {("Cardiomegaly", "present", "")}),
        ("Negative for acute abnormality.", {("No Finding", "present", "")}),
        ("No acute bony abnormality.", set()),
        ("Heart size is normal.", {("Cardiomegaly", "absent", "")}),
        ("The lungs are clear.", {("Lung Opacity", "absent", ""), ("No Finding", "present", "")}),
        ("An endotracheal tube ends above the carina.", {("Support Devices", "present", "")}),
        ("Rib fracture on the left.", {("Fracture", "present", "left")}),
        ("The pneumothorax has resolved.", {("Pneumothorax", "absent", "")}),
        ("Frontal chest radiograph.", set()),
        ("", set()),
    ],
)
def test_facts(text: str, wanted: set[tuple[str, str, str]]) -> None:
    assert {(f.finding, f.status, f.side) for f in facts(text)} == wanted


@pytest.mark.parametrize(
    ("wanted", "found", "counts"),
    [
        ("No pleural effusion.", "No pleural effusion.", (0, 0, 0)),
        ("No pleural effusion.", "Pleural effusion.", (1, 0, 0)),
        ("Left pleural effusion.", "Right pleural effusion.", (0, 1, 0)),
        ("Left pleural effusion.", "Left effusion. Right effusion.", (0, 1, 0)),
        ("No pleural effusion.", "No pneumothorax.", (0, 0, 2)),
        ("No pleural effusion.", "", (0, 0, 1)),
        ("A small nodule.", "A small nodule. Cardiomegaly.", (0, 0, 1)),
        ("No effusion. No pneumothorax.", "No pneumothorax, no effusion.", (0, 0, 0)),
    ],
)
def test_flips(wanted: str, found: str, counts: tuple[int, int, int]) -> None:
    difference = flips(wanted, found)
    assert (difference.negation, difference.side, difference.finding) == counts
    assert difference.total == sum(counts)


def test_facts_do_not_depend_on_case() -> None:
    assert facts("NO PLEURAL EFFUSION.") == {Fact("Pleural Effusion", "absent", "")}
