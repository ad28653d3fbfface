"""Many studies at once say what each says alone; one that fails stops none."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from rx_edge.backends import llm_gguf
from rx_edge.backends.gguf_batch import SIZE
from rx_edge.backends.llm_gguf_parallel import GgufParallel
from rx_edge.cli import app
from rx_edge.config import RuntimeConfig
from rx_edge.errors import BackendError
from rx_edge.runtime import worklist, worklist_slots
from rx_edge.runtime.decoding import Draft
from rx_edge.runtime.session import Session, open_session
from rx_edge.runtime.worklist import draft_all
from rx_edge.types import Timings
from rx_edge_bench.latency import run_to_end
from rx_edge_export import phantom

runner = CliRunner()


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("studies")
    paths = []
    for number in range(7):
        path = root / f"{number}.dcm"
        phantom.write_dicom(path, phantom.display(number), "MONOCHROME1")
        paths.append(path)
    return paths


@pytest.mark.parametrize(
    ("workers", "slots", "readers"),
    [(1, 1, 0), (3, 1, 0), (1, 3, 0), (2, 2, 0), (1, 8, 0), (2, 1, 2), (1, 3, 1), (2, 2, 3)],
)
def test_texts_are_those_of_one_study_at_a_time(
    tiny_bundle: Path, studies: list[Path], workers: int, slots: int, readers: int
) -> None:
    plain = RuntimeConfig(drafts=False)
    with open_session(tiny_bundle, language="F16", max_new_tokens=24, runtime=plain) as session:
        alone = [run_to_end(session, study) for study in studies]
        many = draft_all(session, studies, workers=workers, slots=slots, readers=readers)
        together = list(many)
    assert [r.index for r in together] == list(range(len(studies)))
    for one, other in zip(alone, together, strict=True):
        assert other.report is not None
        assert other.report.token_ids == one.token_ids
        assert other.report.text == one.text
        assert other.report.flags == one.flags
        assert other.report.provenance == one.provenance
        assert other.report.timings.decode_passes == len(one.token_ids) - (one.finish != "end")


@pytest.mark.parametrize(
    ("workers", "slots", "readers"), [(2, 1, 0), (1, 2, 0), (2, 1, 2), (1, 2, 2)]
)
def test_a_failed_study_stops_none(
    tiny_bundle: Path, studies: list[Path], tmp_path: Path, workers: int, slots: int, readers: int
) -> None:
    broken = tmp_path / "broken.dcm"
    broken.write_bytes(studies[0].read_bytes()[:2000])
    order = [studies[0], broken, studies[1], tmp_path / "missing.dcm", studies[2]]
    with open_session(tiny_bundle, max_new_tokens=8) as session:
        many = draft_all(session, order, workers=workers, slots=slots, readers=readers)
        results = list(many)
    assert [r.study for r in results] == order
    assert [r.error is not None for r in results] == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("workers", "slots", "readers"), [(2, 1, 0), (1, 2, 0), (2, 1, 2), (1, 2, 2)]
)
def test_stopping_early_leaves_no_thread(
    tiny_bundle: Path, studies: list[Path], workers: int, slots: int, readers: int
) -> None:
    with open_session(tiny_bundle, max_new_tokens=8) as session:
        results = draft_all(
            session, studies * 3, workers=workers, slots=slots, readers=readers, ahead=1
        )
        next(results)
        results.close()  # type: ignore[attr-defined]
        names = [t.name for t in threading.enumerate()]
        assert not [name for name in names if name.startswith("rx-edge-")]
        assert run_to_end(session, studies[0]).token_ids  # the session stays usable


def test_a_pass_over_slots_is_one_pass(
    tiny_bundle: Path, studies: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp would split it wherever slots do not ascend: half as fast, and nobody is told."""
    passes: list[list[int]] = []
    faithful = GgufParallel.step

    def step(self: Any, feeds: Any) -> Any:
        passes.append([slot for slot, _ in feeds])
        return faithful(self, feeds)

    monkeypatch.setattr(GgufParallel, "step", step)
    with open_session(tiny_bundle, max_new_tokens=12) as session:
        lengths = range(2, 9)  # drafts end at different times, and slots are given away again
        monkeypatch.setattr(worklist_slots, "new_draft", _of_lengths(iter(lengths)))
        assert len(list(draft_all(session, studies, workers=1, slots=3))) == len(lengths)
    assert all(slots == sorted(slots) for slots in passes)
    assert max(map(len, passes)) == 3


