"""R2Gen's `annotation.json` with `images/`, for IU X-ray and for MIMIC-CXR.

An object with train, val and test, each a list of {id, report, image_path: [...], split}; MIMIC
entries also have study_id and subject_id. `report` is the findings as R2Gen publishes them, kept
as they are (redactions included), so that published figures are computed on the same text. It
truncates and lower-cases only when it trains and scores. No view is stated.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rx_edge.config import CorpusConfig
from rx_edge.errors import ConfigError
from rx_edge.train.data import SPLITS, Corpus
from rx_edge.train.data.studies import (
    Picture,
    Study,
    assemble,
    image_folder,
    iu_number,
    json_file,
    text_of,
)

_FILE = "annotation.json"


def looks_like(path: Path) -> bool:
    """A directory with `annotation.json`, or that file."""
    return (path / _FILE).is_file() or path.name == _FILE


def read(path: Path, config: CorpusConfig) -> Corpus:
    """Read `path` (annotation.json or its directory), images in `images/` beside it.

    Raises:
        ConfigError: it is not such a file.
    """
    file = path / _FILE if path.is_dir() else path
    folder = image_folder(file.parent, config, "images")
    return assemble(_studies(file, folder), config, states_views=False)


def _studies(file: Path, folder: Path) -> Iterator[Study]:
    table = json_file(file, dict)
    for split in SPLITS:
        for number, entry in enumerate(table.get(split, ())):
            try:
                yield _study(entry, split, folder)
            except (KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{file.name}: entry {number} of {split!r} has no usable id, report or "
                    f"image_path ({type(error).__name__})"
                ) from error


def _study(entry: dict[str, Any], split: str, folder: Path) -> Study:
    name = str(entry["id"])
    return Study(
        id=name,
        patient=str(entry["subject_id"]) if "subject_id" in entry else iu_number(name),
        split=split,
        findings=text_of(entry, "report"),
        impression="",
        pictures=tuple(Picture(folder / p) for p in entry["image_path"]),
    )
