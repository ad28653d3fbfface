"""The command line: composes the parts, and is the only package that prints or exits.

Exit codes: 0 done; 1 failed; 2 usage; 3 verification failed or bundle refused; 4 latency
regression; 5 too little data for a verdict. Everything heavy is imported inside a command, so that
`--help` stays fast. One module per group of verbs.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

import rx_edge
from rx_edge.cli import (
    benching,
    data,
    demonstration,
    doctor,
    evaluating,
    exporting,
    models,
    packaging,
    running,
    studies,
    training,
    worklist,
)
from rx_edge.cli.common import Group

app = typer.Typer(
    cls=Group,
    name="rx-edge",
    help="Radiology-report generators on the hospital's own hardware.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_models = typer.Typer(cls=Group, help="Base models on this machine.", no_args_is_help=True)
app.add_typer(_models, name="models")

_models.command("fetch")(models.fetch_models)
_models.command("add")(models.add)
_models.command("list")(models.list_models)
_study = typer.Typer(
    cls=Group, help="The measurements behind published figures.", no_args_is_help=True
)
app.add_typer(_study, name="study")
_study.command("deployment-loss")(studies.deployment_loss)
_study.command("imatrix")(studies.imatrix)
_study.command("peers")(studies.peers)
_study.command("export-memory")(studies.export_memory)
_study.command("cold-start")(studies.cold_start)
_study.command("attention")(studies.attention)
_study.command("worklist")(studies.worklist)
_study.command("gate-honesty")(studies.gate_honesty)
_study.command("training")(studies.training)
_study.command("stages")(studies.stages)
_study.command("labels")(studies.labels)
_study.command("projection")(studies.projection)
_bench = typer.Typer(
    cls=benching.BenchGroup,
    help="Time a bundle (`bench BUNDLE` is `bench run BUNDLE`), compare, gate a change.",
    no_args_is_help=True,
)
app.add_typer(_bench, name="bench")
_bench.command("run")(benching.run)
_bench.command("compare")(benching.compare)
_bench.command("gate")(benching.gate)
_bench.command("peers")(benching.peers)
_data = typer.Typer(
    cls=Group, help="Look at a training corpus before training on it.", no_args_is_help=True
)
app.add_typer(_data, name="data")
_data.command("check")(data.check)
_data.command("preview")(data.preview)
app.command()(training.train)
app.command()(evaluating.evaluate)
app.command()(exporting.export)
app.command()(exporting.verify)
app.command()(packaging.keygen)
app.command()(packaging.sign)
app.command("verify-signature")(packaging.verify_signature)
app.command()(packaging.pack)
app.command()(running.report)
app.command()(worklist.worklist)
app.command()(running.prepare)
app.command()(running.tune)
app.command()(doctor.doctor)
app.command()(demonstration.demo)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"rx-edge {rx_edge.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Radiology-report generators on the hospital's own hardware."""
    # telemetry of dependencies is switched off before any of them is imported
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "ORT_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
