"""The studies that are scored, and the training studies that baselines are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rx_edge.bundle import describe
from rx_edge.config import CorpusConfig
from rx_edge.errors import UsageError
from rx_edge.metrics.protocols import Protocol, Tokeniser, tokeniser
from rx_edge.train.data import Sample, read

SPLITS = ("val", "test")


@dataclass(frozen=True)
class Study:
    """One image with its reference report."""

    id: str
    image: Path
    text: str


@dataclass(frozen=True)
class Corpus:
    """What is scored.

    Attributes:
        train: studies for the baselines; empty where the corpus has no training split.
        note: JSON-ready: hash, split, counts of what was left out and why; no names.
    """

    studies: tuple[Study, ...]
    train: tuple[Study, ...]
    tokens: Tokeniser
    note: dict[str, Any]


def open_corpus(
    path: Path, split: str, protocol: Protocol, limit: int | None, train_limit: int
) -> Corpus:
    """Read a pairs.jsonl (or its directory) with the training reader.

    Args:
        limit, train_limit: at most so many studies, the same ones every time.

    Raises:
        UsageError: no such split or no study to score; the protocol needs training reports.
        ConfigError: the corpus cannot be read, or a patient is in two splits.
    """
    if split not in SPLITS:
        raise UsageError(
            f"--split is {split!r}; valid: {', '.join(SPLITS)} (the nearest training image of a "
            "training image is itself)"
        )
    corpus = read("evaluate", CorpusConfig(reader="pairs-jsonl", path=str(path)))
    train = _usable(corpus.split("train"))
    if protocol.rare_below and not train:
        raise UsageError(f"protocol {protocol.name} needs training reports, and there are none")
    tokens = tokeniser(protocol, (s.text for s in train))
    everything = corpus.split(split)
    written = _usable(everything)
    scored = [s for s in written if tokens.reference(s.text)]
    if not scored[:limit]:
        raise UsageError(
            f"{str(path)!r} has {len(scored)} studies with a report in {split} and --limit is "
            f"{limit}; at least one is needed"
        )
    file = path / "pairs.jsonl" if path.is_dir() else path
    note = {
        "sha256": describe(file).sha256,
        "split": split,
        "studies": len(scored[:limit]),
        "train_studies": len(train[:train_limit]),
        "left_out": {
            "no written report, or no image": len(everything) - len(written),
            "nothing left under the protocol": len(written) - len(scored),
            "over --limit": len(scored) - len(scored[:limit]),
        },
    }
    return Corpus(tuple(scored[:limit]), tuple(train[:train_limit]), tokens, note)


def _usable(samples: Iterable[Sample]) -> list[Study]:
    """Those with an image and a whole report, in an order that does not depend on the file."""
    found = [Study(s.id, s.image, s.target) for s in samples if s.image is not None and s.complete]
    return sorted(found, key=lambda s: hashlib.sha256(s.id.encode()).hexdigest())
