"""Archives: the worklist on Ray Data, one worker process per core of this machine or of a cluster.

Ray Data and not plain actors, because its pool of actors already restarts a worker that died, hands
it the same studies again and keeps few of them under way. A worker opens the bundle by itself,
which checks every hash on its machine, reads, drafts and files study by study through the `Store`,
and answers with a key and whether there is a report; a study begun twice is filed under one key.
Ray would try for ever a study that ends every worker: marks on disk count how often it was begun.
They also show that work goes on: a Ray that lost a worker and starts no other ends in an error.
Images never pass through Ray, and the process that drives it reads none. Indications do not pass
through it either: a worker reads the list of studies by itself.

Does not cover: threads of one process (`worklist.py`), drafts that share passes, GPUs.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import secrets
import socket
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rx_edge import __version__
from rx_edge.bundle import describe
from rx_edge.config import RuntimeConfig
from rx_edge.errors import BackendError, BundleError, InputError, RxEdgeError, UsageError
from rx_edge.optional import require
from rx_edge.runtime.session import Session, open_session
from rx_edge.runtime.stalling import moving
from rx_edge.runtime.study_list import is_list, read_list
from rx_edge.runtime.worklist import default_workers, draft_one
from rx_edge.runtime.worklist_store import Store
from rx_edge.types import Result, StudyInput

BLOCK = 16  # most studies in one task, of which each costs the driver some milliseconds
TRIES = 3  # times that a study may end its worker before it counts as failed
PATIENCE = 900.0  # seconds without a study begun or ended
CONNECT = 10.0  # seconds
OBJECTS = 256 * 2**20  # bytes of Ray's object store, which holds names of studies, never images
SOCKET = 107 - 66  # longest temporary path: Linux allows 107 bytes, Ray appends up to 66

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": 127.0.0.1 is not replaced by an outer address
PRIVATE = {LOOPBACK: "0", "RAY_AUTH_MODE": "token"}  # other users here reach localhost, too


@dataclass(frozen=True)
class Outcome:
    """What became of one study: `key` is empty where its file could not be read."""

    index: int
    key: str
    ok: bool
    unread: str = ""


@dataclass(frozen=True)
class Job:
    """What every worker needs to know; it travels to other machines, so every path is absolute.

    Attributes:
        needed: what a worker must see before it begins, or the storage is not shared.
        listed: the list that the studies are of, and its sha256; None = images, each a study.
        threads: of each worker.
        local: workers on this machine where nothing else is asked for.
        base: what the names of studies are relative to.
        marks: directory of this run's marks; made by `draft_all`.
    """

    bundle: Path
    digest: str
    vision: str
    language: str
    max_new_tokens: int
    threads: int
    allow_unverified: bool
    runtime: RuntimeConfig
    store: Store
    needed: tuple[Path, ...]
    local: int
    base: Path
    listed: tuple[Path, str] | None = None
    marks: Path = Path()
    tries: int = TRIES
    patience: float = PATIENCE
    version: str = __version__


def import_ray(address: str | None) -> Any:
    """Ray with Ray Data, silent and on this machine only unless there is an address.

    Raises:
        MissingExtraError: it is not installed; the message holds the pip command.
    """
    os.environ.update(QUIET)  # before the import, which reads all of these
    if address is None:
        os.environ.update(PRIVATE)
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else a file in the home
    for module in ("pyarrow", "pandas", "ray.data"):
        require(module, extra="ray")
    return require("ray", extra="ray")


def job_for(session: Session, store: Store, source: Path) -> Job:
    """A job with the bundle, artefacts and settings of a session, which may be closed then.

    Args:
        source: the directory of the studies, or their list.

    Raises:
        UsageError: the session runs on a GPU.
    """
    for device in (session.vision.device, session.language.device):
        if device != "cpu":
            raise UsageError(
                f"--engine ray drafts on CPUs only so far, this bundle runs on {device}; "
                "use --engine local"
            )
    return Job(
        bundle=session.bundle.root.absolute(),
        digest=session.bundle.digest,
        vision=session.vision_artifact.name,
        language=session.artifact.name,
        max_new_tokens=session.generate.max_new_tokens,
        threads=session.generate.threads or 1,
        allow_unverified=session.unverified,
        runtime=session.runtime,
        store=store,
        needed=(source.absolute(),),
        local=default_workers(session),
        base=Path.cwd(),
        listed=(source.absolute(), describe(source).sha256) if is_list(source) else None,
    )


def draft_all(
    job: Job, studies: Sequence[Path], *, workers: int = 0, address: str | None = None
) -> Generator[Outcome, None, None]:
    """Draft and file every study that has no report yet; outcomes as they come, one per study.

    Ray itself prints what befell its workers; redirect stdout where that is in the way.

    Args:
        studies: images; where there is a list, those of all its studies, in its order.
        workers: 0 = `job.local`; in a cluster, one per core.
        address: a running Ray cluster; None = Ray on this machine only, for the time of this call.

    Raises:
        UsageError: the address is none, or the temporary directory's path is too long for Ray.
        BackendError: Ray cannot be started or reached, a worker cannot draft at all, or nothing
            moves any more.
    """
    with ExitStack() as stack:
        ray = stack.enter_context(_running(address, job.threads * (workers or job.local)))
        cores = int(ray.cluster_resources().get("CPU", 0)) if address else job.local * job.threads
        count = min(workers or max(1, cores // job.threads), len(studies))
        # made just now, it also proves that a worker sees this very storage
        marks = stack.enter_context(tempfile.TemporaryDirectory(prefix=".ray-", dir=job.store.root))
        job = dataclasses.replace(job, marks=Path(marks), needed=(*job.needed, Path(marks)))
        try:
            yield from moving(_outcomes(ray, job, studies, count), job.marks, job.patience)
        except ray.exceptions.RayError as error:
            raise BackendError(
                f"Ray gave up ({type(error).__name__}); run it again to go on, or try "
                "--engine local"
            ) from error


def _outcomes(ray: Any, job: Job, studies: Sequence[Path], workers: int) -> Iterator[Outcome]:
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars = settings.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it would log names of files
    rows = [{"index": index, "study": str(study)} for index, study in enumerate(studies)]
    size = min(BLOCK, math.ceil(len(rows) / (4 * workers)))
    found = ray.data.from_items(rows, override_num_blocks=math.ceil(len(rows) / size)).map(
        Drafting,
        fn_constructor_args=(job,),
        # what waits for one worker cannot be taken by another
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_cpus=job.threads,
    )
    for row in found.iter_rows():
        refused = row.pop("refused")
        if refused:
            raise BackendError(f"a Ray worker cannot go on: {refused}")
        yield Outcome(**row)


class Drafting:
    """A worker: Ray makes one per process and calls it study by study."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._session: Session | None = None  # opened with the first study, which a crash counts to
        self._list: list[StudyInput] = []

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The fields of an `Outcome`, and why the worker cannot go on."""
        answer = {"index": row["index"], "key": "", "ok": False, "unread": "", "refused": ""}
        try:
            return answer | self._draft(row["index"], Path(row["study"]))
        except RxEdgeError as error:  # raised from here it would become Ray's error
            return answer | {"refused": str(error)}

    def _draft(self, index: int, given: Path) -> dict[str, Any]:
        job = self._job
        if self._session is None:
            _check(job)
            self._list = _list(job)
        study = self._list[index] if job.listed else StudyInput(job.base / given)
        with _begun(job.marks / str(index)) as before:
            self._session = self._session or _open(job)
            try:
                key = job.store.key(study)
            except InputError as error:
                return {"unread": str(error)}
            if not job.store.done(key):
                result = _result(self._session, index, study, again=before < job.tries)
                job.store.put(key, dataclasses.replace(result, study=given))
        return {"key": key, "ok": job.store.done(key)}


def _result(session: Session, index: int, study: StudyInput, *, again: bool) -> Result:
    image = study.image
    advice = f"draft {str(image)!r} with `rx-edge report` to see why"
    if not again:
        return Result(index, image, error=BackendError(f"every worker ended over it; {advice}"))
    try:
        return draft_one(session, index, study)
    except Exception as error:  # one study's surprise must not end an archive's night
        found = f"{type(error).__name__}, which nobody foresaw; {advice}"
        return Result(index, image, error=BackendError(found))


@contextmanager
def _begun(mark: Path) -> Iterator[int]:
    """How often this was begun before: a process that is killed in here leaves its mark."""
    try:
        with mark.open("ab") as file:
            before = file.tell()
            file.write(b".")
    except OSError as error:
        raise BackendError(f"{str(mark)!r} cannot be written: {error.strerror}") from error
    yield before
    mark.unlink(missing_ok=True)


def _check(job: Job) -> None:
    """The same rx-edge and the same storage as where the run was started."""
    if job.version != __version__:
        raise UsageError(f"rx-edge is {__version__} here and {job.version} where it was started")
    for path in job.needed:
        if not path.exists():
            raise UsageError(
                f"{str(path)!r} is not there; bundle, studies and --out must lie on a path that "
                "all nodes share"
            )


def _list(job: Job) -> list[StudyInput]:
    """The listed studies, from the very list that the run was started with."""
    if job.listed is None:
        return []
    file, sha256 = job.listed
    found = read_list(file)
    if describe(file).sha256 != sha256:
        raise UsageError(f"{str(file)!r} is another list where it was started")
    return found


def _open(job: Job) -> Session:
    session = open_session(
        job.bundle,
        vision=job.vision,
        language=job.language,
        max_new_tokens=job.max_new_tokens,
        threads=job.threads,
        allow_unverified=job.allow_unverified,
        runtime=job.runtime,
    )
    if session.bundle.digest != job.digest:
        session.close()
        raise BundleError(f"bundle {str(job.bundle)!r} is another one where it was started")
    return session


@contextmanager
def _running(address: str | None, cpus: int) -> Iterator[Any]:
    """Ray: the caller's where it runs already, a cluster's, or one of our own, ended afterwards."""
    ray = import_ray(address)
    if ray.is_initialized():
        yield ray
        return
    with ExitStack() as stack:
        options: dict[str, Any] = {"address": address}
        if address is None:
            folder = stack.enter_context(_private_folder())
            options = _local_options(folder, cpus)
        else:
            _check_answers(address)
        try:
            ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **options)
        except (OSError, RuntimeError, ValueError) as error:
            where = f"Ray does not answer at {address!r}" if address else "Ray does not start"
            raise BackendError(f"{where}: {str(error).splitlines()[0]}") from error
        stack.callback(ray.shutdown)
        if address is None and not ray.util.get_node_ip_address().startswith("127."):
            raise BackendError(
                "Ray would listen beyond this machine, because it was imported before rx-edge "
                f"could forbid it; set {LOOPBACK}=0 first"
            )
        yield ray


def _check_answers(address: str) -> None:
    """Ray itself waits for minutes and then ends the process."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()) or "/" in host:
        raise UsageError(f"Ray's address {address!r} is not HOST:PORT, e.g. 10.0.0.1:6379")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT).close()
    except (OSError, OverflowError) as error:
        raise BackendError(
            f"no Ray answers at {address!r} ({error}); start one with `ray start --head`"
        ) from error


def _local_options(folder: Path, cpus: int) -> dict[str, Any]:
    return {
        "address": "local",  # None would join any Ray that runs on this machine
        "_node_ip_address": "127.0.0.1",
        "num_cpus": cpus,
        "num_gpus": 0,
        "include_dashboard": False,
        "object_store_memory": OBJECTS,
        "_temp_dir": str(folder / "r"),  # Ray opens it to everybody; `folder` stays closed
    }


@contextmanager
def _private_folder() -> Iterator[Path]:
    """For Ray's sockets, logs and what spills from memory: nobody else's, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="rx-ray-", ignore_cleanup_errors=True) as name:
        if len(name) > SOCKET:
            raise UsageError(
                f"the temporary directory {name!r} is too long a path for Ray's sockets; "
                f"set TMPDIR to one of at most {SOCKET - 16} characters"
            )
        yield Path(name)
