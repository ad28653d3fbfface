"""Tables for people, built here and printed by `cli.py`."""

from __future__ import annotations

from typing import Any


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
