"""Results of a worklist on disk, one file per study, so that an interrupted one can go on.

A result is filed under the sha256 of the study's files and indication, the bundle and the settings:
another image, another model or another precision is never taken for the one at hand. Failures are
filed too, and tried again. File names hold no patient data; each file names the study's image as it
was given, and holds no indication.

Does not cover: drafting (`worklist.py`), lists of studies (`study_list.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rx_edge.atomic import replacing
from rx_edge.errors import InputError, UsageError
from rx_edge.runtime.session import Session
from rx_edge.types import Result, StudyInput

INDEX = "worklist.json"


class Store:
    """A directory of results. It can be pickled: workers in other processes file into the same."""

    def __init__(self, root: Path, session: Session) -> None:
        """Open or create it.

        Raises:
            UsageError: the directory cannot be made.
        """
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{str(root)!r} cannot be created: {error.strerror}") from error
        self.root = root
        settings = [
            session.bundle.digest,
            session.vision_artifact.name,
            session.artifact.name,
            dataclasses.asdict(session.generate),
            session.runtime.temperature,
            session.runtime.seed,
        ]
        self._settings = json.dumps(settings, sort_keys=True).encode()

    def key(self, study: StudyInput | Path) -> str:
        """The name of a study's file, without its ending.

        Raises:
            InputError: the study cannot be read.
        """
        study = StudyInput.of(study)
        content, said = [_sha256(path) for path in study.images], study.indication.split()
        if said or study.lateral is not None:  # an image alone has the key that it always had
            content.append(hashlib.sha256(" ".join(said).encode()).digest())
        return hashlib.sha256(self._settings + b"".join(content)).hexdigest()[:32]

    def done(self, key: str) -> bool:
        """Whether there is a report under `key`."""
        return "report" in self._read(key)

    def reports(self) -> set[str]:
        """Every key under which there is a report."""
        return {path.stem for path in self.root.glob("*.json") if self.done(path.stem)}

    def put(self, key: str, result: Result) -> dict[str, Any]:
        """File one result; returns what was filed."""
        entry: dict[str, Any] = {"study": str(result.study)}
        if result.report:
            entry["report"] = dataclasses.asdict(result.report)
        else:
            entry["error"] = str(result.error)
        self._write(self.root / f"{key}.json", entry)
        return entry

    def finish(self, keys: list[tuple[Path, str]]) -> None:
        """Write the index: every study with its file, in the order given."""
        index = [
            {"study": str(study), "file": f"{key}.json", "ok": self.done(key)}
            for study, key in keys
        ]
        self._write(self.root / INDEX, {"studies": index})

    def _read(self, key: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.root / f"{key}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found

    def _write(self, path: Path, value: Any) -> None:
        with replacing(path) as part:
            part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}") from error


def studies_below(directory: Path) -> Iterator[Path]:
    """Every file below a directory that is not hidden, in a stable order.

    Raises:
        UsageError: it is no directory.
    """
    if not directory.is_dir():
        raise UsageError(f"{str(directory)!r} is not a directory; name one that holds studies")
    for path in sorted(directory.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if path.is_file() and not hidden:
            yield path
