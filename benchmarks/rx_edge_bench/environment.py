"""What a number was measured on, and the fingerprint that tells two machines apart.

No host name, no user, no path.

Does not cover: GPUs (driver, clocks), which join with the GPU backends.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from rx_edge.errors import RxEdgeError
from rx_edge.machine import cpu_model, physical_cores

PACKAGES = (
    "rx-edge",
    "numpy",
    "onnxruntime",
    "llama-cpp-python",
    "tokenizers",
    "pillow",
    "pydicom",
)
ENGINES = ("numpy", "onnxruntime", "llama-cpp-python", "tokenizers")  # they decide the speed


def environment() -> dict[str, Any]:
    """CPU, memory, operating system and versions as JSON-ready data."""
    return {
        "cpu": cpu_model(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "physical_cores_allowed": physical_cores(),
        "governor": _governor(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "llama_cpp": _llama_build(),
    }


def fingerprint() -> str:
    """Twelve hex digits that are equal where times may be compared.

    From the processor, the cores allowed, the kernel's major version, Python's minor version,
    and the engines with llama.cpp's build flags. rx-edge's own version is not in it: that is what
    one compares.
    """
    parts = {
        "cpu": cpu_model(),
        "cores": [len(os.sched_getaffinity(0)), physical_cores()],
        "system": [platform.system(), platform.release().partition(".")[0], platform.machine()],
        "python": list(platform.python_version_tuple()[:2]),
        "engines": {name: _version(name) for name in ENGINES},
        "llama_cpp": _llama_build(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _llama_build() -> str | None:
    """The instruction sets and options that llama.cpp was built with; None without it."""
    from rx_edge.backends.gguf_engine import engine

    try:
        text: str = engine().llama_print_system_info().decode()
    except (RxEdgeError, OSError, RuntimeError):  # a result without the engine is still one
        return None
    return text.strip(" |")


def _governor() -> str | None:
    """How the first allowed CPU sets its clock; None where the system does not say (most VMs)."""
    cpu = min(os.sched_getaffinity(0))
    try:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor")
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
