"""A list of studies: read, drafted, resumed, and silent about why they were asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rx_edge.cli import app
from rx_edge.errors import UsageError
from rx_edge.runtime import worklist_ray
from rx_edge.runtime.session import open_session
from rx_edge.runtime.study_list import read_list, studies_in
from rx_edge.runtime.worklist_store import Store
from rx_edge.types import StudyInput
from rx_edge_export import phantom

runner = CliRunner()
SECRET = "Jane Q. Public, cough."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    root.mkdir()
    for number in range(3):
        phantom.write_dicom(root / f"{number}.dcm", phantom.display(number), "MONOCHROME1")
    return root


def listed(folder: Path, *rows: Any) -> Path:
    file = folder / "studies.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def test_paths_are_relative_to_the_list(folder: Path) -> None:
    elsewhere = str(folder.parent / "x.dcm")
    file = listed(
        folder,
        {"image": "0.dcm", "lateral": "sub/1.dcm", "indication": "a\u2028b"},
        {"image": elsewhere, "lateral": None},
    )
    file.write_text("\n" + file.read_text("utf-8") + "  \r\n", "utf-8")
    assert read_list(file) == [
        StudyInput(folder / "0.dcm", folder / "sub" / "1.dcm", "a\u2028b"),
        StudyInput(Path(elsewhere)),
    ]
    assert studies_in(file) == read_list(file)
    file.unlink()
    assert [s.image.name for s in studies_in(folder)] == ["0.dcm", "1.dcm", "2.dcm"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (SECRET, "not a JSON object"),
        ("[1]", 'a study has an "image"'),
        ('{"lateral": "1.dcm"}', 'a study has an "image"'),
        (f'{{"image": "0.dcm", "reason": "{SECRET}"}}', "no keys but image, lateral, indication"),
        (f'{{"image": "0.dcm", "indication": ["{SECRET}"]}}', "a value is no text"),
        ('{"image": 7}', "a value is no text"),
    ],
)
def test_a_wrong_line_is_named_and_not_quoted(folder: Path, line: str, message: str) -> None:
    file = listed(folder, {"image": "0.dcm"})
    file.write_text(file.read_text("utf-8") + line + "\n", "utf-8")
    with pytest.raises(UsageError, match=rf"studies\.jsonl:2: .*{message}") as caught:
        studies_in(file)
    assert "Public" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_what_is_neither_list_nor_directory(folder: Path) -> None:
    for source in (folder / "0.dcm", folder / "absent.jsonl"):
        with pytest.raises(UsageError, match="is not a directory"):
            studies_in(source)
    (folder / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="holds no files"):
        studies_in(folder / "empty.jsonl")
    (folder / "latin.jsonl").write_bytes(b'{"image": "\xe9.dcm"}\n')
    with pytest.raises(UsageError, match="not UTF-8"):
        studies_in(folder / "latin.jsonl")


def test_a_key_tells_apart_all_that_the_draft_depends_on(
    asking_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    one, two, three = (folder / f"{n}.dcm" for n in range(3))
    with open_session(asking_bundle) as session:
        store = Store(tmp_path / "out", session)
    studies = [
        StudyInput(one), StudyInput(two), StudyInput(one, two), StudyInput(two, one),
        StudyInput(one, three), StudyInput(one, None, SECRET), StudyInput(one, two, SECRET),
        StudyInput(one, None, "Fever."),
    ]  # fmt: skip
    keys = [store.key(study) for study in studies]
    assert len(set(keys)) == len(keys)
    assert store.key(one) == keys[0]
    assert store.key(StudyInput(one, None, " Fever.\n")) == keys[-1]


def rows(folder: Path) -> Path:
    return listed(
        folder,
        {"image": "0.dcm", "lateral": "1.dcm", "indication": SECRET},
        {"image": "0.dcm"},
        {"image": "1.dcm", "lateral": "absent.dcm"},
        {"image": "2.dcm", "indication": "Fever."},
    )


def test_a_list_is_drafted_and_resumed(asking_bundle: Path, folder: Path, tmp_path: Path) -> None:
    file, out = rows(folder), tmp_path / "out"
    command = ["worklist", str(file), "--bundle", str(asking_bundle), "--out", str(out), "--json"]
    first = runner.invoke(app, command)
    assert first.exit_code == 1, first.exception
    counts = {k: v for k, v in json.loads(first.stdout).items() if k != "out"}
    assert counts == {"studies": 4, "drafted": 3, "kept": 0, "failed": 1}
    assert "absent.dcm" in first.stderr
    index = json.loads((out / "worklist.json").read_text("utf-8"))["studies"]
    assert [Path(e["study"]).name for e in index] == ["0.dcm", "0.dcm", "2.dcm"]
    reports = [json.loads((out / e["file"]).read_text("utf-8"))["report"] for e in index]
    assert [r["provenance"]["views"] for r in reports] == ["2", "1", "1"]
    assert [r["provenance"]["indication"] for r in reports] == ["yes", "no", "yes"]
    for path in out.iterdir():
        assert "Public" not in path.read_text("utf-8")
        assert "Fever" not in path.read_text("utf-8")
    assert "Public" not in first.output

    file.write_text(file.read_text("utf-8").replace("Fever.", "Pain."), "utf-8")
    (folder / "absent.dcm").write_bytes((folder / "2.dcm").read_bytes())
    second = runner.invoke(app, command)
    assert second.exit_code == 0, second.stderr
    counts = {k: v for k, v in json.loads(second.stdout).items() if k != "out"}
    assert counts == {"studies": 4, "drafted": 2, "kept": 2, "failed": 0}


def test_a_list_that_the_model_does_not_read_is_refused_at_once(
    tiny_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["worklist", str(rows(folder)), "--bundle", str(tiny_bundle), "--out", str(out)]
    result = runner.invoke(app, command)
    assert result.exit_code == 2
    assert "reads one image of a study" in result.stderr
    assert not out.exists()


def test_indications_do_not_pass_through_ray(
    asking_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    """A worker reads the list itself, and only the list that the run was started with."""
    file = rows(folder)
    with open_session(asking_bundle, max_new_tokens=4) as session:
        store = Store(tmp_path / "out", session)
        job = worklist_ray.job_for(session, store, file)
    (tmp_path / "marks").mkdir()
    marked = replace(job, marks=tmp_path / "marks")
    worker = worklist_ray.Drafting(marked)
    answer = worker({"index": 0, "study": str(folder / "0.dcm")})
    assert answer["ok"], answer
    assert answer["key"] == store.key(read_list(file)[0])
    file.write_text(file.read_text("utf-8").replace("Fever.", "Pain."), "utf-8")
    other = worklist_ray.Drafting(marked)
    assert "another list" in other({"index": 0, "study": "0.dcm"})["refused"]
