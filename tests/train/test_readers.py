"""Readers of published corpora, each on a synthetic tree of the exact published layout."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rx_edge.config import CorpusConfig
from rx_edge.errors import ConfigError, InputError
from rx_edge.model.catalogue import fetched_dir
from rx_edge.radiograph import open_radiograph
from rx_edge.train.data import READERS, Corpus, guess, read
from rx_edge.train.data.images import open_images
from rx_edge.train.data.mimic_sections import findings_and_impression, indication
from tests.train import corpora
from tests.train.corpora import BUILDERS, FINDINGS, IMPRESSION, mimic_report


def config(reader: str, root: Path, **changes: Any) -> CorpusConfig:
    return CorpusConfig(reader=reader, path=str(root), **changes)  # type: ignore[arg-type]


def corpus(reader: str, root: Path, **changes: Any) -> Corpus:
    return read("c", config(reader, root, **changes))


def found(result: Corpus) -> dict[str, tuple[str, str | None, str | None, str]]:
    """id -> split, view, file name, patient."""
    return {s.id: (s.split, s.view, s.image and s.image.name, s.patient) for s in result.samples}


def test_every_reader_is_here_and_knows_its_layout(tmp_path: Path) -> None:
    assert set(BUILDERS) == set(READERS)
    for reader, build in BUILDERS.items():
        root = build(tmp_path / reader)
        assert guess(root) == reader
        result = corpus(reader, root)
        assert result.split("train")
        for sample in result.samples:
            assert FINDINGS in sample.target
            assert "secret" not in sample.target
            if sample.image is not None:
                open_radiograph(sample.image)


def test_unknown_and_ambiguous_layouts_name_the_readers(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ConfigError, match=r"has no layout that is known; name a reader: .*mimic-cxr"
    ):
        guess(tmp_path / "empty")
    both = corpora.r2gen(corpora.pairs(tmp_path / "both"))
    with pytest.raises(ConfigError, match="looks like pairs-jsonl and r2gen; name a reader"):
        guess(both)


def test_mimic(tmp_path: Path) -> None:
    root = corpora.mimic(tmp_path / "m")
    result = corpus("mimic-cxr", root)
    assert found(result) == {
        "s50000001": ("train", "frontal", "d2.jpg", "10000032"),
        "s50000002": ("val", "frontal", "d3.jpg", "10000764"),
    }
    assert result.dropped == {"image file missing": 1, "no image stated to be frontal": 1}
    assert result.sections == {"studies": 4, "findings": 4, "impression": 4, "both": 4}
    everything = corpus("mimic-cxr", root, views="all")
    assert found(everything) == {
        "s50000001/d1": ("train", "lateral", "d1.jpg", "10000032"),
        "s50000001/d2": ("train", "frontal", "d2.jpg", "10000032"),
        "s50000002": ("val", "frontal", "d3.jpg", "10000764"),
        "s50000004": ("test", None, "d5.jpg", "11000012"),
    }
    assert {s.study for s in everything.samples} == {"s50000001", "s50000002", "s50000004"}
    for section, text in (("impression", IMPRESSION), ("both", f"{FINDINGS} {IMPRESSION}")):
        targets = {s.target for s in corpus("mimic-cxr", root, section=section).samples}
        assert targets == {text}


def test_mimic_in_two_places(tmp_path: Path) -> None:
    """Reports from MIMIC-CXR, tables and images from MIMIC-CXR-JPG."""
    whole, apart = corpora.mimic(tmp_path / "jpg"), tmp_path / "reports"
    for report in sorted(whole.rglob("*.txt")):
        target = apart / report.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        report.rename(target)
    for images in (whole, whole / "files"):
        assert len(corpus("mimic-cxr", apart, images=str(images)).samples) == 2
    with pytest.raises(ConfigError, match=r"no usable study: .*'report missing': 4"):
        corpus("mimic-cxr", whole)
    with pytest.raises(ConfigError, match=r"mimic-cxr-2\.0\.0-metadata\.csv\.gz is missing"):
        corpus("mimic-cxr", apart)
    with pytest.raises(ConfigError, match="is not a directory"):
        corpus("mimic-cxr", apart, images=str(tmp_path / "absent"))


def test_mimic_sectioned_table_is_preferred(tmp_path: Path) -> None:
    root = corpora.mimic(tmp_path / "m")
    corpora.table(
        root / "mimic_cxr_sectioned.csv",
        "study impression findings last_paragraph comparison",
        [
            ("s50000001", IMPRESSION, "From the table.", "", ""),
            ("s50000002", IMPRESSION, "", "", ""),
        ],
    )
    result = corpus("mimic-cxr", root)
    assert [s.target for s in result.samples] == ["From the table."]
    assert result.dropped["no findings"] == 1
    assert "secret history" in result.samples[0].indication  # which the table does not have
    for report in root.rglob("s50000001.txt"):
        report.unlink()
    (alone,) = corpus("mimic-cxr", root).samples
    assert (alone.target, alone.indication) == ("From the table.", "")


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (("FINDINGS:  One.", "FINDINGS:  Two."), ("Two.", "")),
        (("FINDINGS:  One.", "FINDINGS: \n "), ("One.", "")),  # an empty one does not win
        (("CHEST, TWO VIEWS:  One.", "CONCLUSION:  Two."), ("One.", "Two.")),
        (("FINDINGS AND IMPRESSION:  One.",), ("", "One.")),
        (("PORTABLE AP CHEST:  One.", "IMPRESSON:  Two."), ("One.", "Two.")),
        (("INDICATION:  x", "TECHNIQUE:  y"), ("", "")),
        (("FINDINGS:  One: small.\nno heading: x",), ("One: small.\n no heading: x", "")),
    ],
)  # fmt: skip
def test_mimic_sections(sections: tuple[str, ...], expected: tuple[str, str]) -> None:
    assert findings_and_impression("s1", mimic_report(*sections)) == expected


def test_mimic_exceptions() -> None:
    report = mimic_report("INDICATION:  Lungs are clear.", "IMPRESSION:  Two.")
    assert findings_and_impression("s50058765", report) == ("Lungs are clear.", "")
    alone = mimic_report("INDICATION:  Lungs are clear.\n\nDictated by someone.")
    assert findings_and_impression("s50058765", alone) == ("Lungs are clear.", "")
    assert findings_and_impression("s50196495", "x" * 59 + "y" * 340 + "z") == ("y" * 340, "")
    assert findings_and_impression("s58235663", report) == ("", "")
    assert findings_and_impression("s1", "no heading at all") == ("", "")
    for study in ("s50058765", "s50196495", "s58235663"):
        assert indication(study, report) == ""  # where the findings may stand
    assert indication("s1", report) == "Lungs are clear."


def test_kaggle(tmp_path: Path) -> None:
    root = corpora.kaggle(tmp_path / "k")
    result = corpus("iu-kaggle", root)
    assert found(result) == {
        "CXR1": ("train", "frontal", "1_IM-0001-4001.dcm.png", "CXR1"),
        "CXR4": ("val", "frontal", "4_IM-0001-4001.dcm.png", "CXR4"),
    }
    assert {s.target for s in result.samples} == {FINDINGS}  # the sentence with XXXX is gone
    assert result.dropped == {
        "image file missing": 1, "not in the split file": 1, "no findings without redactions": 1,
    }  # fmt: skip
    everything = found(corpus("iu-kaggle", root, views="all"))
    assert everything["CXR2/2_IM-0001-3001.dcm"][:2] == ("test", "lateral")


def test_r2gen(tmp_path: Path) -> None:
    root = corpora.r2gen(tmp_path / "r")
    for path in (root, root / "annotation.json"):
        assert found(corpus("r2gen", path)) == {
            "CXR1_IM-0001": ("train", None, "0.png", "CXR1"),
            "CXR4_IM-0002": ("val", None, "0.png", "CXR4"),
            "CXR2_IM-0003": ("test", None, "0.png", "CXR2"),
        }
    assert len(corpus("r2gen", root, views="all").samples) == 6
    with pytest.raises(ConfigError, match=r"no usable study: \{'no impression': 3\}"):
        corpus("r2gen", root, section="impression")


def test_openi_with_images(tmp_path: Path) -> None:
    root = corpora.openi(tmp_path / "o")
    assert {s.image for s in corpus("openi-xml", root).samples} == {None}
    result = corpus("openi-xml", root, images=str(root / "NLMCXR_png"))
    assert found(result) == {"CXR1": ("train", None, "CXR1_1_IM-0001-3001.png", "CXR1")}
    assert result.dropped == {"image file missing": 1, "no image": 1}
    both = corpus("openi-xml", root, section="both").samples
    assert {s.target for s in both} == {f"{FINDINGS} {IMPRESSION}"}


def test_chexpert(tmp_path: Path) -> None:
    root = corpora.chexpert(tmp_path / "c")
    result = corpus("chexpert-plus", root)
    assert found(result) == {
        "patient00001/study1": ("train", "frontal", "view1_frontal.png", "patient00001"),
        "patient64541/study1": ("val", "frontal", "view1_frontal.png", "patient64541"),
    }
    assert result.dropped == {"no findings": 1}
    assert len(corpus("chexpert-plus", root, section="impression").samples) == 3
    assert len(corpus("chexpert-plus", root, views="all").samples) == 3


def test_rexgradient(tmp_path: Path) -> None:
    root = corpora.rexgradient(tmp_path / "x")
    assert found(corpus("rexgradient", root)) == {
        f"{patient}_acc_1.2": (split, "frontal", "b.png", patient)
        for split, patient in (("train", "GRDNA"), ("val", "GRDNB"), ("test", "GRDNC"))
    }
    result = corpus("rexgradient", root, section="both")
    assert result.dropped == {"no impression": 1}  # "None" in the file
    views = [s.view for s in corpus("rexgradient", root, views="all").split("train")]
    assert views == ["lateral", "frontal", None]


def test_padchest(tmp_path: Path) -> None:
    root = corpora.padchest(tmp_path / "p")
    result = corpus("padchest-gr", root)
    assert found(result) == {
        f"st{n}": (split, None, f"216840_{n}.png", f"pat{n}")
        for n, split in enumerate(("train", "val", "test"))
    }
    assert result.dropped == {"not in the split file": 1}
    (image,) = open_images(result.samples[0])
    assert image.pixels.max() == 1.0  # 16 bits


def test_damaged_tables_are_refused_by_name(tmp_path: Path) -> None:
    root = corpora.mimic(tmp_path / "m")
    split = root / "mimic-cxr-2.0.0-split.csv.gz"
    content = split.read_bytes()
    split.write_bytes(content[:-12])
    with pytest.raises(ConfigError, match="cannot be read as a table"):
        corpus("mimic-cxr", root)
    corpora.table(split, "dicom_id study_id split", [])
    with pytest.raises(ConfigError, match="has no column subject_id"):
        corpus("mimic-cxr", root)
    for reader, name in (
        ("r2gen", "annotation.json"),
        ("rexgradient", "metadata/train_metadata_view_position.json"),
        ("padchest-gr", "grounded_reports_20240819.json"),
    ):
        root = BUILDERS[reader](tmp_path / reader)
        file = root / name
        damaged: Mapping[str, str] = {
            "{": "cannot be read as JSON",
            "1": "is not the published file",
            '{"train": [{}], "a": {}}': "no usable|is not the published file",
            "[{}]": "no usable|is not the published file",
        }
        for text, says in damaged.items():
            file.write_text(text)
            with pytest.raises(ConfigError, match=says):
                corpus(reader, root)


def test_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    crossing = [("d1", 1, 10000032, "train"), ("d2", 2, 10000032, "test")]
    root = corpora.mimic(tmp_path / "m", crossing)
    with pytest.raises(ConfigError, match=r"both 'train' and 'test' \(study 's2'\)") as error:
        corpus("mimic-cxr", root, views="all")
    assert "10000032" not in str(error.value)
    with pytest.raises(ConfigError, match="one patient is in both 'train' and 'val'"):
        corpus("r2gen", corpora.r2gen(tmp_path / "r", subject="10000032"))
    root = corpora.chexpert(tmp_path / "c")
    file = root / "df_chexpert_plus_240401.csv"
    with file.open(newline="") as lines:
        rows = [*csv.reader(lines)]
    rows[3][-1], rows[3][-3] = "valid", FINDINGS  # study2 of the patient in train
    corpora.table(file, " ".join(rows[0]), rows[1:])
    with pytest.raises(ConfigError, match="one patient is in both 'train' and 'val'"):
        corpus("chexpert-plus", root)
    root = corpora.rexgradient(tmp_path / "x")
    file = root / "metadata" / "valid_metadata_view_position.json"
    entry = json.loads(file.read_text())
    entry["GRDNB_acc_1.2"]["ImagePath"] = [
        "../deid_png/GRDNA/acc/studies/1.2/series/1.3/instances/b.png"
    ]
    entry["GRDNB_acc_1.2"]["ImageViewPosition"] = ["PA"]
    file.write_text(json.dumps(entry))
    with pytest.raises(ConfigError, match="one patient is in both 'train' and 'val'"):
        corpus("rexgradient", root)


@pytest.mark.parametrize("reader", sorted(set(READERS) - {"openi-xml"}))
def test_corrupt_image_is_named_and_skipped_only_when_asked(reader: str, tmp_path: Path) -> None:
    root = BUILDERS[reader](tmp_path / "patient-folder")
    before = corpus(reader, root)
    bad = before.split("train")[0]
    assert bad.image is not None
    corpora.corrupt(bad.image)
    again = corpus(reader, root)
    assert len(again.samples) == len(before.samples)
    with pytest.raises(InputError, match="its image is unreadable: .*set skip_bad = true") as error:
        list(open_images(again.split("train")[0]))
    assert repr(bad.id) in str(error.value)
    assert "patient-folder" not in str(error.value)  # no path: it may hold a patient's id
    kept = corpus(reader, root, skip_bad=True)
    assert {s.id for s in before.samples} - {s.id for s in kept.samples} == {bad.id}
    assert kept.dropped == {**before.dropped, "image unreadable": 1}


def test_training_names_the_study_of_a_corrupt_image(tmp_path: Path) -> None:
    from rx_edge.train.run import _fill_features

    class Features:
        def fill(self, paths: list[Path]) -> None:
            for path in paths:
                open_radiograph(path)

    root = corpora.mimic(tmp_path / "m")
    result = corpus("mimic-cxr", root)
    image = result.samples[1].image
    assert image is not None
    corpora.corrupt(image)
    with pytest.raises(InputError, match="study 's50000002': its image is unreadable"):
        _fill_features(Features(), [result], lambda *_: None)  # type: ignore[arg-type]


def test_real_openi_counts() -> None:
    path = fetched_dir("iu-reports")
    if not path.is_dir():
        pytest.skip("iu-reports is absent: rx-edge models fetch iu-reports")
    assert guess(path) == "openi-xml"
    result = corpus("openi-xml", path)
    assert result.sections == {"studies": 3955, "findings": 3425, "impression": 3921, "both": 3419}
    assert {split: len(result.split(split)) for split in ("train", "val", "test")} == {
        "train": 2066, "val": 295, "test": 588,
    }  # fmt: skip
    assert result.dropped == {"not in the split file": 1000, "no findings without redactions": 6}
    impressions = corpus("openi-xml", path, section="impression")
    assert len(impressions.samples) + sum(impressions.dropped.values()) == 3955
