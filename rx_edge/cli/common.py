"""What every command shares: options, messages, progress, and errors as one line.

With `--json` one JSON document goes to stdout and nothing else; progress and messages go to
stderr.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from rx_edge.errors import BundleError, RxEdgeError, UsageError, VerificationError
from rx_edge.optional import require

if TYPE_CHECKING:
    from rx_edge.bundle import Verdict

BundleOption = Annotated[
    Path, typer.Option("--bundle", envvar="RX_EDGE_BUNDLE", help="bundle directory")
]
BundleArgument = Annotated[Path, typer.Argument(help="bundle directory")]
JsonFlag = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
Unverified = Annotated[
    bool,
    typer.Option("--allow-unverified", help="accept a bundle without a verdict; drafts say so"),
]
VisionChoice = Annotated[
    str | None, typer.Option("--vision", help="artefact, e.g. onnx:int8; default: the bundle's")
]
LanguageChoice = Annotated[
    str | None, typer.Option("--llm", help="artefact, e.g. gguf:Q8_0; default: the bundle's")
]


class Device(StrEnum):
    """Where a bundle runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


DeviceChoice = Annotated[
    Device,
    typer.Option("--device", help="auto: a GPU where this installation can use one, else the CPU"),
]
NoDrafts = Annotated[
    bool,
    typer.Option("--no-drafts", help="decode token by token, without the bundle's report corpus"),
]


class Group(TyperGroup):
    """Turns every `RxEdgeError` into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:  # typer ships a click of its own, without public types
        try:
            return super().invoke(ctx)
        except RxEdgeError as error:
            fail(str(error), exit_code(error))
        except KeyboardInterrupt:
            fail("interrupted", 130)


def exit_code(error: RxEdgeError) -> int:
    """2 usage; 3 verification failed or bundle refused; 1 everything else."""
    if isinstance(error, UsageError):
        return 2
    return 3 if isinstance(error, BundleError | VerificationError) else 1


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, and the end."""
    typer.echo(f"rx-edge: {message}", err=True)
    raise typer.Exit(code)


def say(message: str) -> None:
    """A message for people, on stderr."""
    typer.echo(message, err=True)


def print_json(value: Any) -> None:
    """The one document on stdout."""
    typer.echo(json.dumps(value, indent=1))


def print_verdict(verdict: Verdict, *, only_worst: bool = False) -> None:
    """The table of stages; raises when one failed."""
    from rich.console import Console

    from rx_edge.display import verdict_table

    Console().print(verdict_table(verdict, only_worst=only_worst))
    for note in verdict.notes:
        say(f"note: {note}")
    if not verdict.passed:
        raise VerificationError("the bundle is not the trained model: see the failed stages")


@contextmanager
def progress() -> Iterator[Any]:
    """A rich progress display on stderr; yields `update(what, done, of, detail)`."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, of: int, detail: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of, detail=detail)
            bars.update(tasks[what], completed=done, total=of, detail=detail)

        yield update


def require_train(*more: str, extra: str = "train") -> None:
    """Fail early, with the pip command, where the training side is not installed."""
    for module in ("torch", "transformers", "peft", *more):
        require(module, extra=extra)


def require_export() -> None:
    """The same for exporting."""
    require_train("onnx", "onnxscript", "gguf", "onnxruntime", "cyclonedx", extra="export")
