"""CheXpert Plus: `df_chexpert_plus_240401.csv`, one row an image, and PNGs.

`path_to_image` says .jpg (`train/patient1/study2/view1_frontal.jpg`) where the files are .png.
`frontal_lateral` is Frontal or Lateral; `split` is train or valid, and valid is read as "val":
there is no test split. The indication is `section_clinical_history`, else `section_history`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path, PurePosixPath

from rx_edge.config import CorpusConfig
from rx_edge.train.data import Corpus
from rx_edge.train.data.studies import (
    SPLIT_NAMES,
    Picture,
    Study,
    assemble,
    image_folder,
    rows,
    text_of,
)

_FILE = "df_chexpert_plus_240401.csv"
_COLUMNS = ("path_to_image", "section_findings", "section_impression", "frontal_lateral", "split")
_VIEWS = {"Frontal": "frontal", "Lateral": "lateral"}


def looks_like(path: Path) -> bool:
    """A directory with `df_chexpert_plus_240401.csv`, or that file."""
    return (path / _FILE).is_file() or path.name == _FILE


def read(path: Path, config: CorpusConfig) -> Corpus:
    """Read `path` (the table or its directory), images in `PNG/` beside it.

    Raises:
        ConfigError: the table is missing or is another one.
    """
    file = path / _FILE if path.is_dir() else path
    folder = image_folder(file.parent, config, "PNG/PNG", "PNG", "images")
    studies: dict[str, Study] = {}
    bad = Counter[str]()
    for row in rows(file, _COLUMNS):
        image = PurePosixPath(row["path_to_image"])
        if len(image.parts) < 4 or ".." in image.parts:
            bad["path_to_image is not split/patient/study/view"] += 1
            continue
        picture = Picture(
            folder / image.with_suffix(".png"), _VIEWS.get(row["frontal_lateral"].strip())
        )
        patient, study = image.parts[-3:-1]
        name = f"{patient}/{study}"
        known = studies.get(name) or Study(
            id=name,
            patient=patient,
            split=SPLIT_NAMES.get(row["split"].strip()),
            findings=text_of(row, "section_findings"),
            impression=text_of(row, "section_impression"),
            pictures=(),
            indication=text_of(row, "section_clinical_history") or text_of(row, "section_history"),
        )
        studies[name] = replace(known, pictures=(*(known.pictures or ()), picture))
    corpus = assemble(studies.values(), config)
    return replace(corpus, dropped={**corpus.dropped, **bad})
