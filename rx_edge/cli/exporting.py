"""`rx-edge export` and `rx-edge verify`: from a run to a bundle that is proven to be it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rx_edge.cli.common import (
    BundleArgument,
    JsonFlag,
    print_json,
    print_verdict,
    progress,
    require_export,
    say,
)

if TYPE_CHECKING:
    from rx_edge.bundle import Manifest, Verdict
    from rx_edge.config import ExportConfig

DraftsFrom = Annotated[
    str | None,
    typer.Option(
        "--drafts-from",
        help="training reports whose text goes into drafts.bin: auto, none, pairs.jsonl, "
        "directory of Open-i XML; de-identified only",
    ),
]


def export(
    run: Annotated[Path, typer.Argument(help="finished training run")],
    out: Annotated[Path, typer.Option("--out", help="bundle directory to write")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="name or TOML file of an export recipe")
    ] = None,
    vision: Annotated[
        str | None, typer.Option("--vision", help="e.g. onnx:fp32,onnx:int8,tensorrt:fp16")
    ] = None,
    llm: Annotated[
        str | None, typer.Option("--llm", help="e.g. gguf:Q8_0,gguf:Q4_K_M,onnx:int4")
    ] = None,
    canary: Annotated[
        list[Path] | None,
        typer.Option("--canary", help="real study to verify on; copied into the bundle"),
    ] = None,
    drafts_from: DraftsFrom = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="override a recipe key: key=value")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing bundle")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print sizes and needs, make nothing")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Merge LoRA, convert, quantise, verify against the trained model, and write a bundle."""
    require_export()
    from rx_edge_export.export import export as run_export

    config = _config(recipe, vision, llm, drafts_from, overrides or ())
    if dry_run:
        _print_plan(run, config, out, as_json=as_json)
        return
    with progress() as bars:
        manifest = run_export(
            run, out, config=config, canaries=canary or (), force=force, progress=bars
        )
    verdict = manifest.verification
    if as_json:
        print_json(_verdict_json(manifest, verdict))
    for note in verdict.notes:
        say(f"note: {note}")
    for reason in manifest.lineage["drafts"]["left_out"]:
        say(f"note: drafts.bin is made without {reason}")
    say(f"verified ({len(verdict.stages)} checks) and written: {out}")


def verify(
    bundle: BundleArgument,
    as_json: JsonFlag = False,
    html: Annotated[Path | None, typer.Option("--html", help="also write a page to read")] = None,
) -> None:
    """Check that a bundle is the trained model, on this machine."""
    from rx_edge.bundle import open_bundle
    from rx_edge_export.verify import verify as run_verify

    # an unverified bundle may be looked at: this is what decides about it
    opened = open_bundle(bundle, allow_unverified=True)
    verdict = run_verify(opened, tick=say)
    if html is not None:
        from rx_edge.atomic import replacing
        from rx_edge_export.verify_page import page

        with replacing(html) as part:
            part.write_text(page(opened.manifest, opened.digest, verdict), encoding="utf-8")
        say(f"written: {html}")
    if as_json:
        print_json({"bundle_sha256": opened.digest, **_verdict_json(opened.manifest, verdict)})
    else:
        print_verdict(verdict)
    if not verdict.passed:
        raise typer.Exit(3)


def _verdict_json(manifest: Manifest, verdict: Verdict) -> dict[str, Any]:
    """Every stage with value and tolerance, what was tested, and on which machine."""
    from rx_edge_bench.environment import environment

    return {
        "schema": "rx-edge-parity/2",
        "model": manifest.name,
        # both halves have an onnx:fp32
        "vision": {artifact.name: artifact.file for artifact in manifest.vision},
        "language": {artifact.name: artifact.file for artifact in manifest.language},
        "calibration": manifest.lineage.get("calibration", {}),
        **dataclasses.asdict(verdict),
        "environment": environment(),
    }


def _config(
    recipe: str | None,
    vision: str | None,
    llm: str | None,
    drafts_from: str | None,
    overrides: Sequence[str],
) -> ExportConfig:
    from rx_edge_export.recipes import load

    changes: dict[str, Any] = {}
    if vision is not None:
        changes["vision"] = tuple(vision.split(","))
    if llm is not None:
        changes["language"] = tuple(llm.split(","))
    if drafts_from is not None:
        changes["drafts_from"] = drafts_from
    return dataclasses.replace(load(recipe, overrides), **changes)


def _print_plan(run: Path, config: ExportConfig, out: Path, *, as_json: bool) -> None:
    from rx_edge_export import plan

    made = plan.make(run, config, out.parent)
    if as_json:
        print_json({**dataclasses.asdict(made), "problems": made.problems(config.memory_gb)})
    else:
        from rich.console import Console

        from rx_edge.display import plan_tables

        for table in plan_tables(made):
            Console().print(table)
        for note in made.notes:
            say(f"note: {note}")
    plan.refuse_unfit(made, config.memory_gb)
