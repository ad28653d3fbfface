"""Studies to draft, from a directory of images or from a list.

A list is a .jsonl file with one study a line: {"image": ..., "lateral": ..., "indication": ...}, of
which only "image" is needed; paths are relative to the list. A list holds indications, which may
identify patients: an error names a line by its number and quotes nothing of it.

Does not cover: opening the images, so that one that is missing fails alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rx_edge.errors import UsageError
from rx_edge.runtime.worklist_store import studies_below
from rx_edge.types import StudyInput

KEYS = tuple(field.name for field in fields(StudyInput))


def is_list(source: Path) -> bool:
    """Whether `source` is a list and no directory."""
    return source.suffix == ".jsonl" and source.is_file()


def studies_in(source: Path) -> Sequence[StudyInput]:
    """Every study of a directory or a list, in its order.

    Raises:
        UsageError: it is neither, holds no study, or a line of the list is no study.
    """
    if is_list(source):
        found = read_list(source)
    else:
        found = [StudyInput(path) for path in studies_below(source)]
    if not found:
        raise UsageError(f"{str(source)!r} holds no files; name a directory or a list with studies")
    return found


def read_list(file: Path) -> list[StudyInput]:
    """The studies of a list.

    Raises:
        UsageError: it cannot be read, or a line is no study.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UsageError(f"{str(file)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UsageError(f"{str(file)!r} is not UTF-8; save it as UTF-8") from None
    return [
        _study(line, file.parent, f"{file}:{number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _study(line: str, folder: Path, where: str) -> StudyInput:
    try:
        row: Any = json.loads(line)
    except ValueError:
        raise UsageError(f"{where}: not a JSON object") from None  # the cause quotes the line
    if not isinstance(row, dict) or not row.get("image") or not row.keys() <= set(KEYS):
        raise UsageError(f'{where}: a study has an "image", and no keys but {", ".join(KEYS)}')
    if not all(isinstance(value, str | None) for value in row.values()):
        raise UsageError(f"{where}: a value is no text")
    lateral = folder / row["lateral"] if row.get("lateral") else None
    return StudyInput(folder / row["image"], lateral, row.get("indication") or "")
