"""The verdict as one HTML page that can be printed and filed: no scripts, nothing loaded.

Does not cover: computing the verdict (`verify.py`).
"""

from __future__ import annotations

from html import escape

from rx_edge.bundle import Artifact, Manifest, StageResult, Verdict

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; color: #111 }
table { border-collapse: collapse; width: 100%; margin: 1em 0 }
th, td { border: 1px solid #bbb; padding: .25em .6em; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.banner { border: 2px solid #a00; padding: .5em 1em; font-weight: bold }
.passed { color: #060 } .failed { color: #a00; font-weight: bold }
@media print { body { margin: 0 } }
"""


def page(manifest: Manifest, digest: str, verdict: Verdict) -> str:
    """A whole HTML document; the same verdict gives the same bytes."""
    word, mark = ("PASSED", "passed") if verdict.passed else ("FAILED", "failed")
    failures = verdict.failures()
    notes = "".join(f"<li>{escape(note)}</li>" for note in verdict.notes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>rx-edge verification: {escape(manifest.name)}
</title><style>{_STYLE}</style></head><body>
<h1>Verification of {escape(manifest.name)}: <span class="{mark}">{word}</span></h1>
<p class="banner">{escape(manifest.banner)}</p>
<p>Bundle {escape(digest)}, exported {escape(manifest.created)}. {len(verdict.stages)} checks,
{len(failures)} failed. Every check compares this bundle, on the machine that made this page, with
the trained model in float32 with its adapter unmerged. Intended use:
{escape(manifest.intended_use)}</p>
{"<h2>Not checked here</h2><ul>" + notes + "</ul>" if notes else ""}
<h2>Artefacts</h2>
<table><tr><th>artefact</th><th>file</th><th>bytes</th></tr>
{"".join(_artifact(a, manifest) for a in (*manifest.vision, *manifest.language, *manifest.stock))}
</table>
<h2>Checks</h2>
<table><tr><th>stage</th><th>artefact</th><th>study</th><th>measured</th><th>allowed</th>
<th>what</th><th></th></tr>
{"".join(_row(s) for s in sorted(verdict.stages, key=lambda s: s.passed))}
</table></body></html>
"""


def _artifact(artifact: Artifact, manifest: Manifest) -> str:
    size = manifest.files[artifact.file].bytes if artifact.file in manifest.files else 0
    return (
        f"<tr><td>{escape(artifact.name)}</td><td>{escape(artifact.file)}</td>"
        f'<td class="number">{size:,}</td></tr>\n'
    )


def _row(s: StageResult) -> str:
    word, mark = ("ok", "passed") if s.passed else ("FAILED", "failed")
    return (
        f"<tr><td>{escape(s.stage)}</td><td>{escape(s.artifact)}</td><td>{escape(s.canary)}</td>"
        f'<td class="number">{s.value:.3g}</td><td class="number">{s.tolerance:.3g}</td>'
        f'<td>{escape(s.metric)}</td><td class="{mark}">{word}</td></tr>\n'
    )
