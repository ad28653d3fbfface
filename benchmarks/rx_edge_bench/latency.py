"""Time the product's own stream: an image file in, the final text out.

Every repeat runs the whole path of `rx_edge.runtime.pipeline.draft`. The figures are medians with
quartiles over repeats after warm-up, together with what they were measured on; the work done
(tokens, passes) is recorded beside the time.

Does not cover: comparing two results, memory, energy, and other engines.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rx_edge.errors import UsageError
from rx_edge.runtime.pipeline import draft
from rx_edge.runtime.session import Session
from rx_edge.types import Report, Timings
from rx_edge_bench.environment import environment

SCHEMA = "rx-edge-latency/1"
STAGES = ("read", "prepare", "vision", "prefill", "decode", "time_to_first_token", "total")


def measure(
    session: Session,
    study: Path,
    *,
    repeats: int = 10,
    warmup: int = 1,
    tick: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Draft `study` repeatedly.

    Returns:
        JSON-ready: per stage median, first and third quartile in seconds; decode tokens per
        second; work counts; environment; bundle digest.

    Raises:
        UsageError: fewer than 3 repeats, of which no spread can be told.
    """
    if repeats < 3:
        raise UsageError(f"--repeats is {repeats}; at least 3 are needed to tell a spread")
    for _ in range(warmup):
        run_to_end(session, study)
    reports = []
    for number in range(repeats):
        reports.append(run_to_end(session, study))
        tick(number + 1)
    timings = [report.timings for report in reports]
    return {
        "schema": SCHEMA,
        "bundle_sha256": session.bundle.digest,
        "model": session.bundle.manifest.name,
        "runs": list(session.notes),
        "threads": session.generate.threads,
        "repeats": repeats,
        "warmup": warmup,
        "seconds": {stage: _spread([getattr(t, stage) for t in timings]) for stage in STAGES},
        "decode_tokens_per_second": _spread([_rate(t) for t in timings]),
        "work": {
            "prompt_tokens": timings[0].prompt_tokens,
            "new_tokens": timings[0].new_tokens,
            "decode_passes": timings[0].decode_passes,
            "identical_drafts": len({r.token_ids for r in reports}) == 1,
        },
        "environment": environment(),
    }


def run_to_end(session: Session, study: Path) -> Report:
    """Consume the stream of one study."""
    stream = draft(session, study)
    while True:
        try:
            next(stream)
        except StopIteration as end:
            report: Report = end.value
            return report


def _rate(timings: Timings) -> float:
    return timings.decode_passes / timings.decode if timings.decode > 0 else 0.0


def _spread(values: list[float]) -> dict[str, float]:
    first, median, third = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "q1": float(first), "q3": float(third)}
