"""Two sets of blocks compared: the text first, then the work, then the time.

A different text ends the comparison: a faster wrong model is no improvement. Time (Tier 1) is
judged by `statistics.py`: the total and the time to first token decide; the stages explain, and can
only raise suspicion. So can a difference in work: whether it is meant, a baseline says (`gate.py`),
because there a person can accept it.

Does not cover: measuring (`interleaved.py`) and baselines (`gate.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rx_edge.errors import UsageError, VerificationError
from rx_edge_bench import interleaved
from rx_edge_bench.statistics import MIN_BLOCKS, TOLERANCE, Judgement, Verdict, judge

BASELINE_SCHEMA = "rx-edge-baseline/1"
DECIDING = ("total", "time_to_first_token")
STAGES = (*DECIDING, "vision", "prefill", "decode_per_token")
IDENTITY = ("model", "vision", "language", "pixel_sha256", "max_new_tokens")
SAME_STUDY = ("pixel_sha256", "max_new_tokens")  # what two sides must share to be compared
APART = "the sides were not measured in turn: the machine's drift is part of the difference"
NOISY = "the interval reaches too far for a verdict: take more --pairs, or an idle machine"
ELSEWHERE = "measured on different machines: no verdict about the software"


@dataclass(frozen=True)
class Change:
    """A count of work that is not what it was. More is worse, for every one of them."""

    draft: str  # "first" or "next"
    name: str
    before: int
    now: int

    @property
    def worse(self) -> bool:
        """True where more work is done than before."""
        return self.now > self.before


@dataclass(frozen=True)
class Comparison:
    """What is known about B beside A.

    Attributes:
        verdict: of everything together.
        work: counts that differ; A is `before`.
        stages: the time of each stage, where blocks were compared.
        notes: what the reader must know to trust it.
    """

    verdict: Verdict
    work: tuple[Change, ...] = ()
    stages: Mapping[str, Judgement] | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; NaN becomes null."""
        stages = {n: _finite(asdict(j)) for n, j in (self.stages or {}).items()}
        return {
            "verdict": self.verdict,
            "work": [asdict(change) for change in self.work],
            "stages": stages,
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """Plain text for people, in a terminal or in a test's failure."""
        lines = [f"verdict: {self.verdict}"]
        worse, better = "REGRESSION", "improved: update the baseline"
        if self.stages is not None:
            worse, better = "more work", "less work"
        if not self.work:
            lines.append("work: equal")
        for change in self.work:
            lines.append(
                f"work: {change.draft} draft, {change.name}: {change.before:,} -> "
                f"{change.now:,}  {worse if change.worse else better}"
            )
        if self.stages:
            lines.append(f"{'time':<22}{'B / A':>8}{'95 % interval':>18}{'p':>9}{'blocks':>8}")
        for name, j in (self.stages or {}).items():
            span = f"{j.low:.3f} - {j.high:.3f}"
            lines.append(
                f"{name:<22}{j.ratio:>8.3f}{span:>18}{j.p:>9.4f}{j.blocks:>8}  {j.verdict}"
            )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def read_blocks(path: Path) -> interleaved.Blocks:
    """A file of blocks, or the blocks inside a baseline.

    Raises:
        UsageError: it is not there, not JSON, or holds no blocks.
    """
    found = read_json(path)
    if found.get("schema") == BASELINE_SCHEMA:
        found = found.get("blocks") or {}
    if found.get("schema") != interleaved.SCHEMA:
        raise UsageError(
            f"{str(path)!r} holds no {interleaved.SCHEMA}; make one with "
            "`rx-edge bench run BUNDLE --blocks 10 --json FILE`"
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UsageError: it cannot be read, or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{str(path)!r} holds a {type(found).__name__}, not a result")
    return found


def compare(
    a: interleaved.Blocks,
    b: interleaved.Blocks,
    *,
    tolerance: float = TOLERANCE,
    force_machine: bool = False,
) -> Comparison:
    """Compare two documents of blocks; A is the reference.

    Args:
        force_machine: show the figures of two different machines; the verdict stays
            "insufficient data", because a machine is no version.

    Raises:
        UsageError: different machines, or not the same study and limit of tokens.
        VerificationError: different texts.
    """
    same_machine = a["fingerprint"] == b["fingerprint"]
    if not same_machine and not force_machine:
        raise UsageError(
            f"machine {a['fingerprint']} and machine {b['fingerprint']} differ ("
            f"{_machine_differences(a, b)}); measure both on one machine, or add --force-machine "
            "to see the figures without a verdict"
        )
    blocks_a, blocks_b = a["blocks"], b["blocks"]
    if not blocks_a or not blocks_b:
        return Comparison("insufficient data", notes=("a side has no blocks",))
    refuse_other_text([*blocks_a, *blocks_b])
    together = a["run"] == b["run"]
    stages = {
        name: judge(
            [block["median"][name] for block in blocks_a],
            [block["median"][name] for block in blocks_b],
            tolerance=tolerance,
            paired=together,
        )
        for name in STAGES
        if all(name in block["median"] for block in (*blocks_a, *blocks_b))
    }
    work = work_changes(blocks_a[0]["work"], blocks_b[0]["work"])
    verdict = time_verdict(work, stages) if same_machine else "insufficient data"
    noisy = verdict == "insufficient data" and stages["total"].blocks >= MIN_BLOCKS
    told = ((APART, not together), (ELSEWHERE, not same_machine), (NOISY, noisy and same_machine))
    notes = tuple(note for note, applies in told if applies)
    return Comparison(verdict, work, stages, notes)


def undecided(found: Comparison, tolerance: float = TOLERANCE) -> bool:
    """Whether more blocks may say more: a time is in doubt, or B passes although its deciding times
    are best estimated above the tolerance.
    """
    times = found.stages or {}
    if found.verdict == "none":
        return any(times[name].ratio > tolerance for name in DECIDING if name in times)
    doubt = any(judgement.verdict != "none" for judgement in times.values())
    return doubt and found.verdict != "regression"


def time_verdict(work: Iterable[Change], stages: Mapping[str, Judgement]) -> Verdict:
    """A deciding time speaks first; any other doubt is suspicious."""
    deciding = {stages[name].verdict for name in DECIDING if name in stages}
    for verdict in ("regression", "insufficient data"):
        if verdict in deciding:
            return verdict
    doubts = {judgement.verdict for judgement in stages.values()}
    doubtful = doubts & {"regression", "suspicious"} or any(change.worse for change in work)
    return "suspicious" if doubtful else "none"


def work_changes(
    before: Mapping[str, Mapping[str, int]], now: Mapping[str, Mapping[str, int]]
) -> tuple[Change, ...]:
    """Counts that differ. One that `before` does not know yet is not compared."""
    return tuple(
        Change(draft, name, counts[name], now[draft][name])
        for draft, counts in before.items()
        for name in counts
        if now[draft][name] != counts[name]
    )


def refuse_other_text(results: Iterable[Mapping[str, Any]]) -> None:
    """A `UsageError` where studies differ, a `VerificationError` where only the texts do."""
    first, *others = results
    for other in others:
        for name in SAME_STUDY:
            if other[name] != first[name]:
                raise UsageError(
                    f"{name} is {first[name]} on one side and {other[name]} on the other; time "
                    "the same study with the same limit"
                )
        if other["text_sha256"] != first["text_sha256"]:
            raise VerificationError(
                f"the sides write different drafts ({_system(first)} {first['text_sha256'][:8]}, "
                f"{_system(other)} {other['text_sha256'][:8]}): their speed is not compared; run "
                "`rx-edge verify`, or accept the new text with --update-baseline"
            )


def _system(result: Mapping[str, Any]) -> str:
    return f"{result['model']} {result['vision']} {result['language']}"


def _machine_differences(a: interleaved.Blocks, b: interleaved.Blocks) -> str:
    one, other = a["environment"], b["environment"]
    names = ("cpu", "cores_allowed", "system", "python", "packages")
    return ", ".join(n for n in names if one.get(n) != other.get(n)) or "engine build"


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
