"""What this machine can run, and what stands in the way, each with the command that helps.

Every check looks at the real thing: the driver's library, installed distributions, engines that
are loaded. Nothing is changed and nothing leaves the machine.

Does not cover: a bundle (`rx-edge verify`), speed (`rx-edge tune`, `rx-edge bench`).
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rx_edge.backends import gguf_engine, onnx_engine, registry
from rx_edge.errors import RxEdgeError
from rx_edge.machine import cache_dir, cpu_model, memory_free, physical_cores
from rx_edge.nvidia import Driver, driver

Status = Literal["ok", "note", "missing", "broken"]
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # both install the module `onnxruntime`
BUILD_CUDA = (
    'CMAKE_ARGS="-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES={}-real" pip install '
    "--force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python=={}"
)
_GIB = 2**30
_WANTED = 10 * _GIB  # free space under the cache: a 7B model and its engine
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "i8mm")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        status: "ok"; "note": works, but not as well as it could; "missing": not installed;
            "broken": installed and cannot work.
        fix: the command to run, or "".
    """

    subject: str
    status: Status
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """Everything, from the machine up to the backends."""
    found = driver()
    return [
        *_machine(),
        _gpus(found),
        *_onnxruntime(found),
        *_llama_cpp(found),
        *_torch(found),
        *_backends(),
        _cache(),
        _telemetry(),
    ]


def _machine() -> Iterator[Finding]:
    flags = _cpu_flags()
    known = ", ".join(name for name in _INSTRUCTIONS if name in flags) or "unknown instructions"
    yield Finding("processor", "ok", f"{cpu_model()}, {physical_cores()} physical cores, {known}")
    yield Finding("memory", "ok", f"{memory_free() / _GIB:.1f} GiB free")


def _gpus(found: Driver | str) -> Finding:
    if isinstance(found, str):
        return Finding("gpu", "note", f"{found}; everything runs on the processor")
    names = "; ".join(
        f"{gpu.name} (SM {gpu.compute_capability[0]}.{gpu.compute_capability[1]}, "
        f"{gpu.memory_free / _GIB:.1f} of {gpu.memory / _GIB:.1f} GiB free)"
        for gpu in found.gpus
    )
    detail = f"driver {found.version}, CUDA up to {found.cuda[0]}.{found.cuda[1]}: {names or '-'}"
    if not found.gpus:
        return Finding("gpu", "note", f"{detail}; no device is visible (CUDA_VISIBLE_DEVICES?)")
    return Finding("gpu", "ok", detail)


def _onnxruntime(found: Driver | str) -> Iterator[Finding]:
    installed = {name: version for name in RUNTIMES if (version := _version(name))}
    extra = _gpu_extra(found)
    if len(installed) > 1:
        both = " and ".join(f"{name} {version}" for name, version in installed.items())
        yield Finding(
            "onnxruntime", "broken", f"{both} are installed and overwrite each other's files",
            f'pip uninstall -y {" ".join(RUNTIMES)} && pip install "rx-edge[{extra}]"',
        )  # fmt: skip
        return
    if not installed:
        yield Finding("onnxruntime", "missing", "not installed", f'pip install "rx-edge[{extra}]"')
        return
    (name, version), reason = next(iter(installed.items())), onnx_engine.unavailable()
    if reason:
        yield Finding("onnxruntime", "broken", f"{name} {version}: {reason}")
    elif name == "onnxruntime" and extra != "cpu":
        yield Finding(
            "onnxruntime", "note", f"{version} runs on the processor only, beside a GPU",
            f'pip uninstall -y onnxruntime && pip install "rx-edge[{extra}]"',
        )  # fmt: skip
    else:
        yield _provider(name, version, found)


