"""PadChest-GR: `grounded_reports_20240819.json`, `master_table.csv` and 16-bit PNGs.

A list of {StudyID, ImageID, findings: [{sentence_en, ...}]}: the English sentences in their order
are the findings; there is no impression. `master_table.csv` has several rows a study, with its
PatientID and split (train, validation, test). No view is stated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rx_edge.config import CorpusConfig
from rx_edge.errors import ConfigError
from rx_edge.train.data import Corpus
from rx_edge.train.data.sentences import split_sentences
from rx_edge.train.data.studies import (
    SPLIT_NAMES,
    Picture,
    Study,
    assemble,
    image_folder,
    json_file,
    rows,
    text_of,
)

_REPORTS, _TABLE = "grounded_reports_20240819.json", "master_table.csv"
_FOLDERS = ("Padchest_GR_files/PadChest_GR", "Padchest_GR_files", "PadChest_GR", "images")


def looks_like(path: Path) -> bool:
    """A directory with `grounded_reports_20240819.json`."""
    return (path / _REPORTS).is_file()


def read(path: Path, config: CorpusConfig) -> Corpus:
    """Read the two files in `path`; images in `Padchest_GR_files/PadChest_GR/` there.

    Raises:
        ConfigError: a file is missing or damaged, or a study has two patients or splits.
    """
    folder = image_folder(path, config, *_FOLDERS)
    table: dict[str, tuple[str, str]] = {}
    for row in rows(path / _TABLE, ("StudyID", "PatientID", "split")):
        said = (row["PatientID"], row["split"].strip())
        if table.setdefault(row["StudyID"], said) != said:
            raise ConfigError(f"{_TABLE}: study {row['StudyID']!r} has two patients or splits")
    return assemble(_studies(path / _REPORTS, table, folder), config, states_views=False)


def _studies(file: Path, table: Mapping[str, tuple[str, str]], folder: Path) -> Iterator[Study]:
    for number, entry in enumerate(json_file(file, list)):
        try:
            yield _study(entry, table, folder)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file.name}: entry {number} has no usable StudyID, ImageID or findings "
                f"({type(error).__name__})"
            ) from error


def _study(entry: dict[str, Any], table: Mapping[str, tuple[str, str]], folder: Path) -> Study:
    name = str(entry["StudyID"])
    patient, split = table.get(name, ("", ""))
    sentences = " ".join(
        s for finding in entry["findings"] for s in split_sentences(text_of(finding, "sentence_en"))
    )
    return Study(
        id=name,
        patient=patient,
        split=SPLIT_NAMES.get(split),
        findings=sentences,
        impression="",
        pictures=(Picture(folder / str(entry["ImageID"])),),
    )
