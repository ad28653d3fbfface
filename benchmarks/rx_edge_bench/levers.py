"""What each lever of speed brings: all on, each one off, taking turns in one run.

A lever's ratio is seconds without it / seconds with all, study by study; its interval comes from a
bootstrap over studies. The texts are compared as well: a lever may not change them. Where one does,
the study is listed by number, with how undecided the model was.

Does not cover: overlap and slots, which need many studies (`worklist_study.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rx_edge.bundle import open_bundle
from rx_edge.config import RuntimeConfig
from rx_edge.errors import UsageError
from rx_edge.prompting import layout
from rx_edge.runtime.pipeline import open_study
from rx_edge.runtime.session import Session, open_checked
from rx_edge_bench.environment import environment, fingerprint
from rx_edge_bench.latency import Drafted, forget, median, summary, timed
from rx_edge_bench.statistics import RESAMPLES, SEED

SCHEMA = "rx-edge-levers/1"
ALL = "all on"
OFF = ("drafts", "prefix_cache", "fused_prefill")
STAGES = ("total", "time_to_first_token", "prefill", "decode")
Options = Mapping[str, Any]


def measure(
    root: Path,
    studies: Sequence[Path],
    *,
    repeats: int = 3,
    language: str | None = None,
    off: Sequence[str] = OFF,
    without: str | None = None,
    tick: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Time every study with every setting.

    Args:
        off: the levers that are switched off, each alone.
        without: another language artefact (e.g. "gguf:F16"): what quantisation brings.

    Returns:
        JSON-ready, schema `SCHEMA`.
    """
    unknown = [name for name in off if name not in OFF]
    if unknown:
        raise UsageError(f"lever {unknown[0]!r} is unknown; there are {', '.join(OFF)}")
    bundle = open_bundle(root)
    settings: dict[str, Options] = {ALL: {}}
    for name in off:
        without_it: dict[str, Any] = {name: False}
        settings[f"{name} off"] = {"runtime": replace(RuntimeConfig(), **without_it)}
    if without:
        settings[f"{bundle.language(language).name} -> {without}"] = {"language": without}
    drafts: dict[str, list[Drafted]] = {name: [] for name in settings}
    with ExitStack() as stack:
        sessions = {
            name: stack.enter_context(open_checked(bundle, **{"language": language, **options}))
            for name, options in settings.items()
        }
        for session in sessions.values():
            timed(session, studies[0], 0)
        _take_turns(sessions, studies, repeats, drafts, tick)
        notes = list(sessions[ALL].notes)
        changes = {
            name: [
                difference(sessions[ALL], studies, *pair) for pair in _changed(drafts[ALL], found)
            ]
            for name, found in drafts.items()
        }
    return {
        "schema": SCHEMA,
        "bundle_sha256": bundle.digest,
        "model": bundle.manifest.name,
        "runs": notes,
        "studies": len(studies),
        "repeats": repeats,
        "settings": {
            name: {
                **summary(found),
                "against_all_on": {stage: ratio(drafts[ALL], found, stage) for stage in STAGES},
                "changed_drafts": changes[name],
            }
            for name, found in drafts.items()
        },
        "fingerprint": fingerprint(),
        "environment": environment(),
    }


def ratio(base: Sequence[Drafted], other: Sequence[Drafted], stage: str) -> dict[str, float]:
    """Seconds of `other` / seconds of `base`: median over studies and its 95 % interval."""
    ones, twos = _by_study(base, stage), _by_study(other, stage)
    logs = np.log([twos[study] / ones[study] for study in ones])
    drawn = np.random.default_rng(SEED).integers(0, len(logs), (RESAMPLES, len(logs)))
    low, high = np.quantile(np.median(logs[drawn], axis=1), [0.025, 0.975])
    return {
        "ratio": float(np.exp(np.median(logs))), "low": float(np.exp(low)),
        "high": float(np.exp(high)),
    }  # fmt: skip


def _take_turns(
    sessions: Mapping[str, Session],
    studies: Sequence[Path],
    repeats: int,
    drafts: dict[str, list[Drafted]],
    tick: Callable[[int, int], None],
) -> None:
    """Every setting drafts a study before the next study; who begins changes every time."""
    names, done = list(sessions), 0
    for _ in range(repeats):
        for session in sessions.values():
            forget(session)
        for number, study in enumerate(studies):
            for name in names[done % len(names) :] + names[: done % len(names)]:
                drafts[name].append(timed(sessions[name], study, number))
            done += 1
            tick(done, repeats * len(studies))


def _by_study(drafts: Sequence[Drafted], stage: str) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for drafted in drafts:
        found.setdefault(drafted.study, []).append(getattr(drafted.report.timings, stage))
    return {study: max(median(values), 1e-9) for study, values in found.items()}


def _changed(base: Sequence[Drafted], other: Sequence[Drafted]) -> list[tuple[Drafted, Drafted]]:
    """The first drafts of every study whose tokens differ."""
    first = {d.study: d for d in reversed(base)}
    found = {d.study: (first[d.study], d) for d in reversed(other)
             if d.report.token_ids != first[d.study].report.token_ids}  # fmt: skip
    return [found[study] for study in sorted(found)]


def difference(
    session: Session, studies: Sequence[Path], one: Drafted, two: Drafted
) -> dict[str, float]:
    """Where two drafts part, and by how many logits the model preferred its token there."""
    ours, theirs = one.report.token_ids, two.report.token_ids
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    soft = session.vision.encode(open_study(session, studies[one.study]).images.pixels)[0]
    session.language.rewind(0)
    prompt = layout(session.prompt, soft)
    logits = session.language.prefill([*prompt, np.asarray(ours[:at], np.int32)])
    second, best = np.partition(logits, -2)[-2:]
    return {"study": one.study, "first_difference": at, "margin": float(best - second)}
