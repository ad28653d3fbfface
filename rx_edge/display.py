"""Tables for people, built here and printed by `cli.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rx_edge.bundle import Verdict


def verdict_table(verdict: Verdict, *, only_worst: bool = False) -> Any:
    """One row per comparison, or only the worst of each stage and artefact."""
    from rich.table import Table

    table = Table("stage", "artefact", "canary", "value", "allowed", "", title="verification")
    shown = list(verdict.stages)
    if only_worst:
        ordered = sorted(verdict.stages, key=lambda s: (not s.passed, s.value))
        shown = list({(s.stage, s.artifact): s for s in ordered}.values())
    for s in shown:
        result = "ok" if s.passed else "FAILED"
        value, allowed = f"{s.value:.2e}", f"{s.tolerance:.2g}"
        table.add_row(s.stage, s.artifact, Path(s.canary).name, value, allowed, result)
    return table


def timings_table(timings: dict[str, Any]) -> Any:
    """Milliseconds and work of one study, as a rich table."""
    from rich.table import Table

    table = Table("stage", "ms", "work", title="this study, this machine, one run")
    work = {
        "prefill": f"{timings['prompt_tokens']} tokens",
        "decode": f"{timings['new_tokens']} tokens in {timings['decode_passes']} passes",
    }
    for stage in ("read", "prepare", "vision", "prefill", "decode", "time_to_first_token", "total"):
        table.add_row(stage, f"{timings[stage] * 1e3:.1f}", work.get(stage, ""))
    return table
