"""Every conflict that an administrator meets is named, with the command that ends it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rx_edge.backends import gguf_engine, onnx_engine
from rx_edge.cli import app
from rx_edge.nvidia import Driver, Gpu
from rx_edge.runtime import doctor
from rx_edge.runtime.doctor import Finding, examine

runner = CliRunner()
CARD = Gpu("RTX 4090", (8, 9), 24 << 30, 23 << 30)
NEW, OLD = Driver("580.95.05", (13, 0), (CARD,)), Driver("535.104.05", (12, 2), (CARD,))


def _found(subject: str) -> Finding:
    return next(f for f in examine() if f.subject == subject)


def _installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    real = doctor._version
    known = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(doctor, "_version", lambda n: known[n] if n in known else real(n))


def test_this_machine_can_run_a_bundle() -> None:
    findings = {f.subject: f for f in examine()}
    assert findings["backend vision_onnx"].status == "ok"
    assert findings["backend llm_gguf"].status == "ok"
    assert findings["onnxruntime"].detail.startswith("onnxruntime ")
    assert "AVX" in findings["llama.cpp"].detail or "NEON" in findings["llama.cpp"].detail
    assert "broken" not in {f.status for f in findings.values()}


def test_two_onnxruntimes_overwrite_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, onnxruntime="1.32.0", onnxruntime_gpu="1.31.1")
    found = _found("onnxruntime")
    assert found.status == "broken"
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1" in found.detail
    assert found.fix == (
        'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "rx-edge[cpu]"'
    )
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["findings"]


@pytest.mark.parametrize(
    ("driver", "extra"), [(NEW, "gpu"), (OLD, "gpu-cu12"), ("no NVIDIA driver", "cpu")]
)
def test_the_extra_fits_the_driver(
    monkeypatch: pytest.MonkeyPatch, driver: Driver | str, extra: str
) -> None:
    monkeypatch.setattr(doctor, "driver", lambda: driver)
    _installed(monkeypatch, onnxruntime=None, onnxruntime_gpu=None)
    assert _found("onnxruntime") == Finding(
        "onnxruntime", "missing", "not installed", f'pip install "rx-edge[{extra}]"'
    )


def test_engines_without_cuda_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "driver", lambda: NEW)
    assert _found("gpu").detail.endswith("RTX 4090 (SM 8.9, 23.0 of 24.0 GiB free)")
    _installed(monkeypatch, onnxruntime="1.32.0", onnxruntime_gpu=None)
    assert _found("onnxruntime").status == "note"
    assert 'rx-edge[gpu]"' in _found("onnxruntime").fix
    llama = _found("llama.cpp")
    assert llama.status == "note"
    assert "-DCMAKE_CUDA_ARCHITECTURES=89-real" in llama.fix


def test_a_build_for_a_newer_cuda_than_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "driver", lambda: OLD)
    _installed(monkeypatch, onnxruntime=None, onnxruntime_gpu="1.31.1")
    monkeypatch.setattr(onnx_engine.engine(), "cuda_version", "13.0", raising=False)
    found = _found("onnxruntime")
    assert found.status == "broken"
    assert "CUDA 13.0, the driver 535.104.05 runs up to 12.2" in found.detail
    assert "gpu-cu12" in found.fix


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(gguf_engine, "engine", broken)
    found = _found("llama.cpp")
    assert found.status == "broken"
    assert "libgomp" in found.detail
    assert found.fix.startswith("pip install --force-reinstall")


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RX_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert _found("cache").status == "broken"


def test_telemetry_that_somebody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    assert _found("telemetry").fix == "unset HF_HUB_DISABLE_TELEMETRY"
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    assert _found("telemetry").status == "ok"


def test_the_command_prints_a_table() -> None:
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0, result.stdout
    assert "llama.cpp" in result.stdout
