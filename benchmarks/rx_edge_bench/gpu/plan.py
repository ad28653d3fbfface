"""The measurement of a GPU machine as steps that can be done in pieces: what is left, what is kept.

Each step is a process of its own (`block.py`) and leaves `OUT/STEP.json`, so that a crash, a kill
or a time limit costs one step. A result counts as long as its settings (machine, size, repeats) are
those asked for; a step whose files are gone is done again only where a step that is left needs
them.

Does not cover: what the steps do (the modules beside this one), printing
(`benchmarks/gpu/measure.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rx_edge.atomic import replacing
from rx_edge.errors import UsageError
from rx_edge.machine import cpu_model
from rx_edge.nvidia import Driver, driver

SCHEMA = "rx-edge-gpu/1"
GRACE = 40.0  # seconds past the budget in which a step may still end before it is stopped
BUILD_SECONDS = 420  # of llama.cpp with CUDA for one architecture on 16 cores
PRECISIONS = ("F16", "Q8_0", "Q4_K_M")

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What is asked for.

    Attributes:
        small: a tiny geometry on whatever is here, to try the way itself.
        repeats: of everything that is timed.
        pieces: directory of carried packages; None = nothing is installed.
        gpu: name of the GPU; None = there is none.
    """

    out: Path
    small: bool
    repeats: int
    pieces: Path | None
    gpu: str | None

    @property
    def device(self) -> str:
        """What the engines are ordered to use."""
        return "cuda" if self.gpu else "cpu"

    @property
    def files(self) -> Path:
        """Where models go; sizes never share a file."""
        return self.out / ("small" if self.small else "7b")

    @property
    def site(self) -> Path:
        """Where carried packages are installed; first on the path of every step."""
        return self.out / "site"

    def to_json(self) -> str:
        """For `from_json`, in a step's process."""
        return json.dumps(asdict(self), default=str)

    @staticmethod
    def from_json(text: str) -> Job:
        """The job of `to_json`."""
        raw = json.loads(text)
        pieces = Path(raw["pieces"]) if raw["pieces"] else None
        return Job(**{**raw, "out": Path(raw["out"]), "pieces": pieces})


@dataclass(frozen=True)
class Step:
    """One piece of the measurement.

    Attributes:
        function: module of this package and function in it, which takes the job and `argument`.
        seconds: expected on a GPU machine of 16 cores, and in small: guesses, to plan with.
        needs: steps whose files it reads.
        timed: whether its result depends on `Job.repeats`.
    """

    name: str
    function: str
    seconds: tuple[int, int]
    needs: tuple[str, ...] = ("install",)
    argument: str = ""
    timed: bool = True


def _per_file(
    name: str, seconds: tuple[int, int], *needs: str, files: tuple[str, ...] = PRECISIONS
) -> tuple[Step, ...]:
    """One step per GGUF file: a file that fails or does not fit costs no other."""
    module = "energy" if name == "energy" else "language"
    return tuple(
        Step(
            f"{name}-{file}",
            f"{module}:{name}",
            seconds,
            ("install", f"export-{file}", *needs),
            file,
        )
        for file in files
    )


STEPS = (
    Step("install", "install:run", (30, 4), needs=(), timed=False),
    Step("doctor", "install:doctor", (15, 4), timed=False),
    Step("ceilings", "ceilings:run", (60, 5)),
    Step("model", "artefacts:model", (150, 4), timed=False),
    Step("export-F16", "artefacts:export", (200, 6), ("install", "model"), "F16", timed=False),
    Step("export-Q8_0", "artefacts:export", (90, 4), ("install", "export-F16"), "Q8_0", False),
    Step("export-Q4_K_M", "artefacts:export", (240, 4), ("install", "export-F16"), "Q4_K_M", False),
    *_per_file("decode", (90, 3), "ceilings"),
    *_per_file("widths", (45, 3)),
    *_per_file("replay", (60, 3)),
    Step("vision-224", "vision:run", (120, 20), argument="224"),
    Step("vision-518", "vision:run", (240, 20), argument="518"),
    *_per_file("energy", (100, 3), files=("Q8_0", "Q4_K_M")),
    Step("training", "training:run", (400, 20), ("install", "ceilings", "model")),
)


