"""`rx-edge report` and `rx-edge prepare`: a verified bundle at work."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rx_edge.cli.common import (
    BundleArgument,
    BundleOption,
    Device,
    DeviceChoice,
    JsonFlag,
    LanguageChoice,
    NoDrafts,
    Unverified,
    VisionChoice,
    exit_code,
    print_json,
    say,
)
from rx_edge.config import GenerateConfig, RuntimeConfig
from rx_edge.errors import RxEdgeError, UsageError

if TYPE_CHECKING:
    from rx_edge.runtime.session import Session
    from rx_edge.types import Report, StudyInput


def _help(setting: str) -> str:
    """The help text of a `GenerateConfig` field: defaults and their meaning live there only."""
    fields = {f.name: f for f in dataclasses.fields(GenerateConfig)}
    text: str = fields[setting].metadata["help"]
    return text


def report(
    images: Annotated[list[Path], typer.Argument(help="DICOM, PNG or JPEG files")],
    bundle: BundleOption,
    lateral: Annotated[
        Path | None, typer.Option("--lateral", help="lateral image of the one IMAGE's study")
    ] = None,
    indication: Annotated[
        str | None,
        typer.Option("--indication", help="why it was asked for; other users may see it in `ps`"),
    ] = None,
    indication_file: Annotated[
        str | None, typer.Option("--indication-file", help="the same from a text file; - = stdin")
    ] = None,
    as_json: JsonFlag = False,
    vision: VisionChoice = None,
    llm: LanguageChoice = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help=_help("max_new_tokens"))
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=0, help=_help("threads"))] = None,
    device: DeviceChoice = Device.auto,
    no_drafts: NoDrafts = False,
    allow_unverified: Unverified = False,
) -> None:
    """Draft a report for each image, streamed; or for one study of two views."""
    from rx_edge.runtime.session import open_session

    studies = _studies(images, lateral, indication, indication_file)
    session = open_session(
        bundle,
        vision=vision,
        language=llm,
        max_new_tokens=max_new_tokens,
        threads=threads,
        allow_unverified=allow_unverified,
        runtime=RuntimeConfig(drafts=not no_drafts, device=device.value),
    )
    with session:
        for note in session.notes:
            say(note)
        entries, worst = [], 0
        for study in studies:
            try:
                entries.append(draft_one(session, study, stream=not as_json))
            except RxEdgeError as error:
                entries.append({"study": str(study.image), "error": str(error)})
                worst = max(worst, exit_code(error))
                typer.echo(f"rx-edge: {error}", err=True)
        if as_json:
            print_json({"reports": entries})
        if worst:
            raise typer.Exit(worst)


def prepare(
    image: Annotated[Path, typer.Argument(help="DICOM, PNG or JPEG file")],
    bundle: BundleOption,
    out: Annotated[Path, typer.Option("--out", help="PNG to write")],
) -> None:
    """Write the 8-bit square that stock engines need to see what the model was trained on."""
    from rx_edge.bundle import open_bundle
    from rx_edge_export.mmproj_check import write_square

    recipe = open_bundle(bundle).manifest.image
    write_square(image, recipe, out)
    say(f"written: {out} ({recipe.size} x {recipe.size})")


def draft_one(session: Session, study: StudyInput, *, stream: bool) -> dict[str, Any]:
    from rx_edge.runtime.pipeline import draft

    chunks = draft(session, study)
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
    return {"study": str(study.image), **dataclasses.asdict(finished)}


def _studies(
    images: list[Path], lateral: Path | None, indication: str | None, indication_file: str | None
) -> list[StudyInput]:
    from rx_edge.types import StudyInput

    if indication is not None and indication_file is not None:
        raise UsageError("--indication and --indication-file exclude each other; leave one")
    alone = {
        "--lateral": lateral,
        "--indication": indication,
        "--indication-file": indication_file,
    }
    for option, value in alone.items():
        if value is not None and len(images) != 1:
            raise UsageError(f"{option} belongs to one study; name one image, not {len(images)}")
    _refuse_missing(images if lateral is None else [*images, lateral])
    text = _text(indication_file) if indication_file is not None else indication or ""
    return [StudyInput(image, lateral, text) for image in images]


def _text(file: str) -> str:
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return raw.decode("utf-8")
    except OSError as error:
        raise UsageError(f"{file!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UsageError(f"{file!r} is not UTF-8 text") from None


def _refuse_missing(images: list[Path]) -> None:
    """Before a model is loaded: a wrong path should not cost seconds."""
    for image in images:
        if not image.exists():
            raise UsageError(f"{str(image)!r} does not exist")
        if image.is_dir():
            raise UsageError(f"{str(image)!r} is a directory; name image files")


def tune(
    bundle: BundleArgument,
    llm: LanguageChoice = None,
    device: DeviceChoice = Device.auto,
    as_json: JsonFlag = False,
    allow_unverified: Unverified = False,
) -> None:
    """Measure threads and pass costs on this machine once; later drafts use them."""
    from rich.console import Console

    from rx_edge.display import profile_table
    from rx_edge.runtime import tuning
    from rx_edge.runtime.session import open_session

    runtime = RuntimeConfig(device=device.value)
    with open_session(
        bundle, language=llm, allow_unverified=allow_unverified, runtime=runtime
    ) as session:
        profile = tuning.measure(session, tick=say)
    if as_json:
        print_json(dataclasses.asdict(profile))
    else:
        Console().print(profile_table(profile))
