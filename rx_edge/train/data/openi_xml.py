"""Open-i (IU X-ray) reports as XML: `ecgen-radiology/N.xml`; images only where `images` is set.

A `parentImage` id is the name of its PNG. The XML does not say the view of an image.

Split: a JSON file of ids as in R2Gen's annotation (`CXR2384_IM-0942...`), of which the study
number counts. Sentences with redactions (`XXXX`) are dropped, in the indication too: a model would
learn to print them.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

from rx_edge.config import CorpusConfig
from rx_edge.errors import ConfigError
from rx_edge.train.data import Corpus
from rx_edge.train.data.sentences import split_sentences
from rx_edge.train.data.studies import Picture, Study, assemble, image_folder, iu_splits

CLEANED = " without redactions"


def looks_like(path: Path) -> bool:
    """A directory of XML files, or with `ecgen-radiology/` in it."""
    return path.is_dir() and any(
        next(place.glob("*.xml"), None) for place in (path, path / "ecgen-radiology")
    )


def read(path: Path, config: CorpusConfig) -> Corpus:
    """Read every `N.xml` below `path`.

    Raises:
        ConfigError: no split file, or a file that is not Open-i XML.
    """
    splits = iu_splits(config.split_file)
    folder = image_folder(path, config) if config.images else None
    files = sorted(path.rglob("*.xml"), key=lambda p: p.name)
    studies = (_study(file, splits, folder) for file in files)
    return assemble(studies, config, states_views=False, clean=without_redactions, cleaned=CLEANED)


def without_redactions(text: str) -> str:
    """The sentences of `text` in which nothing is replaced by `XXXX`."""
    return " ".join(s for s in split_sentences(text) if "XXXX" not in s)


def _study(file: Path, splits: Mapping[str, str], folder: Path | None) -> Study:
    try:
        root = ET.parse(file).getroot()
    except ET.ParseError as error:
        raise ConfigError(f"{file.name} is not well-formed XML: {error}") from error
    identifier = root.find("uId")
    name = identifier.get("id", "") if identifier is not None else ""
    pictures = None
    if folder is not None:
        ids = (image.get("id", "") for image in root.iter("parentImage"))
        pictures = tuple(Picture(folder / f"{i}.png") for i in ids)
    return Study(
        id=name,
        patient=name,
        split=splits.get(name),
        findings=section(root, "FINDINGS"),
        impression=section(root, "IMPRESSION"),
        pictures=pictures,
        indication=section(root, "INDICATION"),
    )


def section(root: ET.Element, label: str) -> str:
    """The text of a section ("FINDINGS", "INDICATION" ...) as the file has it, with redactions."""
    found = (e.text or "" for e in root.iter("AbstractText") if e.get("Label") == label)
    return " ".join(found).strip()