def plan(out: Path, *, small: bool, repeats: int, pieces: Path | None) -> Job:
    """The job on this machine.

    Raises:
        UsageError: no GPU and not small, no repeats, or no such directory of pieces.
    """
    found = driver()
    gpus = found.gpus if isinstance(found, Driver) else ()
    if not gpus and not small:
        reason = found if isinstance(found, str) else "the driver shows no device"
        raise UsageError(
            f"{reason}; a 7B geometry is measured on a GPU only: --small runs the same steps with "
            "a tiny one on the processor"
        )
    if repeats < 1:
        raise UsageError(f"--repeats is {repeats}; at least 1")
    if pieces and not pieces.is_dir():
        raise UsageError(f"--pieces {str(pieces)!r} is no directory")
    absolute = pieces.resolve() if pieces else None
    return Job(out.resolve(), small, repeats, absolute, gpus[0].name if gpus else None)


def chosen(names: Collection[str]) -> list[Step]:
    """The steps called `names`, or whose name begins so ("export"); all without names.

    Raises:
        UsageError: no such step.
    """
    for name in names:
        if not any(_called(step, name) for step in STEPS):
            raise UsageError(f"no step {name!r}; valid: {', '.join(s.name for s in STEPS)}")
    return [s for s in STEPS if not names or any(_called(s, name) for name in names)]


def _called(step: Step, name: str) -> bool:
    return name in (step.name, step.name.partition("-")[0])


def settings(job: Job, step: Step) -> Result:
    """What a kept result must have been made with."""
    found: Result = {"small": job.small, "gpu": job.gpu, "cpu": cpu_model()}
    if step.timed:
        found["repeats"] = job.repeats
    if step.name == "install":
        found["pieces"] = {p.name: p.stat().st_size for p in pieces(job)}
    return found


def pieces(job: Job) -> list[Path]:
    """What was carried here, by name."""
    return sorted(p for p in job.pieces.iterdir() if p.is_file()) if job.pieces else []


def kept(job: Job, step: Step) -> Result | None:
    """The step's result with these settings, or None."""
    try:
        found: Result = json.loads((job.out / f"{step.name}.json").read_text(encoding="utf-8"))
        same = found["schema"] == SCHEMA and found["settings"] == settings(job, step)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if same else None


def figure(job: Job, name: str, key: str) -> float | None:
    """A number that the step `name` measured; None where it did not."""
    (step,) = chosen([name])
    found = (kept(job, step) or {}).get(key)
    return None if found is None else float(found)


def _usable(job: Job, found: Result | None) -> bool:
    """Whether other steps can build on it: it did not fail, and its files are here."""
    if found is None or "failed" in found:
        return False
    paths = ((job.out / name, size) for name, size in found.get("files", {}).items())
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def left(job: Job, steps: Collection[Step]) -> list[Step]:
    """What there is to do for `steps`, in order, with what it needs.

    A step that failed is tried again, after the others unless they need it.
    """
    found = {step.name: kept(job, step) for step in STEPS}
    failed = {name for name, result in found.items() if result and "failed" in result}
    wanted = {s.name for s in steps if found[s.name] is None or s.name in failed}
    needed: set[str] = set()
    for step in reversed(STEPS):
        if step.name in wanted:
            needed |= {name for name in step.needs if not _usable(job, found[name])}
            wanted |= needed
    todo = [step for step in STEPS if step.name in wanted]
    return sorted(todo, key=lambda s: s.name in failed - needed)


def expected(job: Job, step: Step) -> int:
    """Seconds that a step is planned with."""
    if step.name == "install" and any(p.name.startswith("llama_cpp_python") for p in pieces(job)):
        return BUILD_SECONDS
    return step.seconds[job.small]


