"""One block: a fresh process that drafts one study several times and says how long and how much.

    python -P .../rx_edge_bench/block.py BUNDLE [--image FILE] [--repeats N] [--json FILE]

The first two drafts are counted, not timed (they are the warm-up): `first` is what a new session
pays, `next` what every further study pays. Counting wraps the session's two engines and knows only
`encode`, `prefill` and `step`; the clock is hidden from the drafter meanwhile. Total and time to
first token are taken from outside the stream, so that no version of rx-edge can redefine them; the
other stages are the runtime's own.

This file runs against whatever rx-edge the interpreter finds, also an older one: it imports only
`open_session` and `draft`, and nothing of `rx_edge_bench`.

Does not cover: comparing blocks (`comparison.py`), starting them in turn (`interleaved.py`).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from rx_edge.runtime.drafting import Drafter
    from rx_edge.runtime.session import Session
    from rx_edge.types import Report

SCHEMA = "rx-edge-block/1"
COUNTS = (
    "encoder_calls", "encoder_images", "prefill_calls", "prefill_tokens", "decode_passes",
    "decode_tokens", "new_tokens", "weight_bytes", "logit_bytes",
)  # fmt: skip
PACKAGES = ("rx-edge", "llama-cpp-python", "onnxruntime", "numpy")  # of this interpreter
REPEATS = 3
FLOAT32 = 4  # bytes of a logit


class Delegating:
    """Everything but what a subclass defines is the wrapped engine's."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class CountingVision(Delegating):
    """A `VisionBackend` that counts its calls and images in `counts`."""

    def __init__(self, engine: Any, counts: dict[str, int]) -> None:
        super().__init__(engine)
        self._counts = counts

    def encode(self, images: Any) -> Any:
        """Float32 (B, 3, S, S) -> (B, N, D), counted."""
        self._counts["encoder_calls"] += 1
        self._counts["encoder_images"] += len(images)
        return self._engine.encode(images)


class CountingLanguage(Delegating):
    """A `LanguageBackend` that counts calls, tokens fed and bytes of logits read in `counts`."""

    def __init__(self, engine: Any, counts: dict[str, int]) -> None:
        super().__init__(engine)
        self._counts = counts

    def prefill(self, segments: Any) -> Any:
        """Segments -> logits (V,), counted."""
        self._counts["prefill_calls"] += 1
        self._counts["prefill_tokens"] += sum(map(len, segments))
        return self._read(self._engine.prefill(segments))

    def step(self, ids: Any) -> Any:
        """Ids (T,) -> logits (T, V), counted."""
        self._counts["decode_passes"] += 1
        self._counts["decode_tokens"] += len(ids)
        return self._read(self._engine.step(ids))

    def _read(self, logits: Any) -> Any:
        self._counts["logit_bytes"] += FLOAT32 * int(logits.size)
        return logits


class Timeless(Delegating):
    """A drafter that is not told how long a pass took.

    It chooses its widths by the seconds that it measures, so that the same draft may take 48 or 52
    tokens; without them it keeps to its prior, and counts are exact on every machine.
    """

    def passed(self, width: int, seconds: float) -> None:
        """Nothing is learnt from the clock."""


class Slowed(Delegating):
    """A planted fault: every call of the engine takes `factor` times as long. For studies only."""

    def __init__(self, engine: Any, factor: float) -> None:
        super().__init__(engine)
        self._factor = factor

    def encode(self, images: Any) -> Any:
        """As the engine's, slower."""
        return self._slowly(self._engine.encode, images)

    def prefill(self, segments: Any) -> Any:
        """As the engine's, slower."""
        return self._slowly(self._engine.prefill, segments)

    def step(self, ids: Any) -> Any:
        """As the engine's, slower."""
        return self._slowly(self._engine.step, ids)

    def _slowly(self, call: Any, argument: Any) -> Any:
        started = time.perf_counter()
        result = call(argument)
        until = started + (time.perf_counter() - started) * self._factor
        while time.perf_counter() < until:  # sleep() overshoots by more than a tiny step lasts
            pass
        return result


def count_work(session: Session, study: Path) -> dict[str, Any]:
    """Draft `study` twice and count what the engines were asked to do.

    Returns:
        JSON-ready: what was drafted with what, `text_sha256`, and under `work` the counts of the
        `first` and the `next` draft by the names of `COUNTS`; weight_bytes are the files of both
        artefacts.

    Raises:
        VerificationError: the two drafts differ.
    """
    work, reports = {}, []
    vision, language = session.vision, session.language
    drafter: Any = getattr(session, "drafter", None)  # older versions have none
    try:
        if drafter is not None:
            unmeasured = copy.copy(drafter)  # without the profile of `rx-edge tune` too
            unmeasured.costs = type(drafter.costs)()
            session.drafter = cast("Drafter", Timeless(unmeasured))
        for name in ("first", "next"):
            counts = dict.fromkeys(COUNTS, 0)
            session.vision = CountingVision(vision, counts)
            session.language = CountingLanguage(language, counts)
            reports.append(_draft(session, study)[0])
            counts["new_tokens"] = len(reports[-1].token_ids)
            counts["weight_bytes"] = _weight_bytes(session)
            work[name] = counts
    finally:
        session.vision, session.language = vision, language
        if drafter is not None:
            session.drafter = drafter
    return {**_identity(session, reports[0]), "text_sha256": _one_text(reports), "work": work}


