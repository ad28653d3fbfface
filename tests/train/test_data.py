"""Corpora: what is kept, what is dropped and counted, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rx_edge.config import CorpusConfig
from rx_edge.errors import ConfigError
from rx_edge.model.catalogue import fetched_dir
from rx_edge.train.data import Corpus, read
from rx_edge.train.data.sentences import imaging_sentences, split_sentences
from tests.shared_data import shared

ROW = {"image": "a.png", "report": "The lungs are clear.", "view": "PA", "patient": "1"}


def pairs(root: Path, *rows: dict[str, Any], absent: str = "absent.png") -> Corpus:
    (root / "images").mkdir(exist_ok=True)
    for row in rows:
        if isinstance(row.get("image"), str) and row["image"] != absent:
            (root / "images" / row["image"]).touch()
    (root / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return read("p", CorpusConfig(path=str(root)))


def row(**changes: Any) -> dict[str, Any]:
    return ROW | {"split": "train"} | changes


def openi(root: Path, *studies: tuple[str, str], split_file: str = "") -> Corpus:
    root.mkdir(exist_ok=True)
    for number, (uid, findings) in enumerate(studies):
        (root / f"{number}.xml").write_text(
            f'<eCitation><uId id="{uid}"/><Abstract><AbstractText Label="FINDINGS">{findings}'
            '</AbstractText><AbstractText Label="IMPRESSION">Never read.</AbstractText>'
            "</Abstract></eCitation>"
        )
    return read("o", CorpusConfig(reader="openi-xml", path=str(root), split_file=split_file))


@pytest.fixture
def splits(tmp_path: Path) -> str:
    path = tmp_path / "splits.json"
    table = {"train": ["CXR1_IM-0001-1001", "CXR2 x"], "val": ["CXR3"], "test": []}
    path.write_text(json.dumps(table))
    return str(path)


def test_pairs(tmp_path: Path) -> None:
    corpus = pairs(
        tmp_path,
        row(image="b.png", report="He has fever. Small left effusion.", view="L", patient=2),
        row(),
        row(image="c.png", report="He has fever.", view="AP Supine", patient="3", split="val"),
        row(image="d.png", report="Clear lungs", view=None, patient="4", split="test"),
        row(image="e.png", report="He has fever.", view=None),
        row(image="absent.png"),
    )
    found = {s.id: (s.view, s.target, s.complete, s.split, s.patient) for s in corpus.samples}
    frontal = "Frontal chest radiograph."
    assert found == {
        "a.png": ("frontal", f"{frontal} The lungs are clear.", True, "train", "1"),
        "b.png": (
            "lateral", "Lateral chest radiograph. Small left effusion.", True, "train", "2",
        ),
        "c.png": ("frontal", frontal, False, "val", "3"),
        "d.png": (None, "Clear lungs.", True, "test", "4"),
    }  # fmt: skip
    assert corpus.dropped == {
        "image file missing": 1,
        "neither view nor imaging sentence": 1,
        "no imaging sentence: view only, end not learned": 1,
    }
    assert [s.id for s in corpus.split("train")] == ["a.png", "b.png"]


def test_pairs_with_a_lateral_image_and_an_indication(tmp_path: Path) -> None:
    first = row(lateral="a-l.png", indication=" cough,\n fever ")
    rows = [first, row(image="b.png", lateral="b-l.png", patient="2", indication=None)]
    corpus = pairs(tmp_path, *rows)
    assert [(s.lateral, s.indication) for s in corpus.samples] == [
        (None, "cough, fever"), (None, ""),
    ]  # fmt: skip
    (tmp_path / "images" / "a-l.png").touch()
    config = CorpusConfig(path=str(tmp_path), views="frontal+lateral")
    both = read("p", config)
    assert [[p.name for p in s.images] for s in both.samples] == [["a.png", "a-l.png"], ["b.png"]]
    assert both.dropped == {"lateral image file missing, frontal image kept": 1}
    pairs(tmp_path, first | {"view": "L"})
    with pytest.raises(ConfigError, match=r"pairs\.jsonl:1: view L and a lateral image"):
        read("p", config)


@pytest.mark.parametrize(
    "bad",
    [
        ROW, row(split="dev"), row(report=None), row(image=None), [], "text", None,
        row(indication=7),
    ],
)  # fmt: skip
def test_bad_pair_names_its_line(tmp_path: Path, bad: Any) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    lines = [json.dumps(row()), json.dumps(bad)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"pairs\.jsonl:2: "):
        read("p", CorpusConfig(path=str(tmp_path)))
    (tmp_path / "pairs.jsonl").write_text(lines[0] + '\n{"image": ')
    with pytest.raises(ConfigError, match=r"pairs\.jsonl:2: not an image-text pair"):
        read("p", CorpusConfig(path=str(tmp_path)))


def test_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"both 'train' and 'test' \(study 'b.png'\)"):
        pairs(tmp_path, row(), row(image="b.png", split="test"))


def test_unusable_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RX_TEST_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"data.p.path is '\$RX_TEST_DATA/x': set that"):
        read("p", CorpusConfig(path="$RX_TEST_DATA/x"))
    with pytest.raises(ConfigError, match="does not exist"):
        read("p", CorpusConfig(path=str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match=r"pairs\.jsonl' is missing"):
        read("p", CorpusConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"no usable study: .*image file missing': 1"):
        pairs(tmp_path, row(image="absent.png"))
    monkeypatch.setenv("RX_TEST_DATA", str(tmp_path))
    pairs(tmp_path, row())
    assert len(read("p", CorpusConfig(path="$RX_TEST_DATA")).samples) == 1


def test_openi(tmp_path: Path, splits: str) -> None:
    corpus = openi(
        tmp_path / "xml",
        ("CXR1", "Heart size normal. Compared to XXXX, stable."),
        ("CXR2", "XXXX."),
        ("CXR3", "Lungs clear"),
        ("CXR4", "Lungs clear."),
        split_file=splits,
    )
    found = [(s.id, s.split, s.target, s.image, s.complete) for s in corpus.samples]
    assert found == [
        ("CXR1", "train", "Heart size normal.", None, True),
        ("CXR3", "val", "Lungs clear.", None, True),
    ]
    assert corpus.dropped == {"not in the split file": 1, "no findings without redactions": 1}


def test_openi_errors(tmp_path: Path, splits: str) -> None:
    root = tmp_path / "xml"
    with pytest.raises(ConfigError, match="no usable study: {}"):
        openi(root, split_file=splits)
    with pytest.raises(ConfigError, match=r"0\.xml is not well-formed XML"):
        openi(root, ("CXR1", "a < b"), split_file=splits)
    for content in ("{", "[]", '{"train": []}'):
        Path(splits).write_text(content)
        with pytest.raises(ConfigError, match=r"splits\.json' is not a JSON of ids per train/val"):
            openi(root, ("CXR1", "Clear."), split_file=splits)


def test_sentences_are_split_and_finished() -> None:
    text = "Heart  size\nnormal..  Lungs 2.5 cm. no split here! Clear"
    assert split_sentences(text) == ["Heart size normal.", "Lungs 2.5 cm. no split here!", "Clear."]
    assert split_sentences("  ") == []


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("There is a left pleural effusion.", ["There is a left pleural effusion."]),
        ("Findings: heart is enlarged.", ["Heart is enlarged."]),
        (
            "Chest X-ray on admission showed that bilateral opacities are present.",
            ["Bilateral opacities are present."],
        ),
        ("CT showed a nodule in the left lung.", []),
        ("A 65-year-old man with opacities.", []),
        ("Opacities have improved since the prior study.", []),
        ("The weather was fine.", []),
        ("Cardiomegaly.", []),  # one word says nothing about where
        ("Lungs " + "very " * 40 + "clear.", []),
        ("He had fever. The lungs are clear.", ["The lungs are clear."]),
    ],
)
def test_only_what_the_image_shows_is_kept(text: str, kept: list[str]) -> None:
    assert imaging_sentences(text) == kept


def test_real_openi_reports() -> None:
    path = fetched_dir("iu-reports")
    if not path.is_dir():
        pytest.skip("iu-reports is absent: rx-edge models fetch iu-reports")
    corpus = read("iu", CorpusConfig(reader="openi-xml", path=str(path)))
    assert len(corpus.samples) + sum(corpus.dropped.values()) == 3955
    assert Counter(s.split for s in corpus.samples).keys() == {"train", "val", "test"}
    assert len(corpus.split("train")) > 1500
    assert not any("XXXX" in s.target for s in corpus.samples)
    assert all(s.target and s.target[-1] in ".!?" for s in corpus.samples)


def test_real_pairs() -> None:
    path = shared("data/cxr_pairs")
    corpus = read("pairs", CorpusConfig(path=str(path)))
    assert {s.view for s in corpus.samples} >= {"frontal", "lateral"}
    assert all(corpus.split(name) for name in ("train", "val", "test"))
    assert not any("year-old" in s.target or "CT" in s.target.split() for s in corpus.samples)
    rows = (path / "pairs.jsonl").read_text("utf-8").splitlines()
    gone = ("image file missing", "neither view nor imaging sentence")
    assert len(rows) == len(corpus.samples) + sum(corpus.dropped.get(g, 0) for g in gone)
