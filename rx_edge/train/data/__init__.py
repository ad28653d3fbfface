"""One reader per corpus; each yields the same `Sample`s.

Readers keep what the corpus says, drop what cannot be a target, and count what they dropped:
`Corpus.dropped` goes into the run's data manifest.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rx_edge.config import CorpusConfig
from rx_edge.errors import ConfigError

SPLITS = ("train", "val", "test")
READERS: tuple[str, ...] = get_args(get_type_hints(CorpusConfig)["reader"])
UNREADABLE = "image unreadable"  # reason in `Corpus.dropped`


@dataclass(frozen=True)
class Sample:
    """One image (or none, for text-only stages) and the text to learn.

    Attributes:
        id: unique inside the corpus: the study id, with the image's name where a study gives
            several samples.
        patient: patient id, for splits and leakage checks.
        image: path, or None.
        view: "frontal", "lateral", or None when the corpus does not say.
        target: the text to generate.
        complete: False when only a beginning is known, so the end must not be learned.
        split: "train", "val" or "test".
        study: study id where it is not `id`.
        lateral: a second image of the study, where the corpus is read as frontal+lateral.
        indication: why the study was asked for, on one line; "" where the corpus does not say.
    """

    id: str
    patient: str
    image: Path | None
    view: str | None
    target: str
    complete: bool
    split: str
    study: str = ""
    lateral: Path | None = None
    indication: str = ""

    @property
    def images(self) -> tuple[Path, ...]:
        """Its image files in the order of their soft prompts; none for text only."""
        return tuple(path for path in (self.image, self.lateral) if path is not None)


@dataclass(frozen=True)
class Corpus:
    """What a reader found.

    Attributes:
        dropped: how many studies (images, where only an image is at fault) for which reason.
        sections: "studies", and how many of them have "findings", "impression" and "both",
            before anything was dropped; empty for a corpus without sections.
    """

    samples: tuple[Sample, ...]
    dropped: dict[str, int] = field(default_factory=dict)
    sections: dict[str, int] = field(default_factory=dict)

    def split(self, name: str) -> list[Sample]:
        """The samples of one split, in a stable order."""
        return sorted((s for s in self.samples if s.split == name), key=lambda s: s.id)


def read(name: str, config: CorpusConfig) -> Corpus:
    """Read the corpus `name` of a recipe.

    With `config.skip_bad` every image is opened once, and studies whose image is unreadable are
    left out; otherwise an image is opened when it is needed (`images.naming` names its study).

    Raises:
        ConfigError: the path is missing or holds no usable study, or patients cross splits.
    """
    from rx_edge.train.data.images import unreadable

    corpus = load(name, config)
    if config.skip_bad:
        corpus = without(corpus, list(unreadable(corpus.samples)))
    if not corpus.samples:
        raise ConfigError(f"data.{name}: no usable study: {corpus.dropped}")
    _refuse_leakage(name, corpus)
    return corpus


def load(name: str, config: CorpusConfig) -> Corpus:
    """As `read`, without a look at images and at patients in two splits.

    Raises:
        ConfigError: the path is missing or holds no usable study.
    """
    path = Path(os.path.expandvars(config.path)).expanduser()
    if "$" in str(path):
        raise ConfigError(f"data.{name}.path is {config.path!r}: set that environment variable")
    if not path.exists():
        raise ConfigError(f"data.{name}.path {str(path)!r} does not exist")
    corpus: Corpus = _module(config.reader).read(path, config)
    if not corpus.samples:
        raise ConfigError(f"data.{name}.path {str(path)!r} holds no usable study: {corpus.dropped}")
    return corpus


def guess(path: Path) -> str:
    """The reader whose published layout `path` has.

    Raises:
        ConfigError: none has, or more than one.
    """
    found = [name for name in READERS if _module(name).looks_like(path)]
    if len(found) != 1:
        what = f"looks like {' and '.join(found)}" if found else "has no layout that is known"
        raise ConfigError(
            f"{str(path)!r} {what}; name a reader: {', '.join(READERS)} (docs/guides/data.md)"
        )
    return found[0]


def without(corpus: Corpus, ids: Sequence[str]) -> Corpus:
    """`corpus` without these samples, whose images are unreadable; counted."""
    if not ids:
        return corpus
    gone = set(ids)
    kept = tuple(s for s in corpus.samples if s.id not in gone)
    return replace(corpus, samples=kept, dropped={**corpus.dropped, UNREADABLE: len(gone)})


def patients_in_two_splits(corpus: Corpus) -> dict[str, tuple[str, str, str]]:
    """Per patient: the first split, another one, and the id of a sample there."""
    first: dict[str, str] = {}
    found: dict[str, tuple[str, str, str]] = {}
    for sample in corpus.samples:
        split = first.setdefault(sample.patient, sample.split)
        if split != sample.split:
            found.setdefault(sample.patient, (split, sample.split, sample.id))
    return found


def _refuse_leakage(name: str, corpus: Corpus) -> None:
    for one, other, sample in patients_in_two_splits(corpus).values():
        raise ConfigError(
            f"data.{name}: one patient is in both {one!r} and {other!r} "
            f"(study {sample!r}); split by patient"
        )


def _module(reader: str) -> Any:
    return importlib.import_module(f"rx_edge.train.data.{reader.replace('-', '_')}")
