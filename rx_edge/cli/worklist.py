"""`rx-edge worklist`: a directory of studies, many at once, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rx_edge.cli.common import (
    BundleOption,
    JsonFlag,
    LanguageChoice,
    Unverified,
    VisionChoice,
    print_json,
    progress,
    say,
)
from rx_edge.errors import InputError, UsageError


def worklist(
    directory: Annotated[Path, typer.Argument(help="directory with DICOM, PNG or JPEG files")],
    bundle: BundleOption,
    out: Annotated[Path, typer.Option("--out", help="directory for one JSON file per study")],
    workers: Annotated[
        int, typer.Option("--workers", min=0, help="studies at the same time; 0 = one per core")
    ] = 0,
    slots: Annotated[
        int, typer.Option("--slots", min=1, help="drafts that share passes instead, in one worker")
    ] = 1,
    vision: VisionChoice = None,
    llm: LanguageChoice = None,
    threads: Annotated[int | None, typer.Option("--threads", min=0, help="CPU threads")] = None,
    as_json: JsonFlag = False,
    allow_unverified: Unverified = False,
) -> None:
    """Draft every study of a directory; run it again to go on where it stopped."""
    if workers > 1 and slots > 1:
        raise UsageError(f"--workers {workers} and --slots {slots} exclude each other; leave one")
    from rx_edge.runtime.session import open_session
    from rx_edge.runtime.worklist import draft_all
    from rx_edge.runtime.worklist_store import Store, studies_below

    studies = list(studies_below(directory))
    if not studies:
        raise UsageError(f"{str(directory)!r} holds no files; name a directory with studies")
    with open_session(
        bundle, vision=vision, language=llm, threads=threads, allow_unverified=allow_unverified
    ) as session:
        for note in session.notes:
            say(note)
        store = Store(out, session)
        keys, unread = _keys(store, studies)
        waiting = [(study, key) for study, key in keys if not store.done(key)]
        failed = len(unread)
        for message in unread:
            say(f"rx-edge: {message}")
        with progress() as bars:
            paths = [study for study, _ in waiting]
            results = draft_all(session, paths, workers=workers, slots=slots)
            for done, result in enumerate(results, start=1):
                store.put(waiting[result.index][1], result)
                failed += result.report is None
                bars("drafting", done, len(waiting), f"{failed} failed" if failed else "")
        store.finish(keys)
    summary: dict[str, Any] = {
        "studies": len(studies),
        "drafted": len(waiting) - failed + len(unread),
        "kept": len(keys) - len(waiting),
        "failed": failed,
        "out": str(out),
    }
    if as_json:
        print_json(summary)
    else:
        say(f"{summary['drafted']} drafted, {summary['kept']} kept, {failed} failed: {out}")
    if failed:
        raise typer.Exit(1)


def _keys(store: Any, studies: list[Path]) -> tuple[list[tuple[Path, str]], list[str]]:
    """Every readable study with its key, and a message for each other one."""
    keys, unread = [], []
    for study in studies:
        try:
            keys.append((study, store.key(study)))
        except InputError as error:
            unread.append(str(error))
    return keys, unread
