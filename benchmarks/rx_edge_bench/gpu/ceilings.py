"""What the memory and the arithmetic units of this machine reach: the denominators.

Does not cover: what data sheets promise (`rx_edge_bench.projection`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rx_edge.machine import physical_cores
from rx_edge_bench.gpu.plan import Job
from rx_edge_bench.resources import read_bandwidth

COPY_BYTES = 4 * 2**30  # far more than any cache
MATRIX, SMALL_MATRIX = 8192, 512
ROUNDS = 20


def run(job: Job) -> dict[str, Any]:
    """Bytes per second of memory and operations per second of bfloat16 products."""
    if job.gpu:
        moved, how = copy_rate(job.device), "device copy, bytes read and written"
    else:
        threads = physical_cores()
        moved, how = read_bandwidth(threads), f"{threads} threads reading"
    rate = product_rate(job.device, MATRIX if job.gpu else SMALL_MATRIX)
    return {
        "bytes_per_second": moved,
        "bytes_how": how,
        "operations_per_second": rate,
        "operations_how": "bfloat16 matrix product",
        "line": f"{moved / 1e9:.1f} GB/s ({how}), {rate / 1e12:.2f} TFLOP/s bfloat16",
    }


def copy_rate(device: str, size: int = COPY_BYTES) -> float:
    """Bytes read and written per second by a copy within the device."""
    import torch

    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device)


def product_rate(device: str, n: int) -> float:
    """Operations per second of a bfloat16 product (n, n) x (n, n)."""
    import torch

    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    return 2.0 * n**3 / _fastest(lambda: a @ b, device)


def _fastest(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest round; the first ones warm up."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    taken = []
    for _ in range(ROUNDS + 3):
        wait()
        started = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - started)
    return min(taken[3:])
