"""The files that hold texts, written only where the user names them: CSV and HTML.

The page needs nothing from elsewhere and runs no script, so that it can be filed. Reports are
patient data: both files belong where the corpus belongs.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from rx_edge.evaluate.evaluate import Evaluation, Row

WORST = 20  # studies per system on the page
WORST_BY = "rouge_l"
_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; color: #111 }
table { border-collapse: collapse; margin: 1em 0 }
th, td { border: 1px solid #bbb; padding: .25em .6em; text-align: right; vertical-align: top }
th:first-child, td:first-child, td.text { text-align: left }
td.text { white-space: pre-wrap; min-width: 22em }
"""


def csv_text(rows: Sequence[Row]) -> str:
    """One line per study and system: texts, and every metric on that study alone."""
    out = io.StringIO()
    names = list(rows[0].values)
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["system", "id", "reference", "draft", "empty", *names])
    for row in rows:
        values = ["" if row.values[n] is None else row.values[n] for n in names]
        writer.writerow([row.system, row.id, row.reference, row.draft, int(row.empty), *values])
    return out.getvalue()


def page(evaluation: Evaluation) -> str:
    """A whole HTML document: figures with intervals, baselines, comparison, worst studies."""
    result = evaluation.result
    names = [one["name"] for one in result["systems"]]
    title = f"rx-edge evaluation: {' and '.join(names)}"
    body = "".join(
        _system(name, one, _worst(evaluation.rows, name))
        for name, one in zip(names, result["systems"], strict=True)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>
{_conditions(result)}{_comparison(result)}{body}</body></html>
"""


def shown(estimate: dict[str, Any]) -> str:
    """A figure with its interval, for people."""
    if estimate["value"] is None:
        return "undefined"
    text = f"{estimate['value']:.3f}"
    if estimate["low"] is None:
        return text
    return f"{text} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _conditions(result: dict[str, Any]) -> str:
    protocol, data, sampling = result["protocol"], result["data"], result["sampling"]
    rows = {
        "protocol": f"{protocol['name']}: {protocol['about']}",
        **{k: v for k, v in protocol.items() if k not in ("name", "about")},
        "studies": f"{data['studies']} of {data['split']}, corpus {data['sha256'][:12]}",
        **{f"left out: {k}": v for k, v in data["left_out"].items()},
        "intervals": f"95 %, over studies, {sampling['resamples']} resamples",
        "labels": f"{result['labels']['rules']}, uncertain: {result['labels']['uncertain']}",
        **{f"baseline {k}": v for k, v in result["baselines"].items()},
        **{f"missing: {k}": v for k, v in sorted(result["missing"].items())},
        **result.get("environment", {}),
    }
    return _table(["conditions", ""], [_row(k, str(v)) for k, v in rows.items()])


def _comparison(result: dict[str, Any]) -> str:
    if "comparison" not in result:
        return ""
    found = result["comparison"]
    rows = [
        _row(
            name,
            shown(one),
            "" if one["percent"] is None else f"{one['percent']:+.2f} %",
            "" if one["p"] is None else f"{one['p']:.4f}",
        )
        for name, one in found["metrics"].items()
    ]
    return (
        f"<h2>Second minus first</h2><p>{100 * found['identical_drafts']:.1f} % of the drafts are "
        f"identical.</p>{_table(['metric', 'difference', 'relative', 'p'], rows)}"
    )


def _system(name: str, one: dict[str, Any], worst: Iterable[Row]) -> str:
    baselines = one["baselines"]
    figures = [
        _row(metric, shown(value), *(shown(b["metrics"][metric]) for b in baselines.values()))
        for metric, value in one["metrics"].items()
    ]
    findings = [
        _row(finding, "" if v["f1"] is None else f"{v['f1']:.3f}", f"{v['support']:.0f}",
             f"{v['tp']:.0f}", f"{v['fp']:.0f}", f"{v['fn']:.0f}")
        for finding, v in one["findings"].items()
    ]  # fmt: skip
    clinical = [_row(key, f"{value:.3f}") for key, value in one["radeval"].items()]
    cases = [
        f"<tr><td>{escape(r.id)}</td><td>{r.values[WORST_BY]:.3f}</td>"
        f'<td class="text">{escape(r.reference)}</td><td class="text">{escape(r.draft)}</td></tr>'
        for r in worst
    ]
    return (
        f"<h2>{escape(name)}</h2>{_identity(one)}<p>{one['empty']} empty drafts, "
        f"{one['refused']} images refused: both count as failures.</p>"
        f"{_table(['metric', 'system', *baselines], figures)}"
        f"{_table(['RadEval', 'value'], clinical) if clinical else ''}"
        f"{_table(['finding', 'F1', 'support', 'TP', 'FP', 'FN'], findings)}"
        f"<h3>Worst by {WORST_BY}</h3>{_table(['study', WORST_BY, 'reference', 'draft'], cases)}"
    )


def _identity(one: dict[str, Any]) -> str:
    """What the system is: everything about it that is neither a figure nor a table."""
    plain = {k: v for k, v in one.items() if isinstance(v, str | bool) and k != "name"}
    return _table(["this is", ""], [_row(k, str(v)) for k, v in plain.items()])


def _worst(rows: Iterable[Row], system: str) -> list[Row]:
    own = [row for row in rows if row.system == system]
    return sorted(own, key=lambda r: (r.values[WORST_BY] or 0.0, r.id))[:WORST]


def _table(head: Sequence[str], rows: Iterable[str]) -> str:
    return f"<table>{_row(*head, cell='th')}{''.join(rows)}</table>"


def _row(*cells: str, cell: str = "td") -> str:
    return f"<tr>{''.join(f'<{cell}>{escape(c)}</{cell}>' for c in cells)}</tr>"
