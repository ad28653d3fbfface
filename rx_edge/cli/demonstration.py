"""`rx-edge demo`: the whole path on the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rx_edge.cli.common import print_verdict, progress, require_export, say
from rx_edge.cli.running import draft_one
from rx_edge.errors import BundleError, UsageError

DEMO_STUDY = "RG1_UNCR.dcm"
DEMO_CANARY = "RG1_J2KI.dcm"


def demo(
    out: Annotated[Path, typer.Option("--out", help="bundle directory")] = Path(
        "build/demo-bundle"
    ),
    run: Annotated[Path, typer.Option("--run", help="the trained demo model")] = Path(
        "trained_models/demo"
    ),
) -> None:
    """The whole path: fetch base models, export, verify, draft a report for a real chest DICOM."""
    require_export()
    from rx_edge.bundle import open_bundle
    from rx_edge.model.catalogue import DEMO_PACKAGES, fetched_dir
    from rx_edge.model.fetch import fetch
    from rx_edge.runtime.session import open_session
    from rx_edge.types import StudyInput

    if not (run / "final").is_dir():
        raise UsageError(f"{str(run)!r} holds no trained model; run this in a checkout of rx-edge")
    for name in DEMO_PACKAGES:
        fetch(name, say=say)
    _export_demo(run, out, fetched_dir("demo-studies") / DEMO_CANARY)
    # the files are hashed again; what was compared at export is in the manifest
    print_verdict(open_bundle(out).manifest.verification, only_worst=True)
    study = fetched_dir("demo-studies") / DEMO_STUDY
    with open_session(out) as session:
        for note in session.notes:
            say(note)
        typer.echo(f"\n{study.name}\n")
        entry = draft_one(session, StudyInput(study), stream=True)
    from rich.console import Console

    from rx_edge.display import timings_table

    Console().print(timings_table(entry["timings"]))


def _export_demo(run: Path, out: Path, canary: Path) -> None:
    """Export unless `out` already is the export of exactly this run."""
    from rx_edge.bundle import open_bundle
    from rx_edge_export.export import export as run_export
    from rx_edge_export.staged_manifest import export_digest

    try:
        made = open_bundle(out)
        if made.drafts and made.manifest.lineage.get("export_sha256") == export_digest(run):
            say(f"{out}: up to date")
            return
    except BundleError as error:
        if out.exists():
            say(f"{error}; exporting again")
    with progress() as bars:
        run_export(run, out, canaries=[canary], force=True, progress=bars)
