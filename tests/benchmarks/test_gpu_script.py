"""`benchmarks/gpu/measure.py` runs every step on a processor, in pieces, and planted faults."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rx_edge.errors import BackendError, UsageError
from rx_edge.nvidia import Driver, Gpu
from rx_edge.runtime.decoding import Draft, decode
from rx_edge.runtime.drafting import WIDTHS
from rx_edge.types import Timings
from rx_edge_bench.export_memory import GEOMETRY, LAYERS
from rx_edge_bench.gpu import energy, install, plan
from rx_edge_bench.gpu.language import NO_END, TOKENS, Replayed, _beside, record
from rx_edge_bench.gpu.training import multiplied_weights
from tests.conftest import REPOSITORY, Once

SCRIPT = REPOSITORY / "benchmarks" / "gpu" / "measure.py"
NAMES = [step.name for step in plan.STEPS]


def _command(out: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--small", "--out", str(out), *arguments]


def _measure(out: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        _command(out, *arguments), capture_output=True, text=True, check=False, cwd=out.parent
    )
    return done.returncode, done.stdout + done.stderr


def _read(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{name}.json").read_text("utf-8"))
    return found


def _times(out: Path) -> dict[str, int]:
    return {name: (out / f"{name}.json").stat().st_mtime_ns for name in NAMES}


@pytest.fixture(scope="module")
def dry(once: Once) -> Path:
    """A whole dry run; tests that change it work on a copy."""

    def make(out: Path) -> None:
        code, text = _measure(out, "--budget", "3000")  # of a busy machine
        assert code == 0, text
        for name in NAMES:
            assert f"{name} " in text

    return once("gpu-dry", make)


@pytest.fixture
def copied(dry: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dry, tmp_path / "out")


def test_every_step_measures_or_says_why_not(dry: Path) -> None:
    for name in NAMES:
        found = _read(dry, name)
        assert (found["schema"], found["step"]) == (plan.SCHEMA, name)
        assert (found["small"], found["gpu"]) == (True, None)
        assert "failed" not in found
        assert found["line"]
        assert found["peak_rss_bytes"] > 0
    summary = _read(dry, "summary")
    assert (summary["small"], summary["gpu"], summary["driver"]) == (True, None, None)
    assert list(summary["steps"]) == NAMES
    assert summary["left"] == []
    assert len(summary["fingerprint"]) == 12
    assert str(dry) not in json.dumps(summary)


def test_what_the_dry_run_measures(dry: Path) -> None:
    assert _read(dry, "export-Q4_K_M")["tensor_types"].keys() == {"F32", "Q4_K", "Q6_K"}
    for precision in plan.PRECISIONS:
        decoded = _read(dry, f"decode-{precision}")
        assert decoded["device"] == "cpu"
        assert decoded["tokens_per_second"]["median"] > 0
        assert decoded["report_against_llama_bench"]["n"] == 3
        assert decoded["roofline"]["share"] > 0
        costs = _read(dry, f"widths-{precision}")
        assert list(costs["seconds"]) == [str(width) for width in WIDTHS]
        assert 3 < _read(dry, f"replay-{precision}")["tokens_per_pass"] < 6
    for name in ("vision-224", "vision-518"):
        engines = _read(dry, name)["engines"]
        for precision in ("fp32", "fp16"):
            assert engines[f"{precision}, vision_onnx on cpu"]["seconds"]["n"] == 3
            assert "unavailable" in engines[f"{precision}, vision_tensorrt on cuda"]
    assert _read(dry, "energy-Q8_0")["not measured"].startswith("no NVIDIA driver")
    assert _read(dry, "training")["trained"]["tokens_per_second"] > 0
    assert _read(dry, "training")["mfu"] > 0


def test_a_second_run_keeps_everything(dry: Path) -> None:
    before = _times(dry)
    code, text = _measure(dry)
    assert code == 0
    assert text.count("(kept)") == len(NAMES)
    assert _times(dry) == before


def test_no_budget_ends_before_the_first_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text = _measure(out, "--budget", "0")
    assert code == 0
    assert text.startswith(f"left: {', '.join(NAMES)}; install takes about 4 s, --budget is 0 s")
    assert [f.name for f in out.glob("*.json")] == ["summary.json"]
    assert _read(out, "summary")["left"] == NAMES


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(_command(out, "--only", "model"), stdout=subprocess.DEVNULL) as process:
        while not (out / "install.json").is_file():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not (out / "model.json").exists()
    before = (out / "install.json").stat().st_mtime_ns
    code, text = _measure(out, "--only", "model")
    assert code == 0, text
    assert (out / "install.json").stat().st_mtime_ns == before
    assert _read(out, "model")["weights"] > 1e6


def test_a_changed_setting_measures_again_and_keeps_the_models(copied: Path) -> None:
    before = _times(copied)
    code, text = _measure(copied, "--repeats", "2", "--only", "widths-Q8_0")
    assert code == 0, text
    changed = {name for name, when in _times(copied).items() if before[name] != when}
    assert changed == {"widths-Q8_0"}
    assert _read(copied, "widths-Q8_0")["settings"]["repeats"] == 2


def test_a_failing_step_is_told_and_the_others_go_on(copied: Path) -> None:
    model = copied / "small" / "llm.F16.gguf"
    whole = model.read_bytes()
    model.write_bytes(bytes(len(whole)))
    arguments = ("--repeats", "2", "--only", "widths", "energy-Q8_0")
    code, text = _measure(copied, *arguments)
    assert code == 1
    assert "FAILED: language model 'OUT/small/llm.F16.gguf' is not a GGUF file" in text
    assert "not measured: no GPU" in text
    assert _read(copied, "widths-F16")["failed"].endswith("export it again")
    assert "failed" not in _read(copied, "widths-Q8_0")
    assert "widths-F16" in _read(copied, "summary")["left"]
    model.write_bytes(whole)
    code, text = _measure(copied, *arguments)
    assert code == 0, text
    assert text.count("(kept)") == 3  # two files' widths, energy


def _job(out: Path, **changes: Any) -> plan.Job:
    settings = {"small": True, "repeats": 3, "pieces": None, "gpu": None, **changes}
    return plan.Job(out=out, **settings)


def _done(job: plan.Job, name: str, **result: Any) -> None:
    (step,) = (s for s in plan.STEPS if s.name == name)
    found = {"schema": plan.SCHEMA, "settings": plan.settings(job, step), **result}
    plan.write(job.out / f"{name}.json", found)


def _left(job: plan.Job, *names: str) -> list[str]:
    return [step.name for step in plan.left(job, plan.chosen(names))]


def test_what_is_left_follows_from_what_is_here(tmp_path: Path) -> None:
    job = _job(tmp_path)
    assert _left(job) == NAMES
    assert _left(job, "export-Q8_0") == ["install", "model", "export-F16", "export-Q8_0"]
    for name in NAMES:
        _done(job, name)
    _done(job, "model", files={"base": 3})
    assert _left(job) == []  # its files are gone, and nobody needs them any more
    _done(job, "training", failed="no memory")
    assert _left(job) == ["model", "training"]
    (tmp_path / "base").write_text("abc")
    assert _left(job) == ["training"]
    _done(job, "export-F16", failed="disk full")
    (tmp_path / "energy-Q8_0.json").unlink()
    assert _left(job) == ["energy-Q8_0", "export-F16", "training"]
    (tmp_path / "decode-F16.json").write_text("{")
    assert _left(job, "decode") == ["export-F16", "decode-F16"]
    assert _left(_job(tmp_path, gpu="L4"), "ceilings") == ["install", "ceilings"]
    with pytest.raises(UsageError, match=r"no step 'decoding'; valid: install"):
        plan.chosen(["decoding"])


def test_a_step_that_goes_on_too_long_is_stopped(tmp_path: Path) -> None:
    assert plan.in_process(_job(tmp_path), plan.STEPS[0], 0.01) == {
        "failed": "stopped after 0 s; give it a larger --budget"
    }


def test_a_machine_with_and_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--small runs the same steps"):
        plan.plan(tmp_path, small=False, repeats=1, pieces=None)
    with pytest.raises(UsageError, match="is no directory"):
        plan.plan(tmp_path, small=True, repeats=1, pieces=tmp_path / "none")
    found = Driver("580.95", (13, 0), (Gpu("H200", (9, 0), 141 << 30, 140 << 30),))
    monkeypatch.setattr(plan, "driver", lambda: found)
    monkeypatch.setattr(install, "driver", lambda: found)
    job = plan.plan(tmp_path, small=False, repeats=1, pieces=tmp_path)
    assert (job.gpu, job.device, job.files.name) == ("H200", "cuda", "7b")
    assert plan.Job.from_json(job.to_json()) == job
    assert install.cmake_arguments().endswith("-DCMAKE_CUDA_ARCHITECTURES=90-real")
    (tmp_path / "llama_cpp_python-0.3.36.tar.gz").touch()
    assert plan.expected(job, plan.STEPS[0]) == plan.BUILD_SECONDS
    assert all(plan.expected(job, step) <= 540 for step in plan.STEPS)


BACKEND = """
import os, zipfile
def build_wheel(directory, *_):
    with zipfile.ZipFile(directory + "/built-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("built.py", f"flags = {os.environ['CMAKE_ARGS']!r}")
        info = "built-1.0.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: built\\nVersion: 1.0\\n")
        tag = "Root-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\n" + tag)
        wheel.writestr(info + "RECORD", "")
    return "built-1.0-py3-none-any.whl"
