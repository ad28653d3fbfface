"""The result of `peers.py` as plain text for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rx_edge_bench.peers import LEAST_STUDIES, OURS, PLAIN


def table(result: Mapping[str, Any]) -> str:
    """Both tables, the overhead, and every engine that is missing."""
    whole, alone = result["end_to_end"], result["language_alone"]
    lines = [
        f"end to end: {result['studies']} studies x {result['repeats']}, {result['artifact']}, "
        f"{result['threads']} threads, {result['texts']}; ratio = engine / {OURS}",
        f"{'':<28}{'weights':<24}{'seconds':>9}{'ratio':>8}{'95 % interval':>18}{'same text':>11}",
    ]
    for name, row in whole.items():
        text = row.get("text")
        same = f"{text['equal']}/{text['of']}" if text else ""
        lines.append(_line(name, row) + f"{same:>11}")
    for name, row in whole.items():
        for part in row.get("against_by_length", ()) if name != OURS else ():
            least, most = part["tokens"]
            found = part["against"][OURS]
            few = ", too few to conclude from" if found["studies"] < LEAST_STUDIES else ""
            lines.append(
                f"{name}, drafts of {least} to {most} tokens: {found['ratio']:.3f} "
                f"({found['low']:.3f} - {found['high']:.3f}, {found['studies']} studies{few})"
            )
    lines += [
        f"(same text as {PLAIN})",
        "",
        f"language model alone: {alone['prompt_tokens']} tokens read, {alone['new_tokens']} "
        "written",
    ]
    lines += [_line(name, row) for name, row in alone["engines"].items()]
    overhead = alone["overhead"]
    if overhead:
        for name, found in overhead["ratios"].items():
            verdict = "within" if overhead["within_limit"][name] else "ABOVE"
            lines.append(
                f"{name} / {overhead['of']}: {found['ratio']:.3f} "
                f"({found['low']:.3f} - {found['high']:.3f}), {verdict} {overhead['limit']}"
            )
    return "\n".join([*lines, "", *(f"note: {note}" for note in result["notes"])])


def _line(name: str, row: Mapping[str, Any]) -> str:
    if not row["ran"]:
        return f"{name:<28}missing: {row['reason']}"
    found = row["against"][OURS]
    interval = f"{found['low']:.3f} - {found['high']:.3f}"
    return (
        f"{name:<28}{row['weights']:<24}{row['seconds']['median']:>9.3f}"
        f"{found['ratio']:>8.3f}{interval:>18}"
    )
