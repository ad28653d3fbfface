"""A study read in another process is the study read here; a bad one costs only itself."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from rx_edge.config import ImageRecipe, PromptConfig
from rx_edge.config_io import to_mapping
from rx_edge.errors import BackendError, InputError, RxEdgeError, UsageError
from rx_edge.runtime import read_ahead, worklist
from rx_edge.runtime.read_ahead import ReadAhead, Reader, Waiting
from rx_edge.runtime.reading import StudyImages, read_images
from rx_edge.types import StudyInput
from rx_edge_export import phantom

ONE, TWO = PromptConfig(), PromptConfig(views="frontal+lateral")
RECIPE = ImageRecipe(size=56)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    found = {name: root / f"{name} \u00e9.dcm" for name in ("one", "two", "broken", "hand")}
    phantom.write_dicom(found["one"], phantom.display(1), "MONOCHROME1")
    phantom.write_dicom(found["two"], phantom.display(2), "MONOCHROME2")
    found["broken"].write_bytes(found["one"].read_bytes()[:1500])
    hand = dcmread(found["two"])
    hand.BodyPartExamined = "HAND"
    hand.save_as(found["hand"])
    found["png"] = root / "three.png"
    Image.fromarray((phantom.display(4) * 255).astype(np.uint8)).save(found["png"])
    found["missing"] = root / "missing.dcm"
    found["bytes"] = root / os.fsdecode(b"name-\xff.dcm")  # a name that is no UTF-8
    found["bytes"].write_bytes(found["two"].read_bytes())
    return found


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    with Reader(ONE, RECIPE) as one:
        yield one


def same(found: StudyImages, here: StudyImages) -> None:
    assert found.pixels.dtype == np.float32
    np.testing.assert_array_equal(found.pixels, here.pixels)
    for name in ("flags", "pixel_sha256", "source_format"):
        assert getattr(found, name) == getattr(here, name)
    assert found.read_seconds > 0
    assert found.prepare_seconds > 0


@pytest.mark.parametrize("name", ["one", "png", "bytes"])
def test_another_process_reads_the_same(reader: Reader, files: dict[str, Path], name: str) -> None:
    same(reader.read([files[name]]), read_images([files[name]], ONE, RECIPE))


def test_two_views_come_in_their_order(files: dict[str, Path]) -> None:
    paths = [files["one"], files["two"]]
    with Reader(TWO, RECIPE) as two:
        found = two.read(paths)
    same(found, read_images(paths, TWO, RECIPE))
    assert found.pixels.shape == (2, 3, 56, 56)
    assert not np.array_equal(found.pixels[0], found.pixels[1])


@pytest.mark.parametrize("name", ["broken", "hand", "missing"])
def test_what_is_wrong_with_a_file_is_said_as_here(
    reader: Reader, files: dict[str, Path], name: str
) -> None:
    with pytest.raises(RxEdgeError) as there:
        reader.read([files[name]])
    with pytest.raises(RxEdgeError) as here:
        read_images([files[name]], ONE, RECIPE)
    assert (type(there.value), str(there.value)) == (type(here.value), str(here.value))


def test_a_file_that_ends_the_process_costs_itself(
    reader: Reader, files: dict[str, Path], tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe.dcm"
    os.mkfifo(pipe)  # reading it waits, until the process is hit as a bad codec would hit it
    ended: list[int] = []
    held: list[int] = []

    def hit() -> None:
        while len(ended) < 2:  # a second process tries again
            if (pid := reader.pid) not in ended and _waits_for(pipe, held):
                os.kill(pid, signal.SIGSEGV)
                ended.append(pid)
            time.sleep(0.01)

    thread = threading.Thread(target=hit, daemon=True)
    thread.start()
    with pytest.raises(InputError, match=r"pipe.dcm' ended its reader \(-11\)"):
        reader.read([pipe])
    thread.join()
    for handle in held:
        os.close(handle)
    same(reader.read([files["two"]]), read_images([files["two"]], ONE, RECIPE))
    assert reader.pid not in ended


def _waits_for(pipe: Path, held: list[int]) -> bool:
    """Whether a process opens it to read: only then can it be opened to write without waiting."""
    try:
        held.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))  # closed, it would end the file
    except OSError:
        return False
    return True


def test_a_file_that_never_ends_is_given_up(files: dict[str, Path], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.dcm"
    os.mkfifo(pipe)
    with Reader(ONE, RECIPE) as reader:
        reader.read([files["one"]])  # it has started
        reader._patience = 1.0
        with pytest.raises(InputError, match="took more than 1 s"):
            reader.read([pipe])
        reader._patience = read_ahead.PATIENCE
        reader.read([files["one"]])


def test_a_reader_that_does_not_start_is_no_fault_of_the_files(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with Reader(ONE, RECIPE) as reader, pytest.raises(BackendError, match="--readers 0"):
        reader.read([files["one"]])
    with pytest.raises(BackendError, match="closed"):
        reader.read([files["one"]])
    monkeypatch.setattr("sys.executable", "/missing")
    with pytest.raises(BackendError, match="--readers 0"):
        Reader(ONE, RECIPE)


def test_answers_are_plain_json_and_numbers(files: dict[str, Path]) -> None:
    settings = {"prompt": to_mapping(ONE), "image": to_mapping(RECIPE)}
    questions = [settings, [str(files["one"])], [str(files["broken"])]]
    answers = io.BytesIO()
    read_ahead.serve(io.BytesIO(b"".join(map(read_ahead._line, questions))), answers)
    answers.seek(0)
    assert answers.readline() == read_ahead.READY
    header = json.loads(answers.readline())
    assert header["shape"] == [1, 3, 56, 56]
    assert len(answers.read(4 * 3 * 56 * 56)) == 4 * 3 * 56 * 56
    assert json.loads(answers.readline())["error"] == "DicomError"
    assert answers.read() == b""


class Listed:
    """A source of files."""

    def __init__(self, paths: list[Path]) -> None:
        self.stopped = False
        self._rest = iter(enumerate(paths))
        self._lock = threading.Lock()

    def next(self) -> Waiting | None:
        with self._lock:
            found = next(self._rest, None)
        return Waiting(found[0], StudyInput(found[1])) if found else None

    def stop(self) -> None:
        self.stopped = True


def test_every_worker_gets_its_studies_and_the_end(files: dict[str, Path]) -> None:
    paths = [files[name] for name in ("one", "broken", "two", "png", "missing")]
    source = ReadAhead(Listed(paths), ONE, RECIPE, readers=2)
    found = [one for _ in paths if (one := source.next()) is not None]
    assert source.next() is None
    assert source.next() is None  # for the next worker
    source.stop()
    found.sort(key=lambda one: one.index)
    assert [one.study.image for one in found] == paths
    assert [type(one.error) for one in found if one.error] == [
        type(_error(files["broken"])), UsageError,
    ]  # fmt: skip
    for number in (0, 2, 3):
        images = found[number].images
        assert images is not None
        same(images, read_images([paths[number]], ONE, RECIPE))


def _error(path: Path) -> RxEdgeError:
    with pytest.raises(RxEdgeError) as found:
        read_images([path], ONE, RECIPE)
    return found.value


def test_stopping_waits_for_no_file(files: dict[str, Path], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.dcm"
    os.mkfifo(pipe)
    source = ReadAhead(Listed([files["one"], pipe, *[files["two"]] * 9]), ONE, RECIPE, readers=2)
    assert source.next() is not None
    pids = [reader.pid for reader in source._readers]
    source.stop()
    assert source.next() is None
    assert not [t for t in threading.enumerate() if t.name.startswith("rx-edge-reader")]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_readers_that_do_not_start_end_the_list(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    source = ReadAhead(Listed([files["one"]] * 9), ONE, RECIPE, readers=2)
    with pytest.raises(BackendError, match="--readers 0"):
        source.next()
    source.stop()
    source.stop()  # nobody remembers whether it was called


def test_readers_pay_only_for_long_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worklist, "physical_cores", lambda: 3)
    assert [worklist.default_readers(n) for n in (0, 15, 16, 47, 48, 1000)] == [0, 0, 1, 2, 3, 3]
    monkeypatch.setattr(worklist, "physical_cores", lambda: 64)
    assert worklist.default_readers(1000) == worklist.MOST_READERS
    monkeypatch.setattr("sys.executable", "")
    assert worklist.default_readers(1000) == 0
