"""`rx-edge train`."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from rx_edge.cli.common import progress, require_train, say


def train(
    recipe: Annotated[str, typer.Argument(help="name of a shipped recipe, or a TOML file")],
    out: Annotated[Path, typer.Option("--out", help="run directory")] = Path("runs/run"),
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the last checkpoint")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="override a recipe key: key.sub=value")
    ] = None,
) -> None:
    """Train in stages: soft prompts aligned to a frozen LM, then LoRA."""
    from rx_edge.train.recipes import find

    file = find(recipe)
    require_train("accelerate")
    from rx_edge.train.run import train as run_training

    # of several processes (accelerate, torchrun) one speaks
    speaks = os.environ.get("RANK", "0") == "0"
    with progress() if speaks else nullcontext(lambda *_: None) as bars:
        run_training(file, out, resume=resume, overrides=overrides or (), progress=bars)
    if speaks:
        say(f"finished: {out}; next: rx-edge export {out} --out BUNDLE")
