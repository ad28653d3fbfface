"""`rx-edge worklist`: a directory or a list of studies, many at once, resumable."""

from __future__ import annotations

import sys
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rx_edge.cli.common import (
    BundleOption,
    Device,
    DeviceChoice,
    JsonFlag,
    LanguageChoice,
    Unverified,
    VisionChoice,
    print_json,
    progress,
    say,
)
from rx_edge.config import RuntimeConfig
from rx_edge.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rx_edge.types import StudyInput


@dataclass
class _Tally:
    """Every readable study with its key, in order, and what became of them."""

    keys: list[tuple[Path, str]] = field(default_factory=list)
    drafted: int = 0
    kept: int = 0
    failed: int = 0


class Engine(StrEnum):
    """What runs the workers."""

    local = "local"
    ray = "ray"


def worklist(
    studies: Annotated[
        Path,
        typer.Argument(
            help="directory with DICOM, PNG or JPEG files, or a .jsonl list of studies: image, and "
            "perhaps lateral and indication, one study a line"
        ),
    ],
    bundle: BundleOption,
    out: Annotated[Path, typer.Option("--out", help="directory for one JSON file per study")],
    workers: Annotated[
        int, typer.Option("--workers", min=0, help="drafting at the same time; 0 = one per core")
    ] = 0,
    slots: Annotated[
        int, typer.Option("--slots", min=0, help="drafts of a worker that share passes; 0 = auto")
    ] = 0,
    readers: Annotated[
        int | None,
        typer.Option("--readers", min=0, help="processes that read ahead; default: as many as pay"),
    ] = None,
    engine: Annotated[
        Engine, typer.Option("--engine", help="threads here, or processes of Ray Data")
    ] = Engine.local,
    ray_address: Annotated[
        str | None, typer.Option("--ray-address", help="a running Ray cluster, e.g. 10.0.0.1:6379")
    ] = None,
    vision: VisionChoice = None,
    llm: LanguageChoice = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=0, help="CPU threads; with Ray, of each worker")
    ] = None,
    device: DeviceChoice = Device.auto,
    as_json: JsonFlag = False,
    allow_unverified: Unverified = False,
) -> None:
    """Draft every study of a directory or a list; run it again to go on where it stopped."""
    if ray_address and engine is not Engine.ray:
        raise UsageError(f"--ray-address {ray_address} needs --engine ray")
    if device is Device.cuda and engine is Engine.ray:
        raise UsageError("--engine ray drafts on CPUs only so far; leave --device cuda out")
    if slots > 1 and engine is Engine.ray:
        raise UsageError(f"--slots {slots} and --engine ray exclude each other; leave one")
    if readers and engine is Engine.ray:
        raise UsageError(f"--readers {readers} and --engine ray exclude each other; leave one")
    from rx_edge.runtime.pipeline import refuse_unread
    from rx_edge.runtime.session import open_session
    from rx_edge.runtime.study_list import studies_in
    from rx_edge.runtime.worklist_store import Store

    listed = studies_in(studies)
    if engine is Engine.ray:
        from rx_edge.runtime.worklist_ray import import_ray

        import_ray(ray_address)
    with open_session(
        bundle, vision=vision, language=llm, threads=threads, allow_unverified=allow_unverified,
        runtime=RuntimeConfig(device="cpu" if engine is Engine.ray else device.value),
    ) as session:  # fmt: skip
        for study in listed:
            refuse_unread(session.bundle.manifest.prompt, study)
        for note in session.notes:
            say(note)
        store = Store(out.absolute(), session)
        if engine is Engine.ray:
            tally = _on_ray(session, store, listed, studies, workers, ray_address)
        else:
            tally = _here(session, store, listed, workers, slots, readers)
        store.finish(tally.keys)
    _summary(tally, len(listed), out, as_json=as_json)


def _here(
    session: Any,
    store: Any,
    studies: Sequence[StudyInput],
    workers: int,
    slots: int,
    readers: int | None,
) -> _Tally:
    from rx_edge.runtime.worklist import draft_all

    tally = _Tally()
    waiting: list[tuple[StudyInput, str]] = []
    for study in studies:
        try:
            key = store.key(study)
        except InputError as error:
            tally.failed += 1
            say(f"rx-edge: {error}")
            continue
        tally.keys.append((study.image, key))
        if not store.done(key):
            waiting.append((study, key))
    tally.kept = len(tally.keys) - len(waiting)
    with progress() as bars:
        rest = [study for study, _ in waiting]
        results = draft_all(session, rest, workers=workers, slots=slots, readers=readers)
        for done, result in enumerate(results, start=1):
            store.put(waiting[result.index][1], result)
            tally.failed += result.report is None
            tally.drafted += result.report is not None
            bars("drafting", done, len(waiting), f"{tally.failed} failed" if tally.failed else "")
    return tally


def _on_ray(
    session: Any,
    store: Any,
    studies: Sequence[StudyInput],
    source: Path,
    workers: int,
    address: str | None,
) -> _Tally:
    """The same, but workers find out what is done: here, an archive would be read twice."""
    from rx_edge.runtime.worklist_ray import draft_all, job_for

    job, images = job_for(session, store, source), [study.image for study in studies]
    session.close()  # every worker has its own
    tally, before, keys = _Tally(), store.reports(), [""] * len(studies)
    drafting = closing(draft_all(job, images, workers=workers, address=address))
    # Ray tells of lost workers on stdout, which belongs to the one document
    with redirect_stdout(sys.stderr), drafting as outcomes, progress() as bars:
        for done, outcome in enumerate(outcomes, start=1):
            keys[outcome.index] = outcome.key
            kept = outcome.ok and outcome.key in before
            tally.kept += kept
            tally.drafted += outcome.ok and not kept
            tally.failed += not outcome.ok
            if outcome.unread:
                say(f"rx-edge: {outcome.unread}")
            bars("drafting", done, len(studies), f"{tally.failed} failed" if tally.failed else "")
    tally.keys = [(image, key) for image, key in zip(images, keys, strict=True) if key]
    return tally


def _summary(tally: _Tally, studies: int, out: Path, *, as_json: bool) -> None:
    summary: dict[str, Any] = {
        "studies": studies,
        "drafted": tally.drafted,
        "kept": tally.kept,
        "failed": tally.failed,
        "out": str(out),
    }
    if as_json:
        print_json(summary)
    else:
        say(f"{tally.drafted} drafted, {tally.kept} kept, {tally.failed} failed: {out}")
    if tally.failed:
        raise typer.Exit(1)
