"""Time the product's own stream: image files in, final texts out.

Every round drafts every study through `rx_edge.runtime.pipeline.draft`, so that studies take turns
and a slow minute of the machine falls on all of them; the session forgets its drafts in between, or
it would draft from memory. Medians and quartiles are over all drafts
after the warm-up; higher quantiles only where there are enough (`statistics.quantiles_allowed`).
The work done (tokens, passes, proposals) is recorded beside the time.

Does not cover: comparing two results (`comparison.py`), fresh processes (`cold_start.py`), what
each lever brings (`levers.py`), other engines (`peers.py`).
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rx_edge.config_io import to_mapping
from rx_edge.errors import UsageError
from rx_edge.machine import physical_cores
from rx_edge.runtime.pipeline import draft
from rx_edge.runtime.session import Session
from rx_edge.runtime.tuning import seconds_per_pass
from rx_edge.types import Report, Timings
from rx_edge_bench import resources
from rx_edge_bench.environment import environment, fingerprint
from rx_edge_bench.statistics import quantiles_allowed

SCHEMA = "rx-edge-latency/2"
STAGES = (
    "read", "prepare", "vision", "prefill", "decode", "detokenise", "time_to_first_token", "total",
)  # fmt: skip
SENTENCE_ENDS = (".", "!", "?")
LEAST = 3  # drafts, to tell a spread
Spread = dict[str, float]


@dataclass(frozen=True)
class Drafted:
    """One timed draft. `first_sentence`: seconds until a sentence had been shown, or the end."""

    study: int
    report: Report
    first_sentence: float


def measure(
    session: Session,
    studies: Sequence[Path],
    *,
    repeats: int = 10,
    warmup: int = 1,
    tick: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Draft every study `repeats` times.

    Returns:
        JSON-ready, schema `SCHEMA`; seconds, bytes and counts. No text and no file name.

    Raises:
        UsageError: fewer than `LEAST` drafts, of which no spread can be told.
    """
    if len(studies) * repeats < LEAST:
        raise UsageError(
            f"{len(studies)} studies x --repeats {repeats} are too few to tell a spread; "
            f"{LEAST} drafts are needed"
        )
    for number in range(warmup):
        timed(session, studies[number % len(studies)], 0)
    drafts: list[Drafted] = []
    meter, resident = resources.Energy(), []
    for _ in range(repeats):
        forget(session)
        for number, study in enumerate(studies):
            drafts.append(timed(session, study, number))
            resident.append(resources.resident_bytes())
            tick(len(drafts))
    joules = meter.joules()
    threads = session.generate.threads or physical_cores()
    weights = session.bundle.manifest.files[session.artifact.file].bytes
    return {
        "schema": SCHEMA,
        "bundle_sha256": session.bundle.digest,
        "model": session.bundle.manifest.name,
        "runs": list(session.notes),
        "runtime": to_mapping(session.runtime),
        "threads": session.generate.threads,
        "studies": len(studies),
        "repeats": repeats,
        "warmup": warmup,
        **summary(drafts),
        "memory": resources.memory(resident),
        "energy": {
            "joules_per_report": None if joules is None else joules / len(drafts),
            "source": meter.source,
        },
        "roofline": resources.roofline(
            weights, seconds_per_pass(session, 1), resources.read_bandwidth(threads)
        ),
        "fingerprint": fingerprint(),
        "environment": environment(),
    }


def summary(drafts: Sequence[Drafted]) -> dict[str, Any]:
    """Seconds per stage, decode speed, and the work done, over drafts."""
    timings = [d.report.timings for d in drafts]
    seconds = {stage: [getattr(t, stage) for t in timings] for stage in STAGES}
    seconds["time_to_first_sentence"] = [d.first_sentence for d in drafts]
    gaps = [gap for t in timings for gap in t.gaps]
    return {
        "seconds": {stage: spread(values) for stage, values in seconds.items()},
        "inter_token": {
            "gap": spread(gaps),
            "longest_gap": spread([max(t.gaps) for t in timings if t.gaps]),
            "per_token": spread([t.decode / t.new_tokens for t in timings if t.new_tokens]),
        },
        "decode_tokens_per_second": spread([_rate(t) for t in timings if t.decode > 0]),
        "work": {
            "prompt_tokens": _histogram(t.prompt_tokens for t in timings),
            "cached_tokens": _histogram(t.cached_tokens for t in timings),
            "new_tokens": _histogram(t.new_tokens for t in timings),
            "decode_passes": _histogram(t.decode_passes for t in timings),
            "drafted_tokens": sum(t.drafted_tokens for t in timings),
            "accepted": _histogram(a for t in timings for a in t.accepted),
            "tokens_per_pass": _tokens_per_pass(timings),
            "identical_drafts": _identical(drafts),
        },
    }


def timed(session: Session, study: Path, number: int) -> Drafted:
    """Consume the stream of one study."""
    started, sentence, text = time.perf_counter(), 0.0, ""
    stream = draft(session, study)
    while True:
        try:
            text += next(stream).text
        except StopIteration as end:
            report: Report = end.value
            return Drafted(number, report, sentence or time.perf_counter() - started)
        if not sentence and any(mark in text for mark in SENTENCE_ENDS):
            sentence = time.perf_counter() - started


def forget(session: Session) -> None:
    """Before a study is drafted again: its first draft would be the perfect proposal."""
    if session.drafter:
        session.drafter.forget()


def run_to_end(session: Session, study: Path) -> Report:
    """The report of one study."""
    return timed(session, study, 0).report


def spread(values: Sequence[float]) -> Spread:
    """Median, quartiles and the higher quantiles that so many values can carry."""
    if not values:
        return {"n": 0}
    names = {0.25: "q1", 0.5: "median", 0.75: "q3", 0.9: "p90", 0.99: "p99"}
    allowed = quantiles_allowed(len(values))
    found = np.quantile(values, allowed)
    return {
        "n": len(values),
        **{names[q]: float(v) for q, v in zip(allowed, found, strict=True)},
        "least": float(min(values)),
        "most": float(max(values)),
    }


def _rate(timings: Timings) -> float:
    return timings.new_tokens / timings.decode


def _tokens_per_pass(timings: Sequence[Timings]) -> float | None:
    """The first token of a draft comes with the prefill."""
    passes = sum(t.decode_passes for t in timings)
    tokens = sum(max(0, t.new_tokens - 1) for t in timings)
    return tokens / passes if passes else None


def _histogram(values: Iterable[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _identical(drafts: Sequence[Drafted]) -> bool:
    """Whether every study had the same tokens every time."""
    texts = {(d.study, d.report.token_ids) for d in drafts}
    return len(texts) == len({study for study, _ in texts})


def median(values: Sequence[float]) -> float:
    """The median of at least one value."""
    return float(statistics.median(values))
