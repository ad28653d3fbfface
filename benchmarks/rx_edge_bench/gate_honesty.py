"""Does the latency gate cry wolf, and does it sleep?

A/A runs compare a bundle with itself: every regression there is a false alarm. Planted runs slow
every engine call of one side down: a verdict "none" there is a miss. A planted
second call of the encoder must be caught by Tier 0 each time. Planted runs share side A with an
A/A run (three sides in turn), which saves a third of the time. As in the gate, a run that leaves a
doubt is given as many pairs again, and once more. A study of an hour may be stopped
after any run and continued.

Does not cover: slow drifts over days, and machines other than the one it runs on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from rx_edge.bundle import open_bundle
from rx_edge.errors import UsageError
from rx_edge_bench import block, gate, interleaved
from rx_edge_bench.comparison import STAGES, Comparison, compare, undecided
from rx_edge_bench.environment import environment, fingerprint
from rx_edge_bench.statistics import P_LIMIT, TOLERANCE

SCHEMA = "rx-edge-gate-honesty/1"
SLOWDOWN = 1.15
ENCODER_TRIES = 3  # counts are exact: once would do


def measure(
    bundle: Path,
    *,
    runs: int = 40,
    planted: int = 20,
    pairs: int = gate.PAIRS,
    repeats: int = block.REPEATS,
    slowdown: float = SLOWDOWN,
    options: Sequence[str] = (),
    earlier: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
    progress: Callable[[str, int, int, str], None] = lambda *_: None,
) -> dict[str, Any]:
    """Run the gate on itself.

    Args:
        runs: A/A runs; `planted` of them, the first ones, have a third, slower side.
        pairs: blocks a side of one run's first look.
        options: more arguments of every block.
        earlier: what a study with the same arguments found before it was stopped.
        keep: is given what was found so far, after every run.

    Returns:
        JSON-ready: every run's ratios and block medians, how many alarms were false and how many
        faults were caught, each with its 95 % interval; environment.

    Raises:
        UsageError: `earlier` is another study, or has as many runs as this one.
        BackendError, BundleError, VerificationError: the bundle does not run.
    """
    head = {
        "schema": SCHEMA,
        "bundle_sha256": open_bundle(bundle).digest,
        "rule": {
            "tolerance": TOLERANCE,
            "p": P_LIMIT,
            "blocks": pairs,
            "looks": gate.LOOKS,
            "another_look_above": TOLERANCE,  # also where B passes
            "repeats": repeats,
        },
        "slowdown": slowdown,
        "planted": planted,
        "options": list(options),
        "fingerprint": fingerprint(),
        "environment": environment(),
    }
    rows = _continued(head, earlier, runs)
    a = interleaved.Side(bundle, options=(f"--repeats={repeats}", *options))
    slow = replace(a, options=(*a.options, f"--slow={slowdown}"))
    for number in range(_done(rows), runs):
        sides = {"A": a, "B": a, **({"slow": slow} if number < planted else {})}
        rows += _rows(sides, pairs)
        keep({**head, **_shares(rows), "runs": rows})
        progress("gate runs", number + 1, runs, rows[-1]["verdict"])
    caught = share(_extra_encoder_calls(bundle), ENCODER_TRIES)
    return {**head, **_shares(rows), "extra_encoder_call_caught": caught, "runs": rows}


def _continued(
    head: Mapping[str, Any], earlier: Mapping[str, Any] | None, runs: int
) -> list[dict[str, Any]]:
    """The rows of the study that this one continues."""
    if earlier is None:
        return []
    for key in head:
        # the environment holds the load of the moment; the fingerprint is what must be equal
        if key != "environment" and earlier.get(key) != head[key]:
            raise UsageError(f"the file holds a study with another {key}; name another file")
    rows = list(earlier["runs"])
    if _done(rows) >= runs:
        raise UsageError(f"the file holds {_done(rows)} runs already; name another file")
    return rows


def _done(rows: Sequence[dict[str, Any]]) -> int:
    return sum(row["kind"] == "A/A" for row in rows)


def _shares(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    equal = [row["verdict"] for row in rows if row["kind"] == "A/A"]
    slower = [row["verdict"] for row in rows if row["kind"] == "planted"]
    return {
        "false_alarms": share(equal.count("regression"), len(equal)),
        "suspicious_without_cause": share(equal.count("suspicious"), len(equal)),
        "no_verdict_without_cause": share(equal.count("insufficient data"), len(equal)),
        "caught": share(slower.count("regression"), len(slower)),
        "suspicious_with_cause": share(slower.count("suspicious"), len(slower)),
        "no_verdict_with_cause": share(slower.count("insufficient data"), len(slower)),
        "missed": share(slower.count("none"), len(slower)),
    }


def share(hits: int, of: int) -> dict[str, Any]:
    """A share with its 95 % interval (Wilson), which is honest also for 0 of 40."""
    if not of:
        return {"hits": 0, "of": 0}
    z = 1.959964
    p, scale = hits / of, 1 + z * z / of
    centre = (p + z * z / (2 * of)) / scale
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of)) / scale
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return {"hits": hits, "of": of, "share": p, "low": round(low, 4), "high": round(high, 4)}


def count_with_two_encoder_calls(bundle: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What Tier 0 counts of the bundle as it is, and with every image encoded twice."""
    from rx_edge.runtime import pipeline
    from rx_edge.runtime.session import open_session

    once = pipeline.encode

    def twice(*arguments: Any) -> Any:
        once(*arguments)
        return once(*arguments)

    with open_session(bundle) as session:
        honest = block.count_work(session, block.first_canary(session))
    with open_session(bundle) as session, mock.patch.object(pipeline, "encode", twice):
        wasteful = block.count_work(session, block.first_canary(session))
    return honest, wasteful


