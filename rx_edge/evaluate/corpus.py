"""The studies that are scored, and the training studies that baselines are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rx_edge.config import CorpusConfig, PromptConfig
from rx_edge.errors import UsageError
from rx_edge.metrics.protocols import Protocol, Tokeniser, tokeniser
from rx_edge.prompting import takes_indication
from rx_edge.train.data import Sample, guess, read
from rx_edge.train.data.studies import BOTH
from rx_edge.types import StudyInput

SPLITS = ("val", "test")


@dataclass(frozen=True)
class Study:
    """What a system is given, with its reference report.

    Attributes:
        study: equal for the images of one study.
        view: of the first image: "frontal", "lateral" or None.
        given: more than a system may read, see `read_by`.
    """

    id: str
    study: str
    view: str | None
    given: StudyInput
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
    prompts: Sequence[PromptConfig] = (),
) -> Corpus:
    """Read a corpus with a training reader; every study is scored once.

    Args:
        limit, train_limit: at most so many studies, the same ones every time.
        reader: of `rx_edge.train.data`; None = by the corpus's layout.
        prompts: of the systems: what any of them reads is read, for the same studies.

    Raises:
        UsageError: no such split or no study to score; the protocol needs training reports.
        ConfigError: the corpus cannot be read, or does not state views where a system reads two,
            or a patient is in two splits.
    """
    if split not in SPLITS:
        raise UsageError(
            f"--split is {split!r}; valid: {', '.join(SPLITS)} (the nearest training image of a "
            "training image is itself)"
        )
    name: Any = reader or guess(path)  # `read` refuses what is no reader
    two = any(prompt.views == BOTH for prompt in prompts)
    config = CorpusConfig(reader=name, path=str(path), views=BOTH if two else "frontal")
    corpus = read("evaluate", config)
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
        **_beside_an_image(prompts, scored[:limit]),
    }
    return Corpus(tuple(scored[:limit]), tuple(train[:train_limit]), tokens, note)


def read_by(prompt: PromptConfig, study: StudyInput) -> StudyInput:
    """`study` without what a system with this prompt does not read."""
    return StudyInput(
        study.image,
        study.lateral if prompt.views == BOTH else None,
        study.indication if takes_indication(prompt) else "",
    )


def _beside_an_image(prompts: Sequence[PromptConfig], studies: Sequence[Study]) -> dict[str, int]:
    """How many studies have what some system reads beside one image."""
    found = {}
    if any(prompt.views == BOTH for prompt in prompts):
        found["with_lateral"] = sum(s.given.lateral is not None for s in studies)
    if any(map(takes_indication, prompts)):
        found["with_indication"] = sum(bool(s.given.indication) for s in studies)
    return found


def _usable(samples: Iterable[Sample]) -> list[Study]:
    """Those with an image and a whole report."""
    return [
        Study(s.id, s.study or s.id, s.view, StudyInput(s.image, s.lateral, s.indication), s.target)
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
