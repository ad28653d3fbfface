"""What this machine is, as far as speed and caches depend on it. No host name, no user.

Does not cover: GPUs (`rx_edge.backends`), the full record beside a measurement
(`rx_edge_bench.environment`).
"""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cache_dir() -> Path:
    """`RX_EDGE_CACHE`, or rx-edge under the user's cache directory (XDG)."""
    explicit = os.environ.get("RX_EDGE_CACHE")
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rx-edge"


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def physical_cores() -> int:
    """Physical cores this process may run on; hyper-threads only slow llama.cpp down."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else str(cpu))
    return len(cores)


def memory_free() -> int:
    """Bytes of memory that can be had without swapping; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = next(int(row.split()[1]) for row in lines if row.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        try:
            return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        except (ValueError, OSError, AttributeError):
            return 0
    return kilobytes * 1024
