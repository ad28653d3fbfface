"""What a run takes besides time: memory, energy, and how close it comes to the memory's speed.

Does not cover: GPUs (NVML), which join with the GPU backends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

RAPL = Path("/sys/class/powercap")
BUFFER_BYTES = 256 * 2**20  # per thread: far more than any last-level cache
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Resident set of this process now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE
    except (OSError, IndexError, ValueError):
        return 0


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory(resident: Sequence[int]) -> dict[str, Any]:
    """Peak, and whether the resident set grows.

    Args:
        resident: bytes after each draft, in order.

    Returns:
        `growth_bytes_per_report`: slope of a least-squares line through the second half, when
        caches have filled; None below 20 drafts.
    """
    half = np.asarray(resident[len(resident) // 2 :], np.float64)
    slope = float(np.polyfit(np.arange(len(half)), half, 1)[0]) if len(half) >= 10 else None
    return {
        "peak_rss_bytes": max(peak_bytes(), *resident),  # two counters of the kernel, not in step
        "rss_bytes_first": resident[0],
        "rss_bytes_last": resident[-1],
        "growth_bytes_per_report": slope,
        "vram_bytes": None,
    }


class Energy:
    """Joules of the processor package since this object was made (RAPL)."""

    def __init__(self) -> None:
        self._domains = [d for d in sorted(RAPL.glob("intel-rapl:?")) if _read(d) is not None]
        self._start = [_read(d) for d in self._domains]
        self.source = (
            f"RAPL, {len(self._domains)} packages" if self._domains else
            "none: this machine offers no readable energy counter"
        )  # fmt: skip

    def joules(self) -> float | None:
        """None where there is no counter, or one has overflowed."""
        spent = 0
        for domain, start in zip(self._domains, self._start, strict=True):
            now = _read(domain)
            if start is None or now is None or now < start:
                return None
            spent += now - start
        return spent / 1e6 if self._domains else None


def _read(domain: Path) -> int | None:
    try:
        return int((domain / "energy_uj").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def read_bandwidth(threads: int, repeats: int = 5) -> float:
    """Bytes per second that `threads` threads read from memory: the best of `repeats` rounds.

    Each thread multiplies a buffer with itself (BLAS sdot), which reads it once and computes less
    than any processor can while waiting.
    """
    buffers = [np.ones(BUFFER_BYTES // 4, np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(lambda b: float(np.dot(b, b)), buffers))
            best = max(best, threads * BUFFER_BYTES / (time.perf_counter() - started))
    return best


def roofline(weight_bytes: int, seconds_per_pass: float, bandwidth: float) -> dict[str, float]:
    """How much of the memory's speed a pass over one token reaches: it must read every weight."""
    return {
        "weight_bytes": weight_bytes,
        "seconds_per_pass": seconds_per_pass,
        "read_bytes_per_second": bandwidth,
        "share": weight_bytes / seconds_per_pass / bandwidth,
    }
