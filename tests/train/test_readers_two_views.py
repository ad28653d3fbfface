"""What readers know of lateral images and indications; no view is guessed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rx_edge.errors import ConfigError, InputError
from rx_edge.radiograph import open_radiograph
from rx_edge.train.data.images import open_images
from rx_edge.train.data.mimic_sections import indication
from rx_edge.train.run import _fill_features
from tests.train import corpora
from tests.train.corpora import BUILDERS, mimic_report
from tests.train.test_readers import corpus


def test_indications(tmp_path: Path) -> None:
    said = {
        "mimic-cxr": {"-year-old woman with a secret history."},
        "openi-xml": {"secret."},  # the sentence with XXXX is gone, as in a target
        "iu-kaggle": {"secret."},
        "chexpert-plus": {"secret", "secret cough"},
        "rexgradient": {"secret"},
    }
    for reader, build in BUILDERS.items():
        found = {s.indication for s in corpus(reader, build(tmp_path / reader)).samples}
        assert found == said.get(reader, {""}), reader


def both(reader: str, root: Path, **changes: Any) -> dict[str, tuple[str, str | None]]:
    """id -> names of the frontal and of the lateral image."""
    result = corpus(reader, root, views="frontal+lateral", **changes)
    frontal = corpus(reader, root, **changes)
    alike = [replace(s, lateral=None) for s in result.samples]
    assert alike == list(frontal.samples)  # the same studies, read another way
    assert all(s.image for s in result.samples)
    return {
        s.id: (s.image.name if s.image else "", s.lateral.name if s.lateral else None)
        for s in result.samples
    }


def test_two_views(tmp_path: Path) -> None:
    root = corpora.mimic(tmp_path / "m")
    expected = {"s50000001": ("d2.jpg", "d1.jpg"), "s50000002": ("d3.jpg", None)}
    assert both("mimic-cxr", root) == expected
    assert both("iu-kaggle", corpora.kaggle(tmp_path / "k")) == {
        f"CXR{n}": (f"{n}_IM-0001-4001.dcm.png", f"{n}_IM-0001-3001.dcm.png") for n in (1, 4)
    }
    assert both("chexpert-plus", corpora.chexpert(tmp_path / "c")) == {
        "patient00001/study1": ("view1_frontal.png", "view2_lateral.png"),
        "patient64541/study1": ("view1_frontal.png", None),
    }
    found = both("rexgradient", corpora.rexgradient(tmp_path / "x"))
    assert set(found.values()) == {("b.png", "a.png")}
    (lateral,) = root.rglob("d1.jpg")
    lateral.unlink()
    assert both("mimic-cxr", root) == {name: (f, None) for name, (f, _) in expected.items()}
    kept = corpus("mimic-cxr", root, views="frontal+lateral").dropped
    assert kept["lateral image file missing, frontal image kept"] == 1
    assert kept["image file missing"] == 1


@pytest.mark.parametrize("reader", ["r2gen", "openi-xml", "padchest-gr"])
def test_a_view_is_never_guessed(reader: str, tmp_path: Path) -> None:
    root = BUILDERS[reader](tmp_path / "c")
    changes = {"images": str(root / "NLMCXR_png")} if reader == "openi-xml" else {}
    assert corpus(reader, root, **changes).samples
    with pytest.raises(ConfigError, match=f"'{reader}': its corpus does not say which .*'frontal"):
        corpus(reader, root, views="frontal+lateral", **changes)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (("INDICATION:  ___F with\ncough // eval ___", "FINDINGS:  One."), "F with cough // eval"),
        (("REASON FOR EXAMINATION: \n \nCough.", "FINDINGS:  One."), "Cough."),
        (("CLINICAL HISTORY:  Fall.", "FINDINGS:  One."), "Fall."),
        (("HISTORY:  Fall.", "INDICATION:  Cough.", "FINDINGS:  One."), "Cough."),
        # findings without a heading are what the model must see for itself
        (("INDICATION:  Cough.\n \nLungs are clear.", "IMPRESSION:  Two."), "Cough."),
        (("FINDINGS:  One.",), ""),
    ],
)
def test_mimic_indication(sections: tuple[str, ...], expected: str) -> None:
    found = indication("s1", mimic_report(*sections))
    assert " ".join(found.split()) == expected


class Opener:
    """In place of features: reads the images."""

    def fill(self, paths: list[Path]) -> None:
        for path in paths:
            open_radiograph(path)


def test_a_corrupt_lateral_image_is_named_and_skipped_only_when_asked(tmp_path: Path) -> None:
    root = corpora.two_views(tmp_path / "patient-folder")
    before = corpus("mimic-cxr", root, views="frontal+lateral")
    bad = before.samples[0]
    assert bad.lateral is not None
    corpora.corrupt(bad.lateral)
    with pytest.raises(InputError, match=f"'{bad.id}': its lateral image is unreadable") as error:
        list(open_images(bad))
    assert "patient-folder" not in str(error.value)
    with pytest.raises(InputError, match="its lateral image is unreadable"):
        _fill_features(Opener(), [before], lambda *_: None)  # type: ignore[arg-type]
    kept = corpus("mimic-cxr", root, views="frontal+lateral", skip_bad=True)
    assert {s.id for s in before.samples} - {s.id for s in kept.samples} == {bad.id}
    assert len(corpus("mimic-cxr", root, skip_bad=True).samples) == len(before.samples)
