"""`rx-edge data check` and `preview`: figures, exit codes, and what must not be printed."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from rx_edge.cli import app
from rx_edge.config import CorpusConfig, ImageRecipe
from rx_edge.image import prepare
from rx_edge.radiograph import open_radiograph
from rx_edge.train.data import read
from rx_edge.train.data.checking import check
from rx_edge.train.data.preview import NOTICE, displayed
from tests.train import corpora
from tests.train.corpora import BUILDERS, FINDINGS, IMPRESSION


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, args)])


def as_json(*args: str | Path) -> tuple[int, Any]:
    result = run("check", *args, "--json")
    return result.exit_code, json.loads(result.stdout)


@pytest.mark.parametrize("reader", sorted(BUILDERS))
def test_check_finds_the_reader_and_prints_no_text(reader: str, tmp_path: Path) -> None:
    root = BUILDERS[reader](tmp_path / "c")
    for extra in ([], ["--json"], ["--images"]):
        result = run("check", root, *extra)
        assert result.exit_code == 0, result.output
        assert reader in result.stdout
        for hidden in ("Heart", "Lungs", "secret", "acute", "10000032", "pat-train", "GRDN"):
            assert hidden not in result.output


def told(indications: int, laterals: int = 0) -> dict[str, int]:
    return {"with_lateral": laterals, "with_indication": indications}


def test_check_counts_lateral_images_and_indications(tmp_path: Path) -> None:
    root = corpora.two_views(tmp_path / "m")
    _, document = as_json(root, "--views", "frontal+lateral", "--images")
    figures = document["corpora"]["mimic-cxr"]
    found = {name: dict(list(counts.items())[-2:]) for name, counts in figures["splits"].items()}
    assert found == {"train": told(5, 3), "val": told(2, 1), "test": told(2, 1)}
    assert figures["images_opened"] == 15
    result = run("check", root, "--views", "frontal+lateral")
    (row,) = (line for line in result.stdout.splitlines() if "train" in line and "6" in line)
    assert row.split("│")[1:-1] == [" train ", *(f"{n} ".rjust(len(c)) for n, c in zip(
        (6, 6, 6, 6, 3, 5), row.split("│")[2:-1], strict=True))]  # fmt: skip
    assert "cough" not in result.output
    for lateral in root.rglob("l0.jpg"):
        lateral.unlink()
    _, document = as_json(root, "--views", "frontal+lateral")
    assert document["corpora"]["mimic-cxr"]["missing_images"] == 1


def test_check_counts(tmp_path: Path) -> None:
    root = corpora.mimic(tmp_path / "m")
    code, document = as_json(root, "--views", "all")
    assert (code, document["ok"]) == (0, True)
    figures = document["corpora"]["mimic-cxr"]
    assert figures["splits"] == {
        "train": {"samples": 2, "studies": 1, "patients": 1, "with_image": 2, **told(2)},
        "val": {"samples": 1, "studies": 1, "patients": 1, "with_image": 1, **told(1)},
        "test": {"samples": 1, "studies": 1, "patients": 1, "with_image": 1, **told(1)},
    }
    assert figures["sections"] == {"studies": 4, "findings": 4, "impression": 4, "both": 4}
    assert figures["missing_images"] == 1
    assert figures["duplicates"] == 2  # three studies, one text
    assert figures["duplicate_share"] == pytest.approx(2 / 3)
    assert figures["held_out_in_train"] == 2
    assert figures["empty_share"] == 0
    assert set(figures["words"].values()) == {7}  # seven words, all different
    _, document = as_json(root, "--section", "both")
    assert document["corpora"]["mimic-cxr"]["words"]["median"] == 10


def test_unreadable_image_is_an_error_by_study_unless_skipped(tmp_path: Path) -> None:
    root = corpora.mimic(tmp_path / "m")
    corpora.corrupt(root / "files/p10/p10000032/s50000001/d2.jpg")
    assert run("check", root).exit_code == 0  # images are not opened unless asked for
    result = run("check", root, "--images")
    assert result.exit_code == 1
    assert "study s50000001: the file cannot be decoded" in result.stdout
    assert "10000032" not in result.output
    code, document = as_json(root, "--images")
    figures = document["corpora"]["mimic-cxr"]
    assert (code, document["ok"], figures["images_opened"]) == (1, False, 2)
    assert list(figures["unreadable"]) == ["s50000001"]
    assert "1 images are unreadable" in figures["problems"][0]
    code, document = as_json(root, "--skip-bad")
    figures = document["corpora"]["mimic-cxr"]
    assert (code, document["ok"], figures["skipped"]) == (0, True, True)
    assert figures["dropped"]["image unreadable"] == 1
    assert figures["splits"]["train"]["samples"] == 0


def test_shared_patients_exit_1(tmp_path: Path) -> None:
    crossing = [("d1", 1, 10000032, "train"), ("d2", 2, 10000032, "test")]
    root = corpora.mimic(tmp_path / "m", crossing)
    result = run("check", root, "--views", "all")
    assert result.exit_code == 1
    assert "1 patients are in more than one split" in result.stderr
    assert "10000032" not in result.output
    code, document = as_json(root, "--views", "all")
    assert (code, document["corpora"]["mimic-cxr"]["shared_patients"]) == (1, 1)


def recipe(path: Path, *names: str) -> Path:
    tables = "".join(
        f'[data.{n}]\nreader = "{n}"\npath = "{BUILDERS[n](path / n)}"\n' for n in names
    )
    file = path / "recipe.toml"
    file.write_text(f"[image]\nsize = 32\n{tables}", encoding="utf-8")
    return file


def test_recipe_checks_all_its_corpora(tmp_path: Path) -> None:
    file = recipe(tmp_path, "mimic-cxr", "rexgradient")
    code, document = as_json(file)
    assert code == 0
    assert set(document["corpora"]) == {"mimic-cxr", "rexgradient"}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["absent"], "does not exist"),
        (["."], "has no layout that is known"),
        ([".", "--reader", "mimic"], "--reader 'mimic'; valid: pairs-jsonl"),
        ([".", "--section", "all"], "--section 'all'; valid: findings, impression, both"),
        ([".", "--reader", "r2gen"], "cannot be read as JSON"),
        (["empty.toml"], r"has no \[data.NAME\] table"),
        (["empty.toml", "--reader", "r2gen"], "the recipe names its readers itself"),
    ],
)
def test_usage_errors(
    args: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.toml").touch()
    result = run("check", *args)
    assert result.exit_code == 2
    assert re.search(says, result.stderr)


def test_preview_shows_the_tensor_and_the_text(tmp_path: Path) -> None:
    file, out = recipe(tmp_path, "mimic-cxr"), tmp_path / "page.html"
    result = run("preview", file, "--out", out)
    assert result.exit_code == 0, result.output
    assert "Heart" not in result.output
    html = out.read_text(encoding="utf-8")
    assert NOTICE in html
    assert out.stat().st_mode & 0o077 == 0
    assert "<script" not in html
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)
    assert html.count("<article>") == 2
    assert FINDINGS in html
    assert IMPRESSION not in html
    assert "10000032" not in html
    images = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r"data:image/png;base64,([^\"]+)", html)
    ]
    size = ImageRecipe(size=32)
    samples = read("m", CorpusConfig(reader="mimic-cxr", path=str(tmp_path / "mimic-cxr"))).samples
    for sample in samples:
        assert sample.image is not None
        expected = prepare(open_radiograph(sample.image), size)
        assert any(np.array_equal(image, np.asarray(displayed(expected, size))) for image in images)
        mean, std = np.float32(size.mean)[:, None, None], np.float32(size.std)[:, None, None]
        undone = (expected[0] * std + mean).transpose(1, 2, 0) * 255
        assert min(np.abs(image - undone).max() for image in images) <= 0.51


def test_preview_shows_both_views_and_the_indication(tmp_path: Path) -> None:
    root = corpora.two_views(tmp_path / "m")
    for report in root.rglob("s50000000.txt"):
        report.write_text(report.read_text().replace("cough", "<b>cough</b>"))
    run("preview", root, "--out", tmp_path / "p.html", "--views", "frontal+lateral")
    html = (tmp_path / "p.html").read_text("utf-8")
    articles = html.split("<article>")[1:]
    assert sorted(article.count("<img") for article in articles) == [1] * 5 + [2] * 5
    assert "<dd>&lt;b&gt;cough&lt;/b&gt; for 0 days.</dd>" in html
    assert html.count("<dd>not stated</dd>") == 1
    for lateral in root.rglob("l0.jpg"):
        corpora.corrupt(lateral)
    run("preview", root, "--out", tmp_path / "p.html", "--views", "frontal+lateral")
    assert "its lateral image is unreadable" in (tmp_path / "p.html").read_text("utf-8")


def test_preview_is_drawn_by_seed_and_survives_a_corrupt_image(tmp_path: Path) -> None:
    root = corpora.rexgradient(tmp_path / "x")
    pages = []
    for seed in (0, 0, 1, 2, 3):
        run("preview", root, "--out", tmp_path / "p.html", "--count", "1", "--seed", seed)
        pages.append((tmp_path / "p.html").read_text("utf-8"))
    assert pages[0] == pages[1]
    assert len(set(pages)) > 2
    for image in root.rglob("b.png"):
        corpora.corrupt(image)
    assert run("preview", root, "--out", tmp_path / "p.html").exit_code == 0
    assert (tmp_path / "p.html").read_text("utf-8").count("its image is unreadable") == 3


def test_text_of_a_report_is_escaped(tmp_path: Path) -> None:
    root = corpora.padchest(tmp_path / "p")
    file = root / "grounded_reports_20240819.json"
    file.write_text(file.read_text().replace("Lungs are clear", "<script>alert(1)</script>"))
    assert run("preview", root, "--out", tmp_path / "p.html").exit_code == 0
    html = (tmp_path / "p.html").read_text("utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_check_of_one_study(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    corpora.grey(tmp_path / "images" / "a.png")
    row = {"image": "a.png", "report": FINDINGS, "view": "PA", "patient": "1", "split": "train"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    found = check("p", CorpusConfig(path=str(tmp_path)), images=True)
    assert (found.words.minimum, found.words.median, found.words.maximum) == (10, 10, 10)
    assert (found.images_opened, found.problems, found.sections) == (1, (), {})