def _of_lengths(lengths: Iterator[int]) -> Any:
    def new_draft(session: Session, timings: Timings, _: None) -> Draft:
        end = session.tokenizer.get_vocab_size()  # never chosen
        return Draft(end=end, limit=next(lengths), timings=timings)

    return new_draft


def test_workers_share_the_cores(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One per core where weights are shared and memory suffices; else one."""
    monkeypatch.setattr(worklist, "physical_cores", lambda: 6)
    with open_session(tiny_bundle) as session:
        assert worklist.default_workers(session) == 6
        with worklist._worker(session, 3) as worker:
            assert worker.generate == replace(session.generate, threads=2)
            assert worker.artifact == session.artifact
        language: Any = session.language
        tower = session.bundle.manifest.files[session.vision_artifact.file].bytes
        each = (1 + worklist.SLOTS) * language.sequence_bytes + 2 * tower
        monkeypatch.setattr(worklist, "memory_free", lambda: 2 * 3 * each)
        assert worklist.default_workers(session) == 3
        monkeypatch.setattr(worklist, "memory_free", lambda: 0)
        assert worklist.default_workers(session) == 1
        monkeypatch.undo()
        monkeypatch.delattr(llm_gguf, "SHARES_WEIGHTS")
        assert worklist.default_workers(session) == 1


def test_slots_fit_into_the_free_memory(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(tiny_bundle) as session:
        language: Any = session.language
        for room, slots in ((worklist.SLOTS + 9, worklist.SLOTS), (6, 5), (2, 1), (0, 1)):
            free = 2 * 3 * room * language.sequence_bytes
            monkeypatch.setattr(worklist, "memory_free", lambda free=free: free)
            assert worklist.default_slots(session, 3) == slots
        monkeypatch.setattr(language, "device", "cuda (a GPU)")
        assert worklist.default_slots(session, 1) == worklist.GPU_SLOTS
        one_sequence: Any = object()
        assert worklist.default_slots(replace(session, language=one_sequence), 1) == 1


def test_a_backend_without_slots_is_refused(tiny_bundle: Path, studies: list[Path]) -> None:
    with open_session(tiny_bundle) as session:
        one_sequence: Any = object()
        with pytest.raises(BackendError, match="leave slots"):
            list(draft_all(replace(session, language=one_sequence), studies, slots=2))


def test_slots_are_independent(tiny_bundle: Path) -> None:
    """Logits of a slot do not depend on its neighbours, and a start is copied, not mixed up."""
    with open_session(tiny_bundle, language="F16") as session:
        start = np.asarray(session.prompt.before, np.int32)
        after = np.asarray(session.prompt.after, np.int32)
        random = np.random.default_rng(0)
        softs = [random.normal(0, 0.2, (4, 64)).astype(np.float32) for _ in range(4)]
        language: Any = session.language
        alone = []
        for soft in softs:
            language.rewind(0)
            language.prefill([start])
            language.prefill([soft, after])
            alone.append(language.step(np.asarray([5], np.int32))[0])
        with language.parallel(4) as slots:
            for _ in range(2):  # the second round finds its start in every slot
                for slot, soft in enumerate(softs):
                    slots.begin(slot, start, [soft, after])
                rows = slots.step([(slot, np.asarray([5], np.int32)) for slot in range(4)])
                for one, other in zip(alone, rows, strict=True):
                    assert float(np.abs(one - other[0]).max()) < 0.05
            assert float(np.abs(alone[0] - alone[1]).max()) > 0.3
            position = slots.position(2)
            with pytest.raises(BackendError, match="token ids in one pass"):
                slots.step([(0, np.zeros(SIZE + 1, np.int32))])
            with pytest.raises(BackendError, match="context is full"):
                slots.step([(2, _too_long(slots))])
            assert slots.position(2) == position


def _too_long(slots: Any) -> Any:
    slots._n_ctx = slots.position(2) + 3  # a small context, without decoding a thousand tokens
    return np.zeros(4, np.int32)


def test_a_slot_that_is_not_finite_fails_alone(
    tiny_bundle: Path, studies: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    faithful, calls = GgufParallel._logits, [0]

    def logits(self: Any, rows: int) -> Any:
        found = faithful(self, rows)
        calls[0] += 1
        if calls[0] > 4:
            found[-1, 3] = np.nan
            calls[0] = -1000
        return found

    monkeypatch.setattr(GgufParallel, "_logits", logits)
    with open_session(tiny_bundle, max_new_tokens=8) as session:
        results = list(draft_all(session, studies[:4], slots=3))
    failed = [r for r in results if r.error]
    assert len(failed) == 1
    assert "NaN" in str(failed[0].error)


def test_a_worker_that_cannot_open_ends_the_list(
    tiny_bundle: Path, studies: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(session: Session, workers: int) -> Session:
        raise BackendError(f"no room for {workers} workers")

    monkeypatch.setattr(worklist, "_worker", refused)
    with (
        open_session(tiny_bundle) as session,
        pytest.raises(BackendError, match="no room for 2 workers"),
    ):
        list(draft_all(session, studies, workers=2, slots=2))


def test_parallel_needs_an_open_model(tiny_bundle: Path) -> None:
    language = llm_gguf.open(tiny_bundle / "llm.F16.gguf", n_ctx=64, threads=1)
    language.close()
    with pytest.raises(BackendError, match="closed"):
        language.parallel(2)


def test_the_command_goes_on_where_it_stopped(
    tiny_bundle: Path, studies: list[Path], tmp_path: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for study in studies[:3]:
        (folder / study.name).write_bytes(study.read_bytes())
    (folder / "notes.txt").write_text("no image")
    command = ["worklist", str(folder), "--bundle", str(tiny_bundle), "--out", str(out), "--json"]
    first = runner.invoke(app, command)
    assert first.exit_code == 1  # one study failed
    assert json.loads(first.stdout) | {"out": ""} == {
        "studies": 4, "drafted": 3, "kept": 0, "failed": 1, "out": "",
    }  # fmt: skip
    index = json.loads((out / "worklist.json").read_text("utf-8"))["studies"]
    assert [Path(e["study"]).name for e in index] == ["0.dcm", "1.dcm", "2.dcm", "notes.txt"]
    assert [e["ok"] for e in index] == [True, True, True, False]
    entry = json.loads((out / index[0]["file"]).read_text("utf-8"))
    assert entry["report"]["status"] == "draft"
    assert entry["report"]["banner"]
    assert "is not an image" in json.loads((out / index[3]["file"]).read_text("utf-8"))["error"]
    (folder / "notes.txt").unlink()
    (out / index[1]["file"]).unlink()
    second = runner.invoke(app, command)
    assert second.exit_code == 0, second.stderr
    assert json.loads(second.stdout)["drafted"] == 1
    assert json.loads(second.stdout)["kept"] == 2
    other = runner.invoke(app, [*command, "--llm", "F16"])
    assert json.loads(other.stdout)["kept"] == 0  # another precision is another result


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_a_wrong_directory_is_one_error(tiny_bundle: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "folder"
    if what == "empty":
        folder.mkdir()
    result = runner.invoke(
        app, ["worklist", str(folder), "--bundle", str(tiny_bundle), "--out", str(tmp_path / "o")]
    )
    assert result.exit_code == 2
    assert "directory" in result.stderr
    assert not (tmp_path / "o").exists()
