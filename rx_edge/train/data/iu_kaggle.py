"""IU X-ray as on Kaggle: `indiana_reports.csv`, `indiana_projections.csv`, PNGs with known views.

Reports: uid, MeSH, Problems, image, indication, comparison, findings, impression. Projections:
uid, filename, projection (Frontal or Lateral). The split is R2Gen's unless `split_file` says
otherwise; sentences with redactions (`XXXX`) are dropped, as in `openi_xml.py`.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from rx_edge.config import CorpusConfig
from rx_edge.train.data import Corpus
from rx_edge.train.data.openi_xml import CLEANED, without_redactions
from rx_edge.train.data.studies import (
    Picture,
    Study,
    assemble,
    image_folder,
    iu_splits,
    rows,
    text_of,
)

_REPORTS, _PROJECTIONS = "indiana_reports.csv", "indiana_projections.csv"
_VIEWS = {"Frontal": "frontal", "Lateral": "lateral"}


def looks_like(path: Path) -> bool:
    """A directory with `indiana_reports.csv`."""
    return (path / _REPORTS).is_file()


def read(path: Path, config: CorpusConfig) -> Corpus:
    """Read the two tables in `path`; images in `images/images_normalized/` there.

    Raises:
        ConfigError: a table is missing or is another one, or no split file.
    """
    splits = iu_splits(config.split_file)
    folder = image_folder(path, config, "images/images_normalized", "images_normalized", "images")
    pictures: dict[str, list[Picture]] = defaultdict(list)
    for row in rows(path / _PROJECTIONS, ("uid", "filename", "projection")):
        view = _VIEWS.get(row["projection"].strip())
        pictures[row["uid"]].append(Picture(folder / row["filename"], view))
    studies = (
        Study(
            id=(name := f"CXR{row['uid']}"),
            patient=name,
            split=splits.get(name),
            findings=text_of(row, "findings"),
            impression=text_of(row, "impression"),
            pictures=tuple(pictures[row["uid"]]),
            indication=text_of(row, "indication"),
        )
        for row in rows(path / _REPORTS, ("uid", "findings", "impression"))
    )
    return assemble(studies, config, clean=without_redactions, cleaned=CLEANED)
