"""From starting the process to the first token: what a person waits for who types `rx-edge report`.

Every run is a fresh process. "warm": the bundle's and Python's files are in the page cache.
"cold": the bundle's pages were dropped before (posix_fadvise), as after a restart; Python's own
files stay cached.

Does not cover: the drafts after the first token (`latency.py`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rx_edge.bundle import open_bundle
from rx_edge.errors import BackendError
from rx_edge_bench.environment import environment, fingerprint
from rx_edge_bench.latency import spread

SCHEMA = "rx-edge-cold-start/1"
MARK = b"AI DRAFT"  # `rx-edge report` prints the banner together with the first token


def measure(
    root: Path, study: Path, *, repeats: int = 10, tick: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """Start `rx-edge report` again and again.

    Returns:
        JSON-ready: seconds until the first token and until the process ended, warm and cold;
        seconds of `rx-edge --help`.

    Raises:
        BackendError: a process failed.
    """
    bundle = open_bundle(root)
    report = [sys.executable, "-m", "rx_edge.cli", "report", str(study), "--bundle", str(root)]
    seconds: dict[str, list[tuple[float, float]]] = {"warm": [], "cold": [], "help": []}
    _run(report)
    for number in range(repeats):
        seconds["help"].append(_run([sys.executable, "-m", "rx_edge.cli", "--help"]))
        seconds["warm"].append(_run(report))
        _drop(root, list(bundle.manifest.files))
        seconds["cold"].append(_run(report))
        tick(number + 1)
    return {
        "schema": SCHEMA,
        "bundle_sha256": bundle.digest,
        "model": bundle.manifest.name,
        "bundle_bytes": sum(entry.bytes for entry in bundle.manifest.files.values()),
        "repeats": repeats,
        "process_start_to_first_token": {
            name: spread([first for first, _ in seconds[name]]) for name in ("warm", "cold")
        },
        "process_start_to_end": {
            name: spread([end for _, end in seconds[name]]) for name in seconds
        },
        "fingerprint": fingerprint(),
        "environment": environment(),
    }


def _run(command: list[str]) -> tuple[float, float]:
    """Seconds until `MARK` is on standard output (or the end), and until the process ended."""
    started = time.perf_counter()
    environment_ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment_
    )
    assert process.stdout is not None
    seen, first = b"", 0.0
    while chunk := os.read(process.stdout.fileno(), 4096):
        seen += chunk
        if not first and MARK in seen:
            first = time.perf_counter() - started
    code = process.wait()
    process.stdout.close()
    if code != 0:
        raise BackendError(f"{' '.join(command[2:4])} ended with exit code {code}; run it by hand")
    ended = time.perf_counter() - started
    return first or ended, ended


def _drop(root: Path, names: list[str]) -> None:
    """Ask the system to forget the bundle's pages."""
    for name in names:
        descriptor = os.open(root / name, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
