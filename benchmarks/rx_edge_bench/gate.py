"""The latency gate: a bundle beside its baseline, and beside another version.

Tier 0 counts the work of a fixed study and compares it with a baseline file, exactly: it does not
depend on the machine's mood. Tier 1 times two sides in interleaved blocks (`interleaved.py`) and
judges them (`comparison.py`). A baseline changes only when a person asks for it.

Does not cover: throughput of many studies, memory, and machines without a baseline.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rx_edge.errors import RxEdgeError, UsageError
from rx_edge_bench import comparison, interleaved
from rx_edge_bench.comparison import BASELINE_SCHEMA, Comparison
from rx_edge_bench.environment import fingerprint
from rx_edge_bench.interleaved import Blocks, Side
from rx_edge_bench.statistics import MIN_BLOCKS, TOLERANCE, Verdict

SCHEMA = "rx-edge-gate/1"
BASELINES = Path("benchmarks/baselines")
# Ten pairs catch +15 % nearly always at 5 % noise between blocks; three looks also where neighbours
# slow one block in eight down (tests/benchmarks/test_statistics.py).
PAIRS, LOOKS = 10, 3
GRAVITY: tuple[Verdict, ...] = ("none", "suspicious", "insufficient data", "regression")
COUNTED = (*comparison.IDENTITY, "text_sha256", "work")  # what a baseline keeps of a block

Tick = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Result:
    """What a gate found.

    Attributes:
        parts: "work" (Tier 0) and "time" (Tier 1), where they ran.
        counted: what ran, the text's hash and the work of B.
        a, b: the blocks of both sides; None without Tier 1.
    """

    parts: dict[str, Comparison]
    counted: dict[str, Any]
    a: Blocks | None = None
    b: Blocks | None = None

    @property
    def verdict(self) -> Verdict:
        """The gravest one; nothing compared is no pass."""
        verdicts = [part.verdict for part in self.parts.values()]
        return max(verdicts, key=GRAVITY.index) if verdicts else "insufficient data"

    def table(self) -> str:
        """Plain text for people."""
        if not self.parts:
            return "nothing to compare with: see --update-baseline and --against"
        parts = (f"[{name}] {part.table()}" for name, part in self.parts.items())
        return "\n".join([*parts, f"latency gate: {self.verdict}"])

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, every block included."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "parts": {name: part.to_json() for name, part in self.parts.items()},
            "counted": self.counted,
            "a": self.a,
            "b": self.b,
        }


def gate(
    b: Side,
    *,
    baseline: dict[str, Any] | None = None,
    a: Side | None = None,
    pairs: int = PAIRS,
    tolerance: float = TOLERANCE,
    tick: Tick = lambda *_: None,
) -> Result:
    """Judge side B.

    Args:
        baseline: from `read_baseline`, for Tier 0; None = no Tier 0.
        a: the reference, for Tier 1; None = no Tier 1.

    Raises:
        UsageError: the baseline or A is not about the same study.
        VerificationError: another text than the baseline's or A's.
        BundleError, BackendError: B does not run.
    """
    counting = replace(b, options=(*b.options, "--repeats=1"))  # the last --repeats counts
    block = interleaved.run_block(counting, "B")
    counted = {name: block[name] for name in COUNTED}
    parts = {} if baseline is None else {"work": check_work(counted, baseline)}
    if a is None:
        return Result(parts, counted)
    parts["time"], *blocks = check_time(a, b, pairs=pairs, tolerance=tolerance, tick=tick)
    return Result(parts, counted, *blocks)


def check_work(now: dict[str, Any], baseline: dict[str, Any]) -> Comparison:
    """Tier 0: counts, as `block.count_work` returns them, beside those of a baseline.

    Another text on another machine is no verdict: processors round differently, and a tie may fall
    the other way. On the machine of the baseline it is an error.

    Raises:
        UsageError: the baseline is of another model, artefact, study or limit.
        VerificationError: the text is another one, on the same machine.
    """
    before = baseline["counted"]
    for name in comparison.IDENTITY:
        if now[name] != before[name]:
            raise UsageError(
                f"the baseline has {name} {before[name]!r}, this is {now[name]!r}; name the "
                "baseline of this bundle and study, or write one with --update-baseline"
            )
    if now["text_sha256"] != before["text_sha256"] and baseline.get("fingerprint") != fingerprint():
        note = (
            "the baseline is of another machine, on which rounding decided a tie otherwise: other "
            "text, other work; write a baseline here with --update-baseline"
        )
        return Comparison("insufficient data", notes=(note,))
    comparison.refuse_other_text([before, now])
    work = comparison.work_changes(before["work"], now["work"])
    return Comparison("regression" if any(c.worse for c in work) else "none", work)


def check_time(
    a: Side, b: Side, *, pairs: int, tolerance: float, tick: Tick
) -> tuple[Comparison, Blocks | None, Blocks | None]:
    """Tier 1: B beside A, and the blocks of both.

    Where the pairs leave a doubt, as many again are measured, `LOOKS` times at most: neighbours on
    a shared machine come and go. Three looks at p < 0.002 cry wolf less than once in 150 runs.

    A reference that cannot run the study (an old version and a new bundle) is no failure of B:
    the verdict is "insufficient data" and the blocks are None.
    """
    if pairs < MIN_BLOCKS:
        note = f"{pairs} pairs of blocks cannot decide; at least {MIN_BLOCKS} are needed"
        return Comparison("insufficient data", notes=(note,)), None, None
    try:
        interleaved.run_block(a, "A")  # not timed: A's files are in the page cache, as B's are
    except RxEdgeError as error:
        note = f"the reference does not run: {error}"
        return Comparison("insufficient data", notes=(note,)), None, None
    one, other = interleaved.measure_pairs(a, b, pairs, tick=tick)
    found = comparison.compare(one, other, tolerance=tolerance)
    for _ in range(LOOKS - 1):
        if not comparison.undecided(found, tolerance):
            break
        more = interleaved.measure_pairs(a, b, pairs, tick=tick)
        one, other = (interleaved.joined(*both) for both in zip((one, other), more, strict=True))
        found = comparison.compare(one, other, tolerance=tolerance)
    return found, one, other


def gate_bundle(
    bundle: Path,
    *,
    baseline: Path | None = None,
    against: Path | None = None,
    image: Path | None = None,
    pairs: int = PAIRS,
    tolerance: float = TOLERANCE,
) -> Result:
    """`gate` with paths: what a lab's own test calls through the pytest fixture.

    Args:
        against: another bundle, interpreter or source tree (`interleaved.reference`).
        image: study; None = the bundle's first canary.

    Raises:
        UsageError: also where there is neither a baseline nor another side.
    """
    if baseline is None and against is None:
        raise UsageError("name a baseline, or what to compare with (against): the gate has nothing")
    options = () if image is None else (f"--image={image}",)
    a = None
    if against is not None:
        a = replace(interleaved.reference(bundle, against)[0], options=options)
    found = None if baseline is None else read_baseline(baseline)
    b = Side(bundle, options=options)
    return gate(b, baseline=found, a=a, pairs=pairs, tolerance=tolerance)


def default_baseline() -> Path:
    """The baseline of this machine, below the current directory."""
    return BASELINES / f"{fingerprint()}.json"


def read_baseline(path: Path) -> dict[str, Any]:
    """A baseline file.

    Raises:
        UsageError: it is missing or something else.
    """
    found = comparison.read_json(path)
    if found.get("schema") != BASELINE_SCHEMA:
        raise UsageError(
            f"{str(path)!r} has schema {found.get('schema')!r}, not {BASELINE_SCHEMA}; write it "
            "with --update-baseline"
        )
    return found


def write_baseline(path: Path, counted: dict[str, Any], blocks: Blocks | None = None) -> None:
    """Accept these counts, and the blocks where there are some, as the new baseline."""
    found = {
        "schema": BASELINE_SCHEMA,
        "fingerprint": fingerprint(),
        "counted": counted,
        "blocks": blocks,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
