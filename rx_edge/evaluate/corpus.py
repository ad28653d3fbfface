"""The studies that are scored, and the training studies that baselines are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rx_edge.config import CorpusConfig
from rx_edge.errors import UsageError
from rx_edge.metrics.protocols import Protocol, Tokeniser, tokeniser
from rx_edge.train.data import Sample, guess, read

SPLITS = ("val", "test")


@dataclass(frozen=True)
class Study:
    """One image with its reference report.

    Attributes:
        study: equal for the images of one study.
        view: "frontal", "lateral" or None.
    """

    id: str
    study: str
    view: str | None
    image: Path
    text: str


@dataclass(frozen=True)
class Corpus:
    """What is scored.

    Attributes:
        train: studies for the baselines; empty where the corpus has no training split.
        note: JSON-ready: hash of what is scored, counts of what was left out and why; no names.
    """

    studies: tuple[Study, ...]
    train: tuple[Study, ...]
    tokens: Tokeniser
    note: dict[str, Any]


def open_corpus(
    path: Path,
    split: str,
    protocol: Protocol,
    limit: int | None,
    train_limit: int,
    reader: str | None = None,
) -> Corpus:
    """Read a corpus with a training reader; one image of each study is scored.

    Args:
        limit, train_limit: at most so many studies, the same ones every time.
        reader: of `rx_edge.train.data`; None = by the corpus's layout.

    Raises:
        UsageError: no such split or no study to score; the protocol needs training reports.
        ConfigError: the corpus cannot be read, or a patient is in two splits.
    """
    if split not in SPLITS:
        raise UsageError(
            f"--split is {split!r}; valid: {', '.join(SPLITS)} (the nearest training image of a "
            "training image is itself)"
        )
    name: Any = reader or guess(path)  # `read` refuses what is no reader
    corpus = read("evaluate", CorpusConfig(reader=name, path=str(path)))
    train = _by_hash(_usable(corpus.split("train")))
    if protocol.rare_below and not train:
        raise UsageError(f"protocol {protocol.name} needs training reports, and there are none")
    tokens = tokeniser(protocol, (s.text for s in train))
    everything = corpus.split(split)
    written = _usable(everything)
    first = _one_a_study(written)
    scored = [s for s in _by_hash(first) if tokens.reference(s.text)]
    if not scored[:limit]:
        raise UsageError(
            f"{str(path)!r} has {len(scored)} studies with a report in {split} and --limit is "
            f"{limit}; at least one is needed"
        )
    note = {
        "reader": name,
        "sha256": _digest(scored[:limit]),
        "split": split,
        "studies": len(scored[:limit]),
        "train_studies": len(train[:train_limit]),
        "dropped_by_reader": corpus.dropped,
        "left_out": {
            "no written report, or no image": len(everything) - len(written),
            "another image of a study": len(written) - len(first),
            "nothing left under the protocol": len(first) - len(scored),
            "over --limit": len(scored) - len(scored[:limit]),
        },
    }
    return Corpus(tuple(scored[:limit]), tuple(train[:train_limit]), tokens, note)


def _usable(samples: Iterable[Sample]) -> list[Study]:
    """Those with an image and a whole report."""
    return [
        Study(s.id, s.study or s.id, s.view, s.image, s.target)
        for s in samples
        if s.image is not None and s.complete
    ]


def _one_a_study(samples: Iterable[Study]) -> list[Study]:
    """Intervals need independent studies: a frontal image of each where there is one."""
    ordered = sorted(samples, key=lambda s: (s.view != "frontal", s.id))
    chosen: dict[str, Study] = {}
    for sample in ordered:
        chosen.setdefault(sample.study, sample)
    return list(chosen.values())


def _by_hash(studies: Iterable[Study]) -> list[Study]:
    """In an order that does not depend on the file."""
    return sorted(studies, key=lambda s: hashlib.sha256(s.id.encode()).hexdigest())


def _digest(studies: Iterable[Study]) -> str:
    """Equal where the same studies are scored against the same references."""
    found = hashlib.sha256()
    for study in sorted(studies, key=lambda s: s.id):
        found.update(f"{study.id}\0{study.text}\0".encode())
    return found.hexdigest()
