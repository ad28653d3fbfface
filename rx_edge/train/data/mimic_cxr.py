"""MIMIC-CXR and MIMIC-CXR-JPG, with the official split.

    files/p10/p10000032/s50414267.txt              report (MIMIC-CXR)
    files/p10/p10000032/s50414267/DICOM_ID.jpg     image (MIMIC-CXR-JPG), or .dcm (MIMIC-CXR)
    mimic-cxr-2.0.0-split.csv.gz, mimic-cxr-2.0.0-metadata.csv.gz
    mimic_cxr_sectioned.csv                        used instead of the reports where it is there

That table has no indications: they come from the reports, where those are there too.
`images` names the `files/` of the images where the two releases lie apart. The tables may be in
either, unpacked or not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from rx_edge.config import CorpusConfig
from rx_edge.errors import ConfigError
from rx_edge.train.data import Corpus
from rx_edge.train.data.mimic_sections import findings_and_impression, indication
from rx_edge.train.data.studies import (
    SPLIT_NAMES,
    Picture,
    Study,
    assemble,
    image_folder,
    rows,
    text_of,
)

_SPLIT, _METADATA = "mimic-cxr-2.0.0-split.csv", "mimic-cxr-2.0.0-metadata.csv"
_SECTIONED = "mimic_cxr_sectioned.csv"
_VIEWS = {"PA": "frontal", "AP": "frontal", "LATERAL": "lateral", "LL": "lateral"}

Key = tuple[str, str, str]  # subject, study, split
Sections = tuple[str, str]  # findings, impression


def looks_like(path: Path) -> bool:
    """A directory with the split table, packed or not."""
    return any((path / f"{_SPLIT}{end}").is_file() for end in (".gz", ""))


def read(path: Path, config: CorpusConfig) -> Corpus:
    """Read the directory that holds `files/` with the reports.

    Raises:
        ConfigError: a table is missing or damaged.
    """
    folder = image_folder(path, config, "files")
    if (folder / "files").is_dir():
        folder /= "files"
    tables = (path, folder, folder.parent)
    views = {
        row["dicom_id"]: _VIEWS.get(row["ViewPosition"].strip())
        for row in rows(_table(tables, _METADATA), ("dicom_id", "ViewPosition"))
    }
    images: dict[Key, list[str]] = defaultdict(list)
    for row in rows(_table(tables, _SPLIT), ("dicom_id", "study_id", "subject_id", "split")):
        images[row["subject_id"], row["study_id"], row["split"].strip()].append(row["dicom_id"])
    absent = Counter[str]()
    corpus = assemble(_studies(path, folder, images, views, absent), config)
    return replace(corpus, dropped={**corpus.dropped, **absent})


def _table(places: tuple[Path, ...], name: str) -> Path:
    for place in places:
        for file in (place / f"{name}.gz", place / name):
            if file.is_file():
                return file
    raise ConfigError(
        f"{name}.gz is missing in {str(places[0])!r}; it is part of MIMIC-CXR-JPG, whose files/ "
        "`images` may name"
    )


def _studies(
    path: Path,
    folder: Path,
    images: Mapping[Key, list[str]],
    views: Mapping[str, str | None],
    absent: Counter[str],
) -> Iterator[Study]:
    sectioned = _sectioned(path)
    for (subject, number, split), dicoms in images.items():
        name = f"s{number}"
        place = Path(f"p{subject[:2]}", f"p{subject}")
        report = _report(path / "files" / place / f"{name}.txt")
        sections = sectioned.get(name) or (
            None if report is None else findings_and_impression(name, report)
        )
        if sections is None:
            absent["report missing"] += 1
            continue
        yield Study(
            id=name,
            patient=subject,
            split=SPLIT_NAMES.get(split),
            findings=sections[0],
            impression=sections[1],
            pictures=tuple(
                Picture(_image(folder / place / name, dicom), views.get(dicom))
                for dicom in sorted(dicoms)
            ),
            indication=indication(name, report or ""),
        )


def _sectioned(path: Path) -> dict[str, Sections]:
    if not (path / _SECTIONED).is_file():
        return {}
    table = rows(path / _SECTIONED, ("study", "findings", "impression"))
    return {row["study"]: (text_of(row, "findings"), text_of(row, "impression")) for row in table}


def _report(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _image(place: Path, dicom: str) -> Path:
    jpeg = place / f"{dicom}.jpg"
    other = place / f"{dicom}.dcm"
    return other if not jpeg.is_file() and other.is_file() else jpeg
