"""Synthetic trees in the exact published layout of each corpus; every text is made up here.

Each builder fills an empty directory with three to five studies and returns it. `FINDINGS` and
`IMPRESSION` are the texts that a reader must find.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FINDINGS = "Heart size is normal. Lungs are clear."
IMPRESSION = "No acute process."


def grey(path: Path, bits: int = 8) -> None:
    """A small picture, PNG or JPEG by its name; 16-bit where asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 2**bits - 1, 24 * 20).reshape(24, 20)
    Image.fromarray(ramp.astype(np.uint16 if bits == 16 else np.uint8)).save(path)


def corrupt(path: Path) -> None:
    """Cut the file in half."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def table(path: Path, columns: str, rows: Sequence[Sequence[Any]]) -> None:
    """A .csv, packed where the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns.split(), *rows])


def mimic_report(*sections: str) -> str:
    """A report as MIMIC-CXR stores it: every line begins with a space."""
    lines = ["FINAL REPORT", *(line for s in sections for line in (*s.split("\n"), ""))]
    return " " * 33 + "".join(f"{line}\n " for line in lines)


MIMIC_SPLIT = [  # dicom_id, study_id, subject_id, split
    ("d1", 50000001, 10000032, "train"),
    ("d2", 50000001, 10000032, "train"),
    ("d3", 50000002, 10000764, "validate"),
    ("d4", 50000003, 11000011, "test"),
    ("d5", 50000004, 11000012, "test"),
]


def mimic(root: Path, split: Sequence[Sequence[Any]] = MIMIC_SPLIT) -> Path:
    """Study 1 has a lateral and a PA image, 2 an AP, 3 no image file, 4 no stated view.

    With another `split`: images whose name begins with "l" are lateral, all others PA.
    """
    views = dict(
        zip(("d1", "d2", "d3", "d4", "d5"), ("LATERAL", "PA", "AP", "PA", ""), strict=True)
    )
    table(root / "mimic-cxr-2.0.0-split.csv.gz", "dicom_id study_id subject_id split", split)
    columns = (
        "dicom_id subject_id study_id PerformedProcedureStepDescription ViewPosition Rows Columns "
        "StudyDate StudyTime"
    )
    table(
        root / "mimic-cxr-2.0.0-metadata.csv.gz",
        columns,
        [
            (d, p, s, "CHEST", _position(d, views), 24, 20, 21800506, "213014.5")
            for d, s, p, _ in split
        ],
    )
    for dicom, study, subject, _ in split:
        place = root / "files" / f"p{str(subject)[:2]}" / f"p{subject}"
        if dicom != "d4":
            grey(place / f"s{study}" / f"{dicom}.jpg")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"s{study}.txt").write_text(
            mimic_report(
                "EXAMINATION:  CHEST (PA AND LAT)",
                "INDICATION:  ___-year-old woman with a secret history.",
                "FINDINGS: \n \nAn earlier reading that was replaced.",
                "FINDINGS: \n \nHeart size is normal.\nLungs are  clear.",
                f"IMPRESSION: \n \n{IMPRESSION}",
            )
        )
    return root


def _position(dicom: str, views: dict[str, str]) -> str:
    return views.get(dicom, "LATERAL" if dicom.startswith("l") else "PA")


def two_views(root: Path) -> Path:
    """MIMIC-CXR of ten studies, every image another; five have a lateral one, all but one (the
    last of train) an indication."""
    rows = []
    for n, split in enumerate(["train"] * 6 + ["validate"] * 2 + ["test"] * 2):
        views = ("f", "l") if n % 2 == 0 else ("f",)
        rows += [(f"{view}{n}", 50000000 + n, 10000000 + n, split) for view in views]
    mimic(root, rows)
    rng = np.random.default_rng(0)
    for image in sorted(root.rglob("*.jpg")):
        pixels = rng.integers(0, 256, (6, 5)).astype(np.uint8)
        Image.fromarray(pixels).resize((60, 72)).save(image, quality=95)
    for n in range(10):
        file = root / "files" / "p10" / f"p{10000000 + n}" / f"s{50000000 + n}.txt"
        why = "" if n == 5 else f"INDICATION:  cough for {n} days."
        file.write_text(mimic_report(why, f"FINDINGS: \n \n{FINDINGS}"))
    return root


def kaggle(root: Path) -> Path:
    """CXR1 train (R2Gen's split), CXR4 val, CXR2 test without a frontal file; CXR3 in no split."""
    columns = "uid MeSH Problems image indication comparison findings impression"
    rows = [
        (uid, "normal", "normal", "Xray Chest PA and Lateral",
         "secret. XXXX-year-old.", "None.", text, IMPRESSION)
        for uid, text in (
            (1, FINDINGS), (4, f"{FINDINGS} Like XXXX."), (2, FINDINGS), (3, FINDINGS), (5, ""),
        )
    ]  # fmt: skip
    table(root / "indiana_reports.csv", columns, rows)
    files = [
        (uid, f"{uid}_IM-0001-{number}.dcm.png", projection)
        for uid in (1, 4, 2, 3, 5)
        for number, projection in (("3001", "Lateral"), ("4001", "Frontal"))
    ]
    table(root / "indiana_projections.csv", "uid filename projection", files)
    for uid, name, projection in files:
        if (uid, projection) != (2, "Frontal"):
            grey(root / "images" / "images_normalized" / name)
    return root