def _provider(name: str, version: str, found: Driver | str) -> Finding:
    """Whether the installed build can use the GPU that is here."""
    engine = onnx_engine.engine()
    detail = f"{name} {version}: {', '.join(engine.get_available_providers())}"
    built = str(getattr(engine, "cuda_version", "") or "")
    if not built or isinstance(found, str):
        return Finding("onnxruntime", "ok", detail)
    if int(built.partition(".")[0]) > found.cuda[0]:
        return Finding(
            "onnxruntime", "broken",
            f"{name} {version} is built for CUDA {built}, the driver {found.version} runs up to "
            f"{found.cuda[0]}.{found.cuda[1]}: update the driver, or take the CUDA 12 build",
            'pip uninstall -y onnxruntime-gpu && pip install "rx-edge[gpu-cu12]"',
        )  # fmt: skip
    return Finding("onnxruntime", "ok", f"{detail} (CUDA {built})")


def _gpu_extra(found: Driver | str) -> str:
    """The extra that fits this machine's driver."""
    if isinstance(found, str) or not found.gpus:
        return "cpu"
    return "gpu" if found.cuda[0] >= 13 else "gpu-cu12"


def _llama_cpp(found: Driver | str) -> Iterator[Finding]:
    version = _version("llama-cpp-python")
    try:
        api = gguf_engine.engine()
    except (RxEdgeError, OSError, RuntimeError) as error:
        yield Finding(
            "llama.cpp", "broken" if version else "missing", str(error),
            "pip install --force-reinstall --no-cache-dir llama-cpp-python",
        )  # fmt: skip
        return
    built = api.llama_print_system_info().decode().strip(" |")
    offloads = bool(api.llama_supports_gpu_offload())
    if not offloads and not isinstance(found, str) and found.gpus:
        architecture = "{}{}".format(*found.gpus[0].compute_capability)
        yield Finding(
            "llama.cpp", "note", f"{version} is built without CUDA, beside a GPU ({built})",
            BUILD_CUDA.format(architecture, version),
        )  # fmt: skip
        return
    where = "GPU and processor" if offloads else "processor"
    yield Finding("llama.cpp", "ok", f"{version}, {where}: {built}")


def _torch(found: Driver | str) -> Iterator[Finding]:
    """Only for training and exporting; looked up, not imported."""
    version = _version("torch")
    if version is None:
        yield Finding(
            "torch", "note", "not installed: only training and exporting need it",
            'pip install "rx-edge[train]"',
        )  # fmt: skip
    elif version.endswith("+cpu") and not isinstance(found, str) and found.gpus:
        yield Finding("torch", "note", f"{version} trains on the processor only, beside a GPU")
    else:
        yield Finding("torch", "ok", version)


def _backends() -> Iterator[Finding]:
    for name, reason in registry.describe().items():
        missing = "is not installed" in (reason or "")
        status: Status = "ok" if reason is None else "missing" if missing else "note"
        yield Finding(f"backend {name}", status, reason or "usable here")


def _cache() -> Finding:
    path = cache_dir()
    present = next(p for p in (path, *path.parents) if p.exists())
    if not os.access(present, os.W_OK):
        return Finding(
            "cache", "broken", f"{str(path)!r} cannot be written",
            "export RX_EDGE_CACHE=a directory that can be written",
        )  # fmt: skip
    free = shutil.disk_usage(present).free
    status: Status = "ok" if free >= _WANTED else "note"
    return Finding("cache", status, f"{str(path)!r}, {free / _GIB:.0f} GiB free")


def _telemetry() -> Finding:
    asked = [name for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK") if _is_off(name)]
    if asked:
        return Finding(
            "telemetry", "note", f"this environment asks Hugging Face for telemetry: {asked[0]}=0",
            f"unset {asked[0]}",
        )  # fmt: skip
    return Finding(
        "telemetry", "ok",
        "rx-edge has none; that of ONNX Runtime and Hugging Face is switched off on import",
    )  # fmt: skip


def _is_off(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("0", "false", "no", "off")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {platform.machine()}
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return set(next(lines, "").partition(":")[2].split())
