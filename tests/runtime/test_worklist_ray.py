"""Worklists on a real Ray: the drafts of the local engine, whatever happens to a worker."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from rx_edge.cli import app
from rx_edge.errors import BackendError, MissingExtraError, RxEdgeError
from rx_edge.runtime import worklist_ray
from rx_edge.runtime.session import open_session
from rx_edge.runtime.worklist_store import Store
from rx_edge_export import phantom

runner = CliRunner()
pytestmark = pytest.mark.filterwarnings(  # Ray Data's own, about settings of its own
    "ignore:.use_[a-z_0-9]+. is deprecated:DeprecationWarning"
)


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every Ray process imports jsonschema, which builds this grammar for seconds if it is there.

    It comes with the checker of SBOMs only, so a worker in a hospital never meets it.
    """
    folder = tmp_path_factory.mktemp("lean")
    (folder / "rfc3987_syntax.py").write_text("raise ImportError('not for Ray')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield


@pytest.fixture(scope="module")
def ray(lean: None) -> Iterator[Any]:
    """A Ray as the command starts it, for all tests here; none of its processes stays."""
    with worklist_ray._running(None, 2) as running:
        processes = psutil.Process().children(recursive=True)
        yield running
        processes += psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(set(processes), timeout=60)
    assert not alive


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("studies")
    paths = [root / f"{number}.dcm" for number in range(8)]
    for number, path in enumerate(paths):
        phantom.write_dicom(path, phantom.display(number), "MONOCHROME1")
    return paths


@pytest.fixture
def job(tiny_bundle: Path, studies: list[Path], tmp_path: Path) -> worklist_ray.Job:
    with open_session(tiny_bundle, max_new_tokens=8) as session:
        store = Store(tmp_path / "results", session)
        return worklist_ray.job_for(session, store, studies[0].parent)


def address(ray: Any) -> str:
    return str(ray.get_runtime_context().gcs_address)


def results(out: Path) -> dict[str, Any]:
    """Everything in a directory of results but how long it took."""
    found = {}
    for path in out.iterdir():
        found[path.name] = json.loads(path.read_text("utf-8"))
        found[path.name].get("report", {}).pop("timings", None)
    return found


def test_results_are_those_of_the_local_engine_and_a_rerun_drafts_what_is_missing(
    ray: Any, tiny_bundle: Path, studies: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for study in studies:
        (folder / study.name).write_bytes(study.read_bytes())
    (folder / "broken.dcm").write_bytes(studies[0].read_bytes()[:2000])
    command = ["worklist", str(folder), "--bundle", str(tiny_bundle), "--json"]
    here = runner.invoke(app, [*command, "--out", str(tmp_path / "here")])
    there = runner.invoke(app, [*command, "--out", str(tmp_path / "there"), "--engine", "ray"])
    assert there.exit_code == here.exit_code == 1, there.exception
    assert there.stdout, there.exc_info
    assert json.loads(there.stdout) == {
        "studies": 9, "drafted": 8, "kept": 0, "failed": 1, "out": str(tmp_path / "there"),
    }  # fmt: skip
    assert json.loads(here.stdout) | {"out": ""} == json.loads(there.stdout) | {"out": ""}
    assert results(tmp_path / "there") == results(tmp_path / "here")

    index = json.loads((tmp_path / "there" / "worklist.json").read_text("utf-8"))["studies"]
    (tmp_path / "there" / index[2]["file"]).unlink()
    kept = {e["file"]: (tmp_path / "there" / e["file"]).stat().st_mtime_ns for e in index[3:8]}
    command = ["worklist", "in", "--bundle", str(tiny_bundle), "--out", "there", "--json"]
    command += ["--engine", "ray", "--workers", "1"]
    again = subprocess.run(  # another process, to which this Ray is a cluster
        [sys.executable, "-m", "rx_edge.cli", *command, "--ray-address", address(ray)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 1, again.stderr
    assert json.loads(again.stdout) == {
        "studies": 9, "drafted": 1, "kept": 7, "failed": 1, "out": "there",
    }  # fmt: skip
    assert kept == {file: (tmp_path / "there" / file).stat().st_mtime_ns for file in kept}
    assert {k: v.get("report") for k, v in results(tmp_path / "there").items()} == {
        k: v.get("report") for k, v in results(tmp_path / "here").items()
    }


def test_a_list_of_studies_with_two_views_and_indications(
    ray: Any, asking_bundle: Path, studies: list[Path], tmp_path: Path
) -> None:
    rows = [
        {"image": str(studies[0]), "lateral": str(studies[1]), "indication": "Jane Q. Public."},
        {"image": str(studies[0]), "indication": "Fever."},
        {"image": str(studies[0])},
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    found = []
    for engine in ("local", "ray"):
        # in float16 a pass over proposals can decide a tie, and the engines propose differently
        command = ["worklist", str(tmp_path / "list.jsonl"), "--bundle", str(asking_bundle)]
        command += ["--llm", "gguf:F32"]
        out = tmp_path / engine
        result = runner.invoke(app, [*command, "--out", str(out), "--engine", engine])
        assert result.exit_code == 0, result.output
        found.append(results(out))
    assert found[0] == found[1]
    assert len(found[0]) == 4
    assert "Public" not in str(found)


def kill_its_reader(pipe: Path, drafting: Future[Any], replace_by: Path | None = None) -> str:
    """SIGKILL to the worker that reads a named pipe, in the middle of a study; its title."""
    while not drafting.done():
        try:
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:  # nobody reads it yet
            time.sleep(0.05)
    else:
        pytest.fail(f"drafting ended first: {drafting.result()}")
    try:
        reads: list[psutil.Process] = []
        while not reads:  # a reader that is still within open() holds nothing yet
            reads = [p for p in psutil.Process().children(recursive=True) if holds(p.pid, pipe)]
        assert len(reads) == 1
        title = reads[0].cmdline()[0]
        if replace_by:
            pipe.unlink()
            pipe.symlink_to(replace_by)
        reads[0].send_signal(signal.SIGKILL)
        psutil.wait_procs(reads)
    finally:
        os.close(writer)  # else whoever still reads it waits for ever, and the test with it
    return title


def holds(pid: int, path: Path) -> bool:
    try:
        return any(fd.resolve() == path for fd in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:  # it ended meanwhile
        return False


def test_studies_of_a_killed_worker_are_drafted_by_the_next(
    ray: Any, job: worklist_ray.Job, studies: list[Path], tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe.dcm"
    os.mkfifo(pipe)
    order = [*studies[:3], pipe, *studies[3:7], tmp_path / "missing.dcm"]
    with ThreadPoolExecutor(1) as pool:
        drafting = pool.submit(lambda: list(worklist_ray.draft_all(job, order, workers=2)))
        title = kill_its_reader(pipe, drafting, replace_by=studies[7])
        outcomes = {outcome.index: outcome for outcome in drafting.result()}
    assert "ray::" in title
    assert len(drafting.result()) == len(outcomes) == len(order)
    assert [outcomes[i].ok for i in range(len(order))] == [True] * 8 + [False]
    assert "missing.dcm" in outcomes[8].unread
    files = {path.stem for path in job.store.root.iterdir()}
    assert files == {outcomes[i].key for i in range(8)}
    with open_session(job.bundle, max_new_tokens=8) as session:
        assert files == {Store(job.store.root, session).key(study) for study in studies}


def test_a_study_that_ends_every_worker_fails_alone(
    ray: Any, job: worklist_ray.Job, studies: list[Path], tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe.dcm"
    os.mkfifo(pipe)
    order = [studies[0], pipe, *studies[1:7]]  # one worker, tasks of two studies
    once = dataclasses.replace(job, tries=1)
    with ThreadPoolExecutor(1) as pool:
        drafting = pool.submit(lambda: list(worklist_ray.draft_all(once, order, workers=1)))
        kill_its_reader(pipe, drafting, replace_by=studies[7])
        outcomes = drafting.result()
    assert sorted(o.index for o in outcomes) == list(range(8))
    (failed,) = (o for o in outcomes if not o.ok)
    assert failed.index == 1
    entry = json.loads((job.store.root / f"{failed.key}.json").read_text("utf-8"))
    assert "every worker ended over it" in entry["error"]
    assert {path.stem for path in job.store.root.iterdir()} == {o.key for o in outcomes}


def test_a_worker_without_the_shared_storage_ends_it_in_one_line(
    ray: Any, job: worklist_ray.Job, studies: list[Path], tmp_path: Path
) -> None:
    elsewhere = dataclasses.replace(job, needed=(tmp_path / "elsewhere",))
    with pytest.raises(BackendError, match="a path that all nodes share") as caught:
        list(worklist_ray.draft_all(elsewhere, studies[:1]))
    assert "\n" not in str(caught.value)
    assert not list(job.store.root.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"digest": "0" * 64}, "is another one"), ({"version": "0.0"}, "0.0 where it was started")],
)
def test_a_worker_of_another_bundle_or_version_refuses(
    job: worklist_ray.Job, studies: list[Path], tmp_path: Path, change: Any, message: str
) -> None:
    worker = worklist_ray.Drafting(dataclasses.replace(job, marks=tmp_path, **change))
    assert message in worker({"index": 0, "study": str(studies[0])})["refused"]


def test_what_nobody_foresaw_costs_one_study(
    job: worklist_ray.Job, studies: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worklist_ray.Drafting(dataclasses.replace(job, marks=tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(worklist_ray, "draft_one", lambda *_: {}["secret"])
        first = worker({"index": 0, "study": str(studies[0])})
    second = worker({"index": 1, "study": str(studies[1])})
    assert (first["ok"], second["ok"], first["refused"]) == (False, True, "")
    entry = json.loads((job.store.root / f"{first['key']}.json").read_text("utf-8"))
    assert entry["error"].startswith("KeyError, which nobody foresaw")
    assert "secret" not in entry["error"]


def test_it_is_private(ray: Any) -> None:
    """Nothing listens beyond this machine, others see no file of it, and it reports to nobody."""
    processes = psutil.Process().children(recursive=True)
    pids = {os.getpid(), *(p.pid for p in processes)}
    listening = [
        c for c in psutil.net_connections("inet") if c.pid in pids and c.status == "LISTEN"
    ]
    assert listening
    assert {c.laddr.ip for c in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert session.parents[1].stat().st_mode & 0o777 == 0o700
    raylet = next(p for p in processes if p.name() == "raylet")
    assert raylet.environ()["RAY_USAGE_STATS_ENABLED"] == "0"


def test_interrupted_it_leaves_no_process_and_what_it_drafted(
    ray: Any, lean: None, tiny_bundle: Path, studies: list[Path], tmp_path: Path
) -> None:
    """Ctrl-C on the command, while a worker is in the middle of a study."""
    pipe, out = tmp_path / "pipe.dcm", tmp_path / "out"
    os.mkfifo(pipe)
    order = [str(studies[0]), str(pipe)]
    code = (
        # who runs the tests in the background may have switched it off
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import pathlib; from rx_edge.runtime import worklist_store; from rx_edge.cli import app;"
        f"worklist_store.studies_below = lambda _: map(pathlib.Path, {order});"
        f"app(['worklist', '.', '--bundle', '{tiny_bundle}', '--out', '{out}', '--workers', '1',"
        "'--engine', 'ray'])"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
        talking = pool.submit(command.communicate)
        while not talking.done():
            try:
                writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
                break
            except OSError:
                time.sleep(0.05)
        else:
            pytest.fail(str(talking.result()))
        processes = psutil.Process(command.pid).children(recursive=True)
        found = re.search(r"\S+/rx-ray-[^/]+", " ".join(str(p.cmdline()) for p in processes))
        command.send_signal(signal.SIGINT)
        stdout, stderr = talking.result()
        os.close(writer)
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    assert found
    assert not Path(found[0].rpartition("=")[2]).exists()
    assert command.returncode == 130, stderr
    assert stdout == ""
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    (done,) = (path for path in out.iterdir())
    assert json.loads(done.read_text("utf-8"))["report"]["status"] == "draft"


def test_without_ray_the_pip_line(
    tiny_bundle: Path, studies: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["worklist", str(studies[0].parent), "--bundle", str(tiny_bundle)]
    result = runner.invoke(app, [*command, "--out", str(tmp_path / "o"), "--engine", "ray"])
    assert result.exit_code == 1
    assert 'pip install "rx-edge[ray]"' in result.stderr
    assert not (tmp_path / "o").exists()
    with pytest.raises(MissingExtraError):
        worklist_ray.import_ray(None)


@pytest.mark.parametrize("options", [["--ray-address", "x:1"], ["--engine", "ray", "--slots", "2"]])
def test_options_that_exclude_each_other(
    tiny_bundle: Path, studies: list[Path], tmp_path: Path, options: list[str]
) -> None:
    command = ["worklist", str(studies[0].parent), "--bundle", str(tiny_bundle)]
    result = runner.invoke(app, [*command, "--out", str(tmp_path / "o"), *options])
    assert result.exit_code == 2
    assert "--engine ray" in result.stderr


@pytest.mark.parametrize(
    ("address", "message"),
    [("auto", "is not HOST:PORT"), ("ray://x:1", "is not HOST:PORT"), ("127.0.0.1:1", "no Ray")],
)
def test_a_wrong_address_is_one_error(address: str, message: str) -> None:
    with pytest.raises(RxEdgeError, match=message):
        worklist_ray._check_answers(address)
