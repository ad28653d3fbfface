"""Tables for people, built here and printed by `cli.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rx_edge.bundle import Verdict

if TYPE_CHECKING:
    from rx_edge.runtime.doctor import Finding
    from rx_edge.runtime.tuning import Profile
    from rx_edge_export.plan import Plan


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


def findings_table(findings: Sequence[Finding]) -> Any:
    """One row per thing that `rx-edge doctor` looked at."""
    from rich.table import Table

    table = Table("what", "", "found")
    for finding in findings:
        table.add_row(finding.subject, finding.status, finding.detail)
    return table


def plan_tables(plan: Plan) -> list[Any]:
    """What would be made, and what the export and the running bundle need."""
    from rich.table import Table

    made = Table("artefact", "file", "on disk, MB", "running, MB", title="what would be made")
    for row in plan.rows:
        made.add_row(row.name, row.file, f"{row.disk / 1e6:,.1f}", f"{row.memory / 1e6:,.0f}")
    needs = Table("what", "needs, GB", "has, GB", title="what it takes")
    has_memory = f"{plan.memory_free / 1e9:.1f}" if plan.memory_free else "?"
    needs.add_row("disk for the export", f"{plan.export_disk / 1e9:.1f}",
                  f"{plan.disk_free / 1e9:.1f}")  # fmt: skip
    needs.add_row("memory for the export", f"{plan.export_memory / 1e9:.1f}", has_memory)
    needs.add_row("memory of the default pair, running", f"{plan.run_memory / 1e9:.2f}", "")
    needs.add_row("of that the KV cache", f"{plan.kv_cache / 1e9:.3f}", "")
    needs.add_row("context of prompt and draft, tokens", str(plan.context), str(plan.n_ctx))
    needs.add_row("time for the export (rough)", f"{plan.export_seconds / 60:.1f} min", "")
    return [made, needs]


def profile_table(profile: Profile) -> Any:
    """What `rx-edge tune` measured, as a rich table."""
    from rich.table import Table

    table = Table("what", "ms", "against one token", title="passes of the language model")
    for threads, seconds in profile.by_threads.items():
        chosen = " (used)" if threads == profile.threads else ""
        table.add_row(f"1 token, {threads} threads{chosen}", f"{seconds * 1e3:.1f}", "")
    one = profile.pass_seconds[1]
    for width, seconds in profile.pass_seconds.items():
        table.add_row(f"{width} tokens", f"{seconds * 1e3:.1f}", f"{seconds / one:.2f}")
    return table


def evaluation_tables(result: dict[str, Any]) -> list[Any]:
    """Figures with 95 % intervals beside the baselines' values, and the comparison."""
    from rich.table import Table

    from rx_edge.evaluate.files import shown

    tables, protocol, data = [], result["protocol"]["name"], result["data"]
    for one in result["systems"]:
        title = (
            f"{one['name']}; {data['studies']} studies of {data['split']}, "
            f"protocol {protocol}; {one['empty']} empty, {one['refused']} refused"
        )
        baselines = one["baselines"]
        table = Table("metric", "system", *baselines, title=title)
        for name, value in one["metrics"].items():
            plain = (b["metrics"][name]["value"] for b in baselines.values())
            others = ("undefined" if v is None else f"{v:.3f}" for v in plain)
            table.add_row(name, shown(value), *others)
        table.columns[0].no_wrap = True
        tables.append(table)
    if "comparison" in result:
        found = result["comparison"]
        title = f"second minus first; {100 * found['identical_drafts']:.1f} % of drafts identical"
        table = Table("metric", "difference", "relative", "p", title=title)
        for name, value in found["metrics"].items():
            percent = "" if value["percent"] is None else f"{value['percent']:+.2f} %"
            p = "" if value["p"] is None else f"{value['p']:.4f}"
            table.add_row(name, shown(value), percent, p)
        table.columns[0].no_wrap = True
        tables.append(table)
    return tables