"""
PROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def _archive(path: Path, mode: Any, members: dict[str, str]) -> None:
    with tarfile.open(path, mode) as archive:
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


def _pieces(folder: Path) -> None:
    """A wheel cut in two, an sdist, and a ready tree."""
    folder.mkdir()
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as wheel:
        wheel.writestr("cut.py", "")
        info = "cut-1.0.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: cut\nVersion: 1.0\n")
        wheel.writestr(
            info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(info + "RECORD", "")
    raw = whole.getvalue()
    (folder / "cut-1.0-py3-none-any.whl.aa").write_bytes(raw[:200])
    (folder / "cut-1.0-py3-none-any.whl.ab").write_bytes(raw[200:])
    sdist = {"built-1.0/pyproject.toml": PROJECT, "built-1.0/backend.py": BACKEND}
    _archive(folder / "built-1.0.tar.gz", "w:gz", {**sdist, "built-1.0/PKG-INFO": "Name: built"})
    _archive(folder / "tree.tar.xz", "w:xz", {"libllama.so": "", "tree/__init__.py": ""})


def test_pieces_are_joined_built_and_unpacked_once(tmp_path: Path) -> None:
    _pieces(tmp_path / "pieces")
    job = _job(tmp_path / "out", pieces=tmp_path / "pieces")
    job.out.mkdir()
    found = install.run(job)
    assert len(found["installed"]) == 3
    assert (job.site / "cut.py").is_file()
    assert "-DGGML_NATIVE=OFF" in (job.site / "built.py").read_text("utf-8")
    assert (job.site / "tree" / "__init__.py").is_file()
    environment = plan._environment(job)
    assert environment["LLAMA_CPP_LIB_PATH"] == str(job.site)
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(job.site)
    (job.site / "cut.py").unlink()
    assert install.run(job) == found
    assert not (job.site / "cut.py").exists()  # not installed again
    (tmp_path / "pieces" / "notes.txt").touch()
    with pytest.raises(BackendError, match=r"'notes\.txt' is none of"):
        install.run(job)


def test_an_absent_package_comes_with_its_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "PACKAGES", {"no_such_module": "gguf", "numpy": "numpy"})
    monkeypatch.setattr(install, "examine", list)
    found = install.doctor(_job(Path()))
    assert found["missing"].keys() == {"no_such_module"}
    assert "--only-binary :all:" in found["missing"]["no_such_module"]
    assert " gguf==" in found["missing"]["no_such_module"]  # the version of constraints.txt
    assert found["packages"]["numpy"] == np.__version__


def test_decoding_goes_on_without_the_other_loop(tmp_path: Path) -> None:
    with ExitStack() as stack:
        reason = _beside(_job(tmp_path), tmp_path / "llm.F16.gguf", stack)
    assert isinstance(reason, str)
    assert reason.startswith("llama.cpp cannot load")


class Zeros:
    """A language model that costs nothing."""

    position = 89

    def step(self, ids: Any) -> Any:
        self.position += len(ids)
        return np.zeros((len(ids), 50), np.float32)

    def rewind(self, position: int) -> None:
        self.position = position


def test_the_record_is_replayed_pass_by_pass() -> None:
    drafter, timings = Replayed([(7, 5), (0, 0), (7, 7), (5, 0)], 50), Timings()
    draft = Draft(end=NO_END, limit=TOKENS, choose=drafter, drafter=drafter, timings=timings)
    language: Any = Zeros()
    steps = [len(s.ids) for s in decode(language, np.zeros(50, np.float32), draft, drafter)]
    assert steps[:6] == [1, 6, 1, 8, 1, 1]
    assert timings.accepted == [5, 7, 0]
    assert (len(draft.ids), draft.finish) == (TOKENS, "length")
    assert language.position == 89 + TOKENS - 1


def test_the_record_is_the_demo_models() -> None:
    passes = record()
    assert {proposed + 1 for proposed, _ in passes} <= set(WIDTHS)
    assert all(accepted <= proposed for proposed, accepted in passes)
    work = json.loads((REPOSITORY / "benchmarks/results/drafts-demo-cpu2.json").read_text("utf-8"))
    counted = work["settings"]["all on"]["work"]
    new = sum(int(n) * times for n, times in counted["new_tokens"].items())
    # 220 drafts: the prefill gave the first token of each, a pass of each chose to end
    assert sum(accepted + 1 for _, accepted in passes) == new
    assert (new - 220) / len(passes) == pytest.approx(counted["tokens_per_pass"])


def test_operations_of_a_7b_model(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**GEOMETRY, "num_hidden_layers": LAYERS}), "utf-8")
    assert multiplied_weights(config) == 32 * (4 * 4096**2 + 3 * 4096 * 11008)


NVML = r"""
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **device) { *device = 0; return 0; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) {
  *milliwatts = 250000; return FAULT; }
"""


@pytest.mark.parametrize("fault", [0, 3])
def test_joules_are_watts_times_seconds(
    tmp_path: Path, fault: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, library = tmp_path / "nvml.c", tmp_path / "libnvml.so"
    source.write_text(NVML)
    command = ["gcc", "-shared", "-fPIC", f"-DFAULT={fault}", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    monkeypatch.setattr(energy, "EVERY", 0.005)
    if fault:
        with pytest.raises(BackendError, match="NVML error 3"):
            energy.Sensor(str(library))
        return
    found = energy.metered(lambda: time.sleep(0.02), 0.3, str(library))
    assert found["watts"] == 250
    assert found["joules_per_report"] == pytest.approx(250 * found["seconds"] / found["reports"])
    assert found["joules_per_token"] == pytest.approx(found["joules_per_report"] / TOKENS)
    with pytest.raises(BackendError, match="readings of power"):
        energy.metered(lambda: None, 0.0, str(library))
