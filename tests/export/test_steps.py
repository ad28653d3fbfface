"""Finished steps survive a kill; nothing else does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rx_edge.bundle import MANIFEST, open_bundle
from rx_edge.errors import ExportError, UsageError
from rx_edge_export import artifacts
from rx_edge_export.export import export, silent
from rx_edge_export.steps import RECORD, Steps


def run_two(work: Path, key: str, made: list[str], *, broken: str = "") -> dict[str, object]:
    """Steps a and b, each writing a file of its name."""
    result: dict[str, object] = {}
    with Steps(work, key, 2, silent) as steps:
        for name in "ab":

            def make(name: str = name) -> dict[str, object]:
                if name == broken:
                    raise KeyboardInterrupt
                made.append(name)
                (work / name).write_text(name, "utf-8")
                return {"size": 1}

            result = steps.run(name, lambda name=name: [work / name], make)
    return result


def test_finished_steps_are_not_repeated(tmp_path: Path) -> None:
    made: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_two(tmp_path / "w", "key", made, broken="b")
    assert run_two(tmp_path / "w", "key", made) == {"size": 1}
    assert made == ["a", "b"]


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_step_whose_file_changed_is_repeated(tmp_path: Path, damage: str) -> None:
    made: list[str] = []
    run_two(tmp_path / "w", "key", made)
    if damage == "gone":
        (tmp_path / "w" / "a").unlink()
    else:
        (tmp_path / "w" / "a").write_text("x", "utf-8")
    run_two(tmp_path / "w", "key", made)
    assert made == ["a", "b", "a"]


def test_another_key_begins_anew(tmp_path: Path) -> None:
    made: list[str] = []
    run_two(tmp_path / "w", "key", made)
    (tmp_path / "w" / "stray").touch()
    run_two(tmp_path / "w", "other", made)
    assert made == ["a", "b", "a", "b"]
    assert not (tmp_path / "w" / "stray").exists()


def test_a_damaged_record_begins_anew(tmp_path: Path) -> None:
    made: list[str] = []
    run_two(tmp_path / "w", "key", made)
    (tmp_path / "w" / RECORD).write_text("{", "utf-8")
    run_two(tmp_path / "w", "key", made)
    assert made == ["a", "b", "a", "b"]


def test_two_exports_to_one_place_exclude_each_other(tmp_path: Path) -> None:
    with (
        Steps(tmp_path / "w", "key", 1, silent),
        pytest.raises(UsageError, match="in use by another export"),
    ):
        Steps(tmp_path / "w", "key", 1, silent)
    Steps(tmp_path / "w", "key", 1, silent).__exit__(None, None, None)


def test_an_interrupted_export_goes_on(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(artifacts.llm_gguf, "write", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            export(tiny_run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    monkeypatch.setattr(artifacts.vision_onnx, "write", _interrupt)  # must not be needed again
    monkeypatch.setattr(artifacts, "load_run", _interrupt)
    export(tiny_run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert open_bundle(tmp_path / "out").manifest.verification.passed


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_failed_export_leaves_nothing(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise ExportError("disk full")

    monkeypatch.setattr(artifacts.llm_gguf, "write", full)
    with pytest.raises(ExportError, match="disk full"):
        export(tiny_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_goes_on(tiny_run: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """SIGKILL at some point of a real process; the second attempt ends in the same bundle."""
    code = (
        "import sys; from pathlib import Path; from rx_edge_export.export import export\n"
        "export(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(tiny_run), str(tmp_path / "out")]
    record = tmp_path / ".out.partial" / RECORD
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        record.is_file() and b"merging LoRA" in record.read_bytes()
    ):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    before = record.read_bytes()
    assert b"golden vectors" in before
    subprocess.run(command, check=True)
    mine = open_bundle(tmp_path / "out").manifest
    assert mine.files == open_bundle(tiny_bundle).manifest.files
    assert (tmp_path / "out" / MANIFEST).is_file()
