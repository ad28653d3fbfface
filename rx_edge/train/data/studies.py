"""What the readers of published corpora share: their tables, and studies that become samples.

Does not cover: where a corpus keeps what (its own module), and opening images (`images.py`).
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from rx_edge.config import CorpusConfig
from rx_edge.errors import ConfigError
from rx_edge.train.data import SPLITS, Corpus, Sample

SPLIT_NAMES = {name: name for name in SPLITS} | dict.fromkeys(
    ("valid", "validate", "validation"), "val"
)
MISSING = "image file missing"  # reasons in `Corpus.dropped`
NO_LATERAL = "lateral image file missing, frontal image kept"
BOTH: Final = "frontal+lateral"  # of `CorpusConfig.views`
_MAX_FIELD = 16 * 2**20  # a report is a few kB; the module's default of 128 kB cuts long ones off


@dataclass(frozen=True)
class Picture:
    """One image of a study: where it should be, and "frontal", "lateral" or None (not stated)."""

    path: Path
    view: str | None = None


@dataclass(frozen=True)
class Study:
    """A study as the corpus has it.

    Attributes:
        split: one of SPLITS, or None when the corpus does not assign one.
        pictures: None where the corpus is read as text only.
        indication: why it was asked for, as the corpus has it; "" where it does not say.
    """

    id: str
    patient: str
    split: str | None
    findings: str
    impression: str
    pictures: tuple[Picture, ...] | None
    indication: str = ""


def one_line(text: str) -> str:
    """`text` with every run of white space as one space."""
    return " ".join(text.split())


def assemble(
    studies: Iterable[Study],
    config: CorpusConfig,
    *,
    states_views: bool = True,
    clean: Callable[[str], str] = one_line,
    cleaned: str = "",
) -> Corpus:
    """Samples of `studies` by `config.section` and `config.views`; what is dropped is counted.

    Args:
        states_views: whether the corpus says the view of an image; where not, "frontal" takes a
            study's first image and the sample's view stays None.
        clean: applied to a section and to the indication; what becomes empty cannot be a target.
        cleaned: what it did, for the reason.

    Raises:
        ConfigError: "frontal+lateral" of a corpus that does not state views.
    """
    if config.views == BOTH and not states_views:
        raise ConfigError(
            f"reader {config.reader!r}: its corpus does not say which image is the lateral one, so "
            f"it cannot be read as {BOTH!r}; take a corpus that says it (docs/guides/data.md)"
        )
    samples: list[Sample] = []
    dropped, sections = Counter[str](), Counter[str]()
    for study in studies:
        sections.update(_sections(study))
        parts = _target(study, config.section, clean)
        if study.split is None:
            dropped["not in the split file"] += 1
        elif not all(parts.values()):
            absent = next(name for name, text in parts.items() if not text)
            dropped[f"no {absent}{cleaned}"] += 1
        else:
            text = Sample(
                id=study.id, patient=study.patient, image=None, view=None,
                target=" ".join(parts.values()), complete=True, split=study.split,
                indication=clean(study.indication),
            )  # fmt: skip
            samples += _samples(study, text, config.views, states_views, dropped)
    return Corpus(tuple(samples), dict(dropped), dict(sections))


def _sections(study: Study) -> Iterator[str]:
    yield "studies"
    found = [name for name in ("findings", "impression") if getattr(study, name).strip()]
    yield from found
    if len(found) == 2:
        yield "both"


def _target(study: Study, section: str, clean: Callable[[str], str]) -> dict[str, str]:
    names = ("findings", "impression") if section == "both" else (section,)
    return {name: clean(getattr(study, name)) for name in names}


def _samples(
    study: Study, text: Sample, views: str, states_views: bool, dropped: Counter[str]
) -> list[Sample]:
    """`text` alone, or with each of the images that become samples."""
    if study.pictures is None:
        return [text]
    several = views == "all" and len(study.pictures) > 1
    lateral = _lateral(study.pictures) if views == BOTH else None
    found = [
        replace(
            text,
            id=f"{study.id}/{picture.path.stem}" if several else study.id,
            image=picture.path,
            view=picture.view,
            study=study.id,
            lateral=lateral if lateral and lateral.is_file() else None,
        )
        for picture in _pictures(study.pictures, views, states_views, dropped)
    ]
    if found and lateral and not lateral.is_file():
        dropped[NO_LATERAL] += 1
    return found


def _pictures(
    pictures: Sequence[Picture], views: str, states_views: bool, dropped: Counter[str]
) -> list[Picture]:
    """Those that become samples, all of them on this machine."""
    wanted = list(pictures)
    if not wanted:
        dropped["no image"] += 1
    elif views != "all":
        wanted = [p for p in wanted if p.view == "frontal" or not states_views][:1]
        if not wanted:
            dropped["no image stated to be frontal"] += 1
    here = [p for p in wanted if p.path.is_file()]
    if len(here) < len(wanted):
        dropped[MISSING] += len(wanted) - len(here)
    return here


def _lateral(pictures: Sequence[Picture]) -> Path | None:
    """The first image that is stated to be lateral."""
    return next((p.path for p in pictures if p.view == "lateral"), None)


def rows(path: Path, columns: Iterable[str]) -> Iterator[dict[str, str]]:
    """The rows of a .csv or .csv.gz, with at least these columns.

    Raises:
        ConfigError: it cannot be read, or a column is missing.
    """
    csv.field_size_limit(_MAX_FIELD)
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, restval="")
            absent = [c for c in columns if c not in (table.fieldnames or ())]
            if absent:
                raise ConfigError(
                    f"{path.name} has no column {', '.join(absent)}; it must be the published file"
                )
            yield from table
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"{str(path)!r} cannot be read as a table ({type(error).__name__}); download it again"
        ) from error


def json_file(path: Path, kind: type) -> Any:
    """The content of a JSON file whose top level is `kind`.

    Raises:
        ConfigError: it cannot be read or is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{str(path)!r} cannot be read as JSON ({type(error).__name__}); download it again"
        ) from error
    if not isinstance(value, kind):
        raise ConfigError(f"{path.name} is not the published file: no {kind.__name__} at its top")
    return value


def text_of(row: Mapping[str, Any], key: str) -> str:
    """The text of a field; "" where it is absent, NaN or None, which some files spell out."""
    value = row.get(key)
    text = value.strip() if isinstance(value, str) else ""
    return "" if text.lower() in ("none", "nan", "null") else text


def image_folder(root: Path, config: CorpusConfig, *usual: str) -> Path:
    """`config.images`, else the first of `usual` that exists in `root`, else the first.

    Raises:
        ConfigError: `config.images` names no directory.
    """
    if config.images:
        folder = Path(os.path.expandvars(config.images)).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"images = {config.images!r} is not a directory")
        return folder
    places = [root / name for name in usual]
    return next((place for place in places if place.is_dir()), places[0])


def iu_splits(split_file: str) -> dict[str, str]:
    """Split by study number (`CXR2384`) from a JSON of ids as in R2Gen's annotation.

    Args:
        split_file: path; empty = R2Gen's own split, which is part of this package.

    Raises:
        ConfigError: it is not such a file.
    """
    path = Path(split_file) if split_file else Path(__file__).parent / "splits" / "iu_r2gen.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {iu_number(i): name for name in SPLITS for i in table[name]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"split file {str(path)!r} is not a JSON of ids per train/val/test: {error!r}"
        ) from error


def iu_number(identifier: str) -> str:
    """`CXR2384_IM-0942-1001` -> `CXR2384`, which stands for study and patient."""
    return re.split(r"[_ ]", identifier)[0]
