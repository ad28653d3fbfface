"""`rx-edge doctor`: what runs here, what does not, and the command that helps."""

from __future__ import annotations

import dataclasses

import typer

from rx_edge.cli.common import JsonFlag, print_json


def doctor(as_json: JsonFlag = False) -> None:
    """Devices, drivers, engines and conflicts; exit code 1 where something is broken."""
    from rich.console import Console

    from rx_edge.display import findings_table
    from rx_edge.runtime.doctor import examine

    findings = examine()
    if as_json:
        print_json(
            {"schema": "rx-edge-doctor/1", "findings": [dataclasses.asdict(f) for f in findings]}
        )
    else:
        Console().print(findings_table(findings))
        for finding in findings:
            if finding.fix:
                typer.echo(f"{finding.subject}: {finding.fix}")
    if any(finding.status == "broken" for finding in findings):
        raise typer.Exit(1)