def _extra_encoder_calls(bundle: Path) -> int:
    caught = 0
    for _ in range(ENCODER_TRIES):
        honest, wasteful = count_with_two_encoder_calls(bundle)
        caught += gate.check_work(wasteful, {"counted": honest}).verdict == "regression"
    return caught


def _in_turn(sides: dict[str, interleaved.Side], pairs: int) -> dict[str, list[dict[str, Any]]]:
    """Every side once, then once in reverse, and so on."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for pair in range(pairs):
        for name in reversed(sides) if pair % 2 else sides:
            found[name].append(interleaved.run_block(sides[name], name))
    return found


def _rows(sides: dict[str, interleaved.Side], pairs: int) -> list[dict[str, Any]]:
    """Every side beside A, judged as the gate judges."""
    blocks = _in_turn(sides, pairs)
    doubtful = [other for other in sides if other != "A"]
    for _ in range(gate.LOOKS - 1):
        doubtful = [other for other in doubtful if undecided(_compared(blocks, other))]
        if not doubtful:
            break
        more = _in_turn({name: sides[name] for name in ("A", *doubtful)}, pairs)
        for name, found in more.items():
            blocks[name] += found
    return [_row(blocks, other) for other in sides if other != "A"]


def _compared(blocks: dict[str, list[dict[str, Any]]], other: str) -> Comparison:
    pairs = len(blocks[other])  # A may have more, for another side
    one, two = (
        {"run": "", "fingerprint": "", "blocks": blocks[name][:pairs], "environment": {}}
        for name in ("A", other)
    )
    return compare(one, two)


def _row(blocks: dict[str, list[dict[str, Any]]], other: str) -> dict[str, Any]:
    found = _compared(blocks, other)
    return {
        "kind": "A/A" if other == "B" else "planted",
        **found.to_json(),
        "medians": {
            side: {
                stage: [round(b["median"][stage], 6) for b in blocks[name][: len(blocks[other])]]
                for stage in STAGES
                if stage in blocks[name][0]["median"]
            }
            for side, name in (("A", "A"), ("B", other))
        },
    }
