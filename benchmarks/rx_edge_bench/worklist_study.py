"""Many studies at once against one after the other: the same texts, sooner?

Rounds take turns: one by one (with and without proposals), and one worker per core with each
number of slots (1: with proposals). The texts of all rounds are compared; a study whose tokens
differ is listed by its number.

Does not cover: several machines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rx_edge.bundle import open_bundle
from rx_edge.config import RuntimeConfig
from rx_edge.errors import UsageError
from rx_edge.runtime.session import Session, open_checked
from rx_edge.runtime.worklist import SLOTS, draft_all
from rx_edge_bench.environment import environment, fingerprint
from rx_edge_bench.latency import forget, run_to_end, spread

SCHEMA = "rx-edge-worklist/2"
LEAST = 4  # studies
SLOT_COUNTS = (1, SLOTS)
Tokens = list[tuple[int, ...]]


def measure(
    root: Path,
    studies: Sequence[Path],
    *,
    vision: str | None = None,
    language: str | None = None,
    slots: Sequence[int] = SLOT_COUNTS,
    repeats: int = 3,
    tick: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Time every way of drafting all studies.

    Args:
        vision, language: artefacts, as in `open_session`.

    Returns:
        JSON-ready, schema `SCHEMA`: seconds for all studies per way, its speed-up over one by one
        (the product's default: with proposals), and the studies with other tokens.

    Raises:
        UsageError: fewer than `LEAST` studies.
    """
    if len(studies) < LEAST:
        raise UsageError(f"{len(studies)} studies are too few to keep slots busy; name {LEAST}")
    bundle = open_bundle(root)
    plain = replace(RuntimeConfig(), drafts=False)
    opened = partial(open_checked, bundle, vision=vision, language=language)
    with opened() as session, opened(runtime=plain) as slow:
        ways: dict[str, Callable[[], Tokens]] = {
            "one by one": partial(_one_by_one, session, studies),
            "one by one, drafts off": partial(_one_by_one, slow, studies),
        }
        for count in slots:
            ways[f"workers of {count} slots"] = partial(_together, session, studies, slots=count)
        run_to_end(session, studies[0])
        run_to_end(slow, studies[0])
        seconds, tokens = _take_turns(ways, repeats, tick)
        notes = list(session.notes)
    base = seconds["one by one"]
    return {
        "schema": SCHEMA,
        "bundle_sha256": bundle.digest,
        "model": bundle.manifest.name,
        "runs": notes,
        "studies": len(studies),
        "repeats": repeats,
        "ways": {
            name: {
                "seconds": spread(taken),
                "speed_up": spread([b / s for b, s in zip(base, taken, strict=True)]),
                "reports_per_second": len(studies) / spread(taken)["median"],
                "changed_drafts": [
                    number
                    for number, (one, two) in enumerate(
                        zip(tokens["one by one"], tokens[name], strict=True)
                    )
                    if one != two
                ],
            }
            for name, taken in seconds.items()
        },
        "fingerprint": fingerprint(),
        "environment": environment(),
    }


def _take_turns(
    ways: dict[str, Callable[[], Tokens]], repeats: int, tick: Callable[[int, int], None]
) -> tuple[dict[str, list[float]], dict[str, Tokens]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, Tokens] = {}
    for number in range(repeats):
        names = list(ways)
        names = names[number % len(names) :] + names[: number % len(names)]
        for done, name in enumerate(names, start=1):
            started = time.perf_counter()
            tokens[name] = ways[name]()
            seconds[name].append(time.perf_counter() - started)
            tick(number * len(names) + done, repeats * len(names))
    return seconds, tokens


def _one_by_one(session: Session, studies: Sequence[Path]) -> Tokens:
    forget(session)
    return [run_to_end(session, study).token_ids for study in studies]


def _together(session: Session, studies: Sequence[Path], slots: int) -> Tokens:
    tokens: Tokens = []
    for result in draft_all(session, studies, slots=slots):
        if result.error:
            raise result.error
        tokens.append(result.report.token_ids if result.report else ())
    return tokens