def run(job: Job, todo: Collection[Step], budget: float) -> Iterator[tuple[Step, Result]]:
    """Do steps one after the other and keep each result, until the next would not fit.

    Args:
        budget: seconds for all; a step that goes on `GRACE` seconds longer is stopped and failed.
    """
    job.files.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for step in todo:
        spare = budget - (time.monotonic() - started)
        if expected(job, step) > spare:
            return
        begun = time.monotonic()
        found = in_process(job, step, spare + GRACE)
        result = {
            "schema": SCHEMA, "step": step.name, "small": job.small, "gpu": job.gpu,
            "settings": settings(job, step), "step_seconds": round(time.monotonic() - begun, 1),
            **found,
        }  # fmt: skip
        write(job.out / f"{step.name}.json", result)
        yield step, result


def in_process(job: Job, step: Step, limit: float) -> Result:
    """A step's result from a process of its own, or {"failed": reason}."""
    # -P: the working directory may hold modules of the same names
    command = [sys.executable, "-P", "-m", "rx_edge_bench.gpu.block", step.name]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=_environment(job), start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, log = process.communicate(job.to_json(), timeout=limit)
        except subprocess.TimeoutExpired:
            _kill(process)
            return {"failed": f"stopped after {limit:.0f} s; give it a larger --budget"}
        except BaseException:
            _kill(process)
            raise
    if process.returncode == 0:
        written = (line for line in reversed(output.splitlines()) if line.startswith("{"))
        found: Result = json.loads(next(written))  # engines may have written beside it
        return found
    lines = log.strip().splitlines() or ["no message"]
    reason = lines[-1].removeprefix("rx-edge: ").replace(str(job.out), "OUT")
    if process.returncode < 0:
        reason = f"ended by signal {-process.returncode}: {reason}"
    return {"failed": reason}


def _kill(process: subprocess.Popen[str]) -> None:
    """The step and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment(job: Job) -> dict[str, str]:
    """Carried packages come first, then this source tree, then what is installed."""
    sources = Path(__file__).resolve().parents[3]
    paths = [job.site, sources, sources / "export", sources / "benchmarks"]
    libraries = [str(p) for base in sys.path for p in sorted(Path(base).glob("nvidia/*/lib"))]
    found = {
        **os.environ,
        "PYTHONPATH": _joined([str(p) for p in paths], "PYTHONPATH"),
        "LD_LIBRARY_PATH": _joined([str(job.site), *libraries], "LD_LIBRARY_PATH"),
    }
    if (job.site / "libllama.so").is_file():
        found["LLAMA_CPP_LIB_PATH"] = str(job.site)
    return found


def _joined(paths: list[str], variable: str) -> str:
    before = os.environ.get(variable)
    return os.pathsep.join([*paths, before] if before else paths)


def summarise(job: Job, steps: Collection[Step]) -> Result:
    """Write and return `OUT/summary.json`: every kept result, the machine, and what is left."""
    machine = in_process(job, Step("machine", "", (0, 0)), 120)
    results = {step.name: kept(job, step) for step in STEPS}
    summary = {
        "schema": SCHEMA, "small": job.small, "gpu": job.gpu, **machine,
        "steps": {name: result for name, result in results.items() if result},
        "left": [step.name for step in left(job, steps)],
    }  # fmt: skip
    write(job.out / "summary.json", summary)
    return summary


def write(path: Path, result: Result) -> None:
    """Whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


Line = Callable[[str], object]


def measure(job: Job, steps: Collection[Step], budget: float, say: Line) -> int:
    """Go on with the measurement, telling `say` a line per step.

    Returns:
        1 where a step failed, else 0; what is left is said, and is no failure.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    todo, failed = left(job, steps), 0
    for step in steps:
        if step not in todo and (result := kept(job, step)):
            say(f"{told(result)} (kept)")
    for _, result in run(job, todo, budget):
        failed += "failed" in result
        say(told(result))
        todo = todo[1:]
    if todo:
        say(
            f"left: {', '.join(s.name for s in todo)}; {todo[0].name} takes about "
            f"{expected(job, todo[0])} s, --budget is {budget:.0f} s; the same command goes on"
        )
    summarise(job, steps)
    return int(failed > 0)


def told(result: Result) -> str:
    """A result in one line."""
    what = f"FAILED: {result['failed']}" if "failed" in result else result["line"]
    return f"{result['step']:<14} {result['step_seconds']:7.1f} s  {what}"