def r2gen(root: Path, subject: str | None = None) -> Path:
    """IU entries with two images each; with `subject` MIMIC entries of that patient instead."""
    names = {"train": "CXR1_IM-0001", "val": "CXR4_IM-0002", "test": "CXR2_IM-0003"}
    entries = {}
    for split, name in names.items():
        paths = [f"{name}/0.png", f"{name}/1.png"]
        entry = {"id": name, "report": FINDINGS, "image_path": paths, "split": split}
        if subject is not None:
            entry |= {"subject_id": int(subject), "study_id": 5}
        entries[split] = [entry]
        for path in paths:
            grey(root / "images" / path)
    (root / "annotation.json").write_text(json.dumps(entries), encoding="utf-8")
    return root


def openi(root: Path) -> Path:
    """CXR1 train with two images, CXR4 val whose file is missing, CXR2 test without any."""
    reports = root / "ecgen-radiology"
    reports.mkdir(parents=True)
    for number, images in ((1, ("3001", "4001")), (4, ("1001",)), (2, ())):
        ids = [f"CXR{number}_1_IM-0001-{image}" for image in images]
        parents = "".join(
            f'<parentImage id="{i}"><figureId>F1</figureId></parentImage>' for i in ids
        )
        (reports / f"{number}.xml").write_text(
            f'<eCitation><uId id="CXR{number}"/><Abstract>'
            '<AbstractText Label="COMPARISON">None.</AbstractText>'
            '<AbstractText Label="INDICATION">secret. XXXX</AbstractText>'
            f'<AbstractText Label="FINDINGS">{FINDINGS} Chest x-XXXX.</AbstractText>'
            f'<AbstractText Label="IMPRESSION">{IMPRESSION}</AbstractText>'
            f"</Abstract>{parents}</eCitation>"
        )
        for name in ids:
            if number == 1:
                grey(root / "NLMCXR_png" / f"{name}.png")
    return root


def chexpert(root: Path) -> Path:
    """Two train studies of one patient (one without findings), one valid; files are .png."""
    columns = (
        "path_to_image path_to_dcm frontal_lateral ap_pa deid_patient_id report "
        "section_clinical_history section_history section_findings section_impression split"
    )
    rows = []
    for patient, study, view, split, findings in (
        ("patient00001", "study1", "view1_frontal", "train", FINDINGS),
        ("patient00001", "study1", "view2_lateral", "train", FINDINGS),
        ("patient00001", "study2", "view1_frontal", "train", ""),
        ("patient64541", "study1", "view1_frontal", "valid", FINDINGS),
    ):
        path = f"{split}/{patient}/{study}/{view}"
        side = "Frontal" if view.endswith("frontal") else "Lateral"
        position = "PA" if side == "Frontal" else ""
        rows.append(
            (
                f"{path}.jpg",
                f"{path}.dcm",
                side,
                position,
                patient,
                "secret",
                "secret cough" if view == "view2_lateral" or split == "valid" else "",
                "secret",
                findings,
                IMPRESSION,
                split,
            )
        )
        grey(root / "PNG" / f"{path}.png")
    table(root / "df_chexpert_plus_240401.csv", columns, rows)
    return root


def rexgradient(root: Path) -> Path:
    """A study per split; the first has a lateral image, then a frontal one, then an unknown."""
    for split, patient in (("train", "GRDNA"), ("valid", "GRDNB"), ("test", "GRDNC")):
        names = [f"{patient}/acc/studies/1.2/series/1.3/instances/{n}.png" for n in ("a", "b", "c")]
        for name in names:
            grey(root / "deid_png" / name)
        entry = {
            "Indication": "secret", "Comparison": "None", "Findings": FINDINGS,
            "Impression": "None" if split == "test" else IMPRESSION,
            "ImagePath": [f"../deid_png/{name}" for name in names],
            "ImageViewPosition": ["LATERAL", "POSTERO_ANTERIOR", None],
        }  # fmt: skip
        file = root / "metadata" / f"{split}_metadata_view_position.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({f"{patient}_acc_1.2": entry}), encoding="utf-8")
    return root


def padchest(root: Path) -> Path:
    """A study per split, two rows of the table each; one study that the table lacks."""
    studies, rows = [], []
    for number, split in enumerate(("train", "validation", "test", None)):
        image = f"216840_{number}.png"
        sentences = ("Heart size is normal.", "Lungs are clear")
        findings = [{"sentence_en": s, "sentence_es": "x", "abnormal": False} for s in sentences]
        studies.append({"StudyID": f"st{number}", "ImageID": image, "findings": findings})
        rows += [(f"st{number}", image, f"pat{number}", label, split) for label in "ab" if split]
        grey(root / "Padchest_GR_files" / "PadChest_GR" / image, bits=16)
    (root / "grounded_reports_20240819.json").write_text(json.dumps(studies), encoding="utf-8")
    table(root / "master_table.csv", "StudyID ImageID PatientID label split", rows)
    return root


def pairs(root: Path) -> Path:
    """One image-text pair a split."""
    rows = []
    for split in ("train", "val", "test"):
        grey(root / "images" / f"{split}.png")
        row = {"image": f"{split}.png", "report": FINDINGS, "view": "PA"}
        rows.append({**row, "patient": f"pat-{split}", "split": split})
    (root / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return root


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "pairs-jsonl": pairs,
    "openi-xml": openi,
    "iu-kaggle": kaggle,
    "r2gen": r2gen,
    "mimic-cxr": mimic,
    "chexpert-plus": chexpert,
    "rexgradient": rexgradient,
    "padchest-gr": padchest,
}