def measure(session: Session, study: Path, *, repeats: int = REPEATS) -> dict[str, Any]:
    """Count the work of two drafts, then time `repeats` more.

    Returns:
        JSON-ready: what ran, the text's hash, work, and per stage the seconds of every repeat and
        their median. No text, no file name.

    Raises:
        UsageError: fewer than one repeat.
        VerificationError: not every draft has the same text.
    """
    from rx_edge.errors import UsageError

    if repeats < 1:
        raise UsageError(f"--repeats is {repeats}; a block times at least one draft")
    counted = count_work(session, study)
    reports, seconds = [], []
    for _ in range(repeats):
        report, times = _draft(session, study)
        reports.append(report)
        seconds.append(times)
    if _one_text(reports) != counted["text_sha256"]:
        raise _two_texts()
    stages = {name: [times[name] for times in seconds] for name in seconds[0]}
    return {
        "schema": SCHEMA,
        "versions": {name: _version(name) for name in PACKAGES},
        **counted,
        "seconds": stages,
        "median": {name: statistics.median(values) for name, values in stages.items()},
    }


def _identity(session: Session, report: Report) -> dict[str, Any]:
    """What was drafted with what: two results are comparable only where these agree."""
    return {
        "model": session.bundle.manifest.name,
        "vision": session.vision_artifact.name,
        "language": session.artifact.name,
        "pixel_sha256": report.provenance["pixel_sha256"],
        "max_new_tokens": session.generate.max_new_tokens,
    }


def first_canary(session: Session) -> Path:
    """The study that every bundle carries."""
    return session.bundle.path(session.bundle.manifest.canaries[0])


def _draft(session: Session, study: Path) -> tuple[Report, dict[str, float]]:
    from rx_edge.runtime.pipeline import draft

    forget = getattr(session.drafter, "forget", None) if hasattr(session, "drafter") else None
    if forget:
        forget()  # the same study again: it must not be drafted from memory
    stream = draft(session, study)
    started, first = time.perf_counter(), 0.0
    while True:
        try:
            next(stream)
            first = first or time.perf_counter() - started
        except StopIteration as end:
            total = time.perf_counter() - started
            report: Report = end.value
            break
    timings = report.timings
    seconds = {
        "total": total,
        "time_to_first_token": first or total,  # a draft may be empty
        "vision": timings.vision,
        "prefill": timings.prefill,
    }
    if report.token_ids:
        seconds["decode_per_token"] = timings.decode / len(report.token_ids)
    return report, seconds


def _weight_bytes(session: Session) -> int:
    files = session.bundle.manifest.files
    names = set()
    for artifact in (session.vision_artifact, session.artifact):
        names |= {artifact.file, f"{artifact.file}.data"}  # ONNX may keep its weights beside it
        names.add(Path(artifact.file).with_suffix(".embed.safetensors").as_posix())
    return sum(files[name].bytes for name in names & files.keys())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _one_text(reports: Iterable[Report]) -> str:
    texts = {" ".join(map(str, report.token_ids)) for report in reports}
    if len(texts) != 1:
        raise _two_texts()
    return hashlib.sha256(texts.pop().encode()).hexdigest()


def _two_texts() -> Exception:
    from rx_edge.errors import VerificationError

    return VerificationError(
        "the same study gave two different drafts in one session; greedy decoding must repeat "
        "itself: run `rx-edge verify BUNDLE`"
    )


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="rx_edge_bench.block", description="One block of drafts.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--image", type=Path, help="study; default: the bundle's first canary")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--vision")
    parser.add_argument("--llm", dest="language")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--off", action="append", help="lever of RuntimeConfig, e.g. drafts")
    parser.add_argument("--slow", type=float, default=1.0, help="plant a slowdown, e.g. 1.15")
    parser.add_argument("--json", default="-", help="file to write; -: standard output")
    return parser.parse_args(arguments)


def _without(levers: Sequence[str]) -> Any:
    """A `RuntimeConfig` with these levers switched off."""
    from rx_edge.config import RuntimeConfig
    from rx_edge.config_io import from_mapping

    return from_mapping(RuntimeConfig, dict.fromkeys(levers, False), where="--off")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one JSON document; 0, or a line on stderr and the exit code of `rx-edge`."""
    from rx_edge.errors import BundleError, RxEdgeError, UsageError, VerificationError
    from rx_edge.runtime.session import open_session

    asked = _arguments(arguments)
    names = ("vision", "language", "threads", "max_new_tokens")
    options: dict[str, Any] = {n: getattr(asked, n) for n in names if getattr(asked, n) is not None}
    try:
        if asked.off:
            options["runtime"] = _without(asked.off)
        with open_session(asked.bundle, **options) as session:
            if asked.slow != 1.0:
                session.vision = Slowed(session.vision, asked.slow)
                session.language = Slowed(session.language, asked.slow)
            study = asked.image or first_canary(session)
            text = json.dumps(measure(session, study, repeats=asked.repeats))
    except RxEdgeError as error:
        sys.stderr.write(f"rx-edge: {error}\n")
        refused = isinstance(error, BundleError | VerificationError)
        return 2 if isinstance(error, UsageError) else 3 if refused else 1
    if asked.json == "-":
        sys.stdout.write(text + "\n")
    else:
        Path(asked.json).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
