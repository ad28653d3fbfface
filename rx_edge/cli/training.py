"""`rx-edge train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rx_edge.cli.common import progress, require_train, say


def train(
    recipe: Annotated[Path, typer.Argument(help="TOML recipe, see rx_edge/train/recipes/")],
    out: Annotated[Path, typer.Option("--out", help="run directory")] = Path("runs/run"),
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the last checkpoint")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="override a recipe key: key.sub=value")
    ] = None,
) -> None:
    """Train in stages: soft prompts aligned to a frozen LM, then LoRA."""
    require_train()
    from rx_edge.train.run import train as run_training

    with progress() as bars:
        run_training(recipe, out, resume=resume, overrides=overrides or (), progress=bars)
    say(f"finished: {out}; next: rx-edge export {out} --out BUNDLE")
