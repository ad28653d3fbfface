"""A latency result as one HTML page that can be printed and filed: no scripts, nothing loaded.

Does not cover: measuring (`latency.py`, `levers.py`).
"""

from __future__ import annotations

import io
from html import escape
from typing import Any

from rx_edge.optional import require

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; color: #111 }
table { border-collapse: collapse; margin: 1em 0 }
th, td { border: 1px solid #bbb; padding: .25em .6em; text-align: right }
th:first-child, td:first-child { text-align: left }
svg { max-width: 100%; height: auto }
@media print { body { margin: 0 } }
"""
_PARTS = ("read", "prepare", "vision", "prefill", "decode")  # they add up to the total
_GREYS = ("#222", "#555", "#888", "#bbb", "#ddd")  # told apart on paper too
_COLUMNS = ("q1", "median", "q3", "p90", "p99")


def page(result: dict[str, Any]) -> str:
    """A whole HTML document for a result of `latency.measure` or `levers.measure`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    settings = result.get("settings") or {"": result}
    title = f"rx-edge latency: {result['model']}"
    sections = "".join(_section(name, found) for name, found in settings.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>
<p>Bundle {escape(result["bundle_sha256"])}; {result["studies"]} studies, {result["repeats"]} times
each. {escape("; ".join(result["runs"]))}</p>
{_bars({name or "this bundle": found for name, found in settings.items()})}
{_levers(settings)}{sections}
<h2>Machine</h2><table>{"".join(_row(k, str(v)) for k, v in result["environment"].items())}</table>
</body></html>
"""


def _section(name: str, found: dict[str, Any]) -> str:
    rows = "".join(
        _row(stage, *(_ms(spread.get(column)) for column in _COLUMNS))
        for stage, spread in found["seconds"].items()
    )
    work = "".join(_row(key, str(value)) for key, value in found["work"].items())
    gaps = "".join(
        _row(key, *(_ms(spread.get(column)) for column in _COLUMNS))
        for key, spread in found["inter_token"].items()
    )
    head = _row("milliseconds", *_COLUMNS, cell="th")
    return (
        f"<h2>{escape(name or 'Stages')}</h2><table>{head}{rows}{gaps}</table>"
        f"<table>{_row('work', 'value: drafts', cell='th')}{work}</table>{_tokens(found)}"
    )


def _levers(settings: dict[str, Any]) -> str:
    rows = [
        _row(
            name,
            *(
                f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
                for r in found["against_all_on"].values()
            ),
            str(len(found["changed_drafts"])),
        )
        for name, found in settings.items()
        if "against_all_on" in found
    ]
    if not rows:
        return ""
    stages = next(iter(settings.values()))["against_all_on"]
    head = _row("time against all on", *stages, "drafts changed", cell="th")
    return f"<h2>What each lever brings</h2><table>{head}{''.join(rows)}</table>"


def _bars(settings: dict[str, Any]) -> str:
    """Stacked medians of the parts, one bar per setting, as SVG."""
    figure, axes = _figure(8, 1.2 + 0.4 * len(settings))
    left = [0.0] * len(settings)
    for part, grey in zip(_PARTS, _GREYS, strict=True):
        widths = [1e3 * found["seconds"][part].get("median", 0.0) for found in settings.values()]
        axes.barh(list(settings), widths, left=left, label=part, color=grey, edgecolor="black")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel("milliseconds, medians")
    axes.legend(ncols=len(_PARTS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return _svg(figure)


def _tokens(found: dict[str, Any]) -> str:
    """Histogram of the drafts' lengths."""
    counts = {int(k): v for k, v in found["work"]["new_tokens"].items()}
    if len(counts) < 2:
        return ""
    figure, axes = _figure(8, 2)
    axes.bar(list(counts), list(counts.values()), color="#555")
    axes.set_xlabel("tokens in a draft")
    axes.set_ylabel("drafts")
    return _svg(figure)


def _figure(width: float, height: float) -> Any:
    matplotlib = require("matplotlib", extra="bench")
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rx-edge"  # the same result gives the same page
    pyplot = require("matplotlib.pyplot", extra="bench")
    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    require("matplotlib.pyplot", extra="bench").close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]


def _row(*cells: str, cell: str = "td") -> str:
    return "<tr>" + "".join(f"<{cell}>{escape(str(c))}</{cell}>" for c in cells) + "</tr>"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"
