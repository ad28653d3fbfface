"""What `rx-edge data check` finds in a corpus: counts only, no text and no patient ids.

An unreadable image is named by its study, as someone has to replace it.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rx_edge.config import CorpusConfig
from rx_edge.train.data import (
    SPLITS,
    Corpus,
    Sample,
    load,
    patients_in_two_splits,
    without,
)
from rx_edge.train.data.images import unreadable
from rx_edge.train.data.studies import MISSING, NO_LATERAL, one_line

Progress = Callable[[str, int, int, str], None]  # what, done, of, detail


@dataclass(frozen=True)
class SplitCounts:
    """One split; `studies` counts a study with several images once, the others count samples."""

    samples: int
    studies: int
    patients: int
    with_image: int
    with_lateral: int
    with_indication: int


@dataclass(frozen=True)
class Words:
    """Words per report (separated by white space) over the studies."""

    minimum: int
    lower_quartile: float
    median: float
    upper_quartile: float
    maximum: int
    vocabulary: int


@dataclass(frozen=True)
class Check:
    """Figures of one corpus.

    Attributes:
        sections: studies, and how many have findings, impression, both; before dropping.
        dropped: reason -> studies (or images).
        duplicates: reports equal to an earlier one but for white space and case.
        duplicate_share: of all reports.
        held_out_in_train: val and test reports that are also, word for word, in train.
        shared_patients: patients in more than one split; must be 0.
        empty_share: studies without the wanted section; of samples, where there are no sections.
        images_opened: how many images were opened; 0 = not asked for.
        unreadable: sample id -> why its image cannot be read.
        skipped: whether unreadable ones were left out (`skip_bad`).
    """

    name: str
    reader: str
    section: str
    views: str
    splits: dict[str, SplitCounts]
    sections: dict[str, int]
    dropped: dict[str, int]
    missing_images: int
    duplicates: int
    duplicate_share: float
    held_out_in_train: int
    shared_patients: int
    words: Words
    empty_share: float
    images_opened: int
    unreadable: dict[str, str]
    skipped: bool

    @property
    def problems(self) -> tuple[str, ...]:
        """Why training on this corpus would be refused; empty when it would not."""
        found = []
        if self.shared_patients:
            found.append(f"{self.shared_patients} patients are in more than one split")
        if self.unreadable and not self.skipped:
            found.append(f"{len(self.unreadable)} images are unreadable (skip_bad leaves them out)")
        if not any(counts.samples for counts in self.splits.values()):
            found.append("no usable study is left")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "problems": list(self.problems)}


def check(
    name: str, config: CorpusConfig, *, images: bool = False, progress: Progress = lambda *_: None
) -> Check:
    """Read a corpus and count; patients in two splits are counted, not refused.

    Args:
        images: open every image; `config.skip_bad` does so too, and leaves out what is unreadable.

    Raises:
        ConfigError: the path is missing, not of the reader's layout, or holds no usable study.
    """
    corpus = load(name, config)
    bad: dict[str, str] = {}
    opened = 0
    if images or config.skip_bad:
        bad, opened = _open_all(name, corpus, progress)
    if config.skip_bad:
        corpus = without(corpus, list(bad))
    reports = _reports(corpus.samples)
    duplicates, leaked = _duplicates(reports)
    return Check(
        name=name,
        reader=config.reader,
        section=config.section,
        views=config.views,
        splits={split: _counts(corpus.split(split)) for split in SPLITS},
        sections=corpus.sections,
        dropped=corpus.dropped,
        missing_images=sum(corpus.dropped.get(reason, 0) for reason in (MISSING, NO_LATERAL)),
        duplicates=duplicates,
        duplicate_share=duplicates / max(1, len(reports)),
        held_out_in_train=leaked,
        shared_patients=len(patients_in_two_splits(corpus)),
        words=_words([report.target for report in reports]),
        empty_share=_empty_share(corpus, config.section),
        images_opened=opened,
        unreadable=bad,
        skipped=config.skip_bad,
    )


def _open_all(name: str, corpus: Corpus, progress: Progress) -> tuple[dict[str, str], int]:
    total, done = sum(len(s.images) for s in corpus.samples), itertools.count(1)
    found = unreadable(corpus.samples, lambda: progress(f"images of {name}", next(done), total, ""))
    return found, total


def _reports(samples: Sequence[Sample]) -> list[Sample]:
    """One sample per study, in their order."""
    return list({sample.study or sample.id: sample for sample in reversed(samples)}.values())[::-1]


def _counts(samples: Sequence[Sample]) -> SplitCounts:
    return SplitCounts(
        samples=len(samples),
        studies=len({s.study or s.id for s in samples}),
        patients=len({s.patient for s in samples}),
        with_image=sum(s.image is not None for s in samples),
        with_lateral=sum(s.lateral is not None for s in samples),
        with_indication=sum(bool(s.indication) for s in samples),
    )


def _duplicates(reports: Sequence[Sample]) -> tuple[int, int]:
    """Reports that repeat another, and held-out ones that are in train."""
    texts = [one_line(report.target).lower() for report in reports]
    train = {text for text, r in zip(texts, reports, strict=True) if r.split == "train"}
    leaked = sum(
        text in train for text, r in zip(texts, reports, strict=True) if r.split != "train"
    )
    return sum(n - 1 for n in Counter(texts).values()), leaked


def _words(texts: Sequence[str]) -> Words:
    lengths = sorted(len(text.split()) for text in texts) or [0]
    twice = lengths * 2 if len(lengths) == 1 else lengths  # quantiles() wants two values
    quartiles = statistics.quantiles(twice, n=4, method="inclusive")
    vocabulary = {word.strip(".,;:!?()").lower() for text in texts for word in text.split()}
    return Words(
        minimum=lengths[0],
        lower_quartile=quartiles[0],
        median=quartiles[1],
        upper_quartile=quartiles[2],
        maximum=lengths[-1],
        vocabulary=len(vocabulary - {""}),
    )


def _empty_share(corpus: Corpus, section: str) -> float:
    if corpus.sections:
        return 1 - corpus.sections.get(section, 0) / corpus.sections["studies"]
    return sum(not s.target.strip() for s in corpus.samples) / max(1, len(corpus.samples))
