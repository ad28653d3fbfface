"""An export as a row of steps of which each finished one survives a kill.

The work directory lies beside the target and is hidden. `steps.json` records, after each step,
its result and the sha256 of every file that it wrote; when the same export is started again, a
step whose files still are those is not repeated. Another run, recipe or code has another key,
and its work directory is emptied first.

Does not cover: what the steps do (`artifacts.py`) and the final rename (`export.py`).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from rx_edge.atomic import replacing
from rx_edge.bundle import describe
from rx_edge.closing import Closing
from rx_edge.errors import UsageError

RECORD = "steps.json"


class Progress(Protocol):
    """What shows progress: `what` is at `done` of `of`; `detail` says what is going on."""

    def __call__(self, what: str, done: int, of: int, detail: str) -> None: ...


class Steps(Closing):
    """The work directory of one export, locked while it is in use.

    Args:
        work: created when it is not there.
        key: hash of everything that decides the result.
        total: number of steps, for the progress display.

    Raises:
        UsageError: another process is making the same export.
    """

    def __init__(self, work: Path, key: str, total: int, progress: Progress) -> None:
        self.work = work
        self._key, self._total, self._progress = key, total, progress
        self._count = 0
        self._done: set[str] = set()
        work.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(work / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise UsageError(
                f"{str(work)!r} is in use by another export to the same place; wait for it"
            ) from error
        self._finished = self._load()

    def run(
        self, name: str, files: Callable[[], Iterable[Path]], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Do a step, or take its result from an earlier attempt.

        Args:
            name: shown to the user, unique.
            files: what it wrote, asked for after `make`: files, or directories with all in them.
            make: does it; returns JSON-ready data.
        """
        if name in self._done:  # several artefacts may share a step
            shared: dict[str, Any] = self._finished[name]["result"]
            return shared
        result = self._kept(name)
        self._progress("export", self._count, self._total, name)
        if result is None:
            result = make()
            entries = {str(p.relative_to(self.work)): describe(p).sha256 for p in _flat(files())}
            self._finished[name] = {"result": result, "files": entries}
            self._save()
        self._done.add(name)
        self._count += 1
        self._progress("export", self._count, self._total, name)
        return result

    def detail(self, text: str) -> None:
        """Say what is going on inside the current step."""
        self._progress("export", self._count, self._total, text)

    def discard(self) -> None:
        """Remove the work directory: it holds nothing worth keeping."""
        shutil.rmtree(self.work, ignore_errors=True)

    def close(self) -> None:
        """Let go of the work directory."""
        os.close(self._lock)  # closing releases the lock

    def _kept(self, name: str) -> dict[str, Any] | None:
        entry = self._finished.get(name)
        if entry is None:
            return None
        for file, sha256 in entry["files"].items():
            path = self.work / file
            if not path.is_file() or describe(path).sha256 != sha256:
                return None
        result: dict[str, Any] = entry["result"]
        return result

    def _load(self) -> dict[str, Any]:
        try:
            record = json.loads((self.work / RECORD).read_text(encoding="utf-8"))
            if record["key"] == self._key:
                finished: dict[str, Any] = record["steps"]
                return finished
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no record, or a damaged one: begin anew
        for path in self.work.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return {}

    def _save(self) -> None:
        with replacing(self.work / RECORD) as part:
            part.write_text(
                json.dumps({"key": self._key, "steps": self._finished}), encoding="utf-8"
            )


def _flat(paths: Iterable[Path]) -> list[Path]:
    found = []
    for path in paths:
        found += [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
    return found
