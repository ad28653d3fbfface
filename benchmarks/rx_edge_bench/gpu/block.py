"""One step of the measurement of a GPU machine, in a process of its own.

    python -P -m rx_edge_bench.gpu.block STEP < JOB.json

Writes one JSON line; a failure is one line on stderr and exit code 1.

Does not cover: which step is next, and for how long (`plan.py`).
"""

from __future__ import annotations

import ctypes
import importlib
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rx_edge.errors import RxEdgeError
from rx_edge.nvidia import Driver, driver
from rx_edge_bench.environment import environment, fingerprint
from rx_edge_bench.gpu.plan import STEPS, Job
from rx_edge_bench.resources import peak_bytes

_PR_SET_PDEATHSIG = 1  # prctl.h


def machine() -> dict[str, Any]:
    """What was measured on."""
    found = driver()
    return {
        "driver": asdict(found) if isinstance(found, Driver) else None,
        "fingerprint": fingerprint(),
        "environment": environment(),
    }


def step(name: str, job: Job) -> dict[str, Any]:
    """The result of the step `name` and the peak memory of this process."""
    (found,) = (s for s in STEPS if s.name == name)
    module, _, function = found.function.partition(":")
    call = getattr(importlib.import_module(f"rx_edge_bench.gpu.{module}"), function)
    result: dict[str, Any] = call(job, found.argument) if found.argument else call(job)
    return {**result, "peak_rss_bytes": peak_bytes()}


def main(arguments: Sequence[str]) -> int:
    """Write one JSON line; 0, or a line on stderr and 1."""
    if sys.platform == "linux":  # who kills the measurement kills its step
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    output, sys.stdout = sys.stdout, sys.stderr  # libraries print
    (name,), job = arguments, Job.from_json(sys.stdin.read())
    try:
        result = machine() if name == "machine" else step(name, job)
    except RxEdgeError as error:
        sys.stderr.write(f"rx-edge: {error}\n")
        return 1
    output.write(f"\n{json.dumps(result)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
