"""What one system and its baselines say about every study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np

from rx_edge.errors import InputError, UsageError
from rx_edge.evaluate.corpus import Corpus, Study, read_by
from rx_edge.evaluate.systems import Prompted, System
from rx_edge.metrics.baselines import constant, nearest
from rx_edge.types import FloatArray, SoftPrompt, StudyInput

T = TypeVar("T")
Progress: TypeAlias = Callable[[str, int, int, str], None]  # what, done, of, detail

BATCH = 8  # studies whose soft prompts are held at once
REFUSED = ""  # the draft of a study that the system refuses: a failure like any other

BASELINES = {
    "constant": "one training report for every study: the medoid by ROUGE-L",
    "nearest": "the report of the training image whose mean soft token has the best cosine",
    "ablated": "the system itself, with the mean soft prompt of the training images as image",
}


@dataclass(frozen=True)
class Answers:
    """One system's texts, study by study.

    Attributes:
        about: JSON-ready, from the system.
        baselines: by the names of `BASELINES`; empty without training studies.
        refused: studies that the system refused.
    """

    about: dict[str, Any]
    drafts: tuple[str, ...]
    baselines: dict[str, tuple[str, ...]]
    refused: int


@dataclass(frozen=True)
class _Trained:
    """Training images as the system sees them: embeddings (M, D), mean prompts, reports.

    Attributes:
        means: by length, the mean over the studies whose soft prompt is so long (as many views).
        usual: the most frequent length.
    """

    embeddings: FloatArray
    means: dict[int, SoftPrompt]
    usual: int
    reports: tuple[str, ...]

    def blind(self, given: Prompted | None) -> tuple[int, str]:
        """Which mean stands for the study's images, and the indication, which stays its own."""
        if given is None:
            return self.usual, ""
        length = len(given.soft)
        return length if length in self.means else self.usual, given.indication


def constant_report(corpus: Corpus) -> str | None:
    """The training report that is most like the others; None without training studies."""
    if not corpus.train:
        return None
    tokens = [corpus.tokens.reference(s.text) for s in corpus.train]
    return corpus.train[constant([s.id for s in corpus.train], tokens)].text


def ask(system: System, corpus: Corpus, same: str | None, what: str, tick: Progress) -> Answers:
    """Every draft of `system`, and its baselines.

    Args:
        same: the constant report.
        what: the system's name, for the progress display.

    Raises:
        UsageError: it refuses every training image.
        BackendError: an engine failed.
    """
    trained = _see(system, corpus.train, what, tick) if corpus.train else None
    drafts: list[str] = []
    neighbours: list[str] = []
    blind: list[tuple[int, str]] = []
    refused = 0
    for studies in _chunks(corpus.studies):
        prompts = [_encode(system, study.given) for study in studies]
        seen = [p for p in prompts if p is not None]
        written = iter(system.write(seen))
        drafts += [REFUSED if p is None else next(written) for p in prompts]
        refused += len(prompts) - len(seen)
        if trained:
            near = iter(_neighbours(trained, seen))
            neighbours += [REFUSED if p is None else next(near) for p in prompts]
            blind += map(trained.blind, prompts)
        tick(f"{what}: drafts", len(drafts), len(corpus.studies), "")
    baselines: dict[str, tuple[str, ...]] = {}
    if trained and same is not None:
        baselines = {
            "constant": (same,) * len(drafts),
            "nearest": tuple(neighbours),
            "ablated": _ablated(system, trained, blind, what, tick),
        }
    return Answers(system.about, tuple(drafts), baselines, refused)


def _see(system: System, train: Sequence[Study], what: str, tick: Progress) -> _Trained:
    embeddings, reports = [], []
    totals: dict[int, Any] = {}
    counts = Counter[int]()
    for number, study in enumerate(train, 1):
        given = _encode(system, replace(study.given, indication=""))
        if given is not None:
            length = len(given.soft)
            totals[length] = totals.get(length, 0.0) + given.soft.astype(np.float64)
            counts[length] += 1
            embeddings.append(given.soft.mean(0))
            reports.append(study.text)
        tick(f"{what}: training images", number, len(train), "")
    if not reports:
        raise UsageError(
            f"{what} refuses all {len(train)} training images; baselines need at least one: "
            "check one of them with `rx-edge report`"
        )
    means = {n: (total / counts[n]).astype(np.float32) for n, total in totals.items()}
    ((usual, _),) = counts.most_common(1)
    return _Trained(np.stack(embeddings), means, usual, tuple(reports))


def _encode(system: System, study: StudyInput) -> Prompted | None:
    """None where the system refuses the study."""
    try:
        return system.encode(read_by(system.prompt, study))
    except (InputError, UsageError):
        return None


def _ablated(
    system: System,
    trained: _Trained,
    blind: Sequence[tuple[int, str]],
    what: str,
    tick: Progress,
) -> tuple[str, ...]:
    """The drafts without images; studies that differ in nothing else share one."""
    texts: dict[tuple[int, str], str] = {}
    different = list(dict.fromkeys(blind))
    for keys in _chunks(different):
        prompts = [Prompted(trained.means[length], indication) for length, indication in keys]
        texts.update(zip(keys, system.write(prompts), strict=True))
        tick(f"{what}: drafts without images", len(texts), len(different), "")
    return tuple(texts[key] for key in blind)


def _neighbours(trained: _Trained, prompts: Sequence[Prompted]) -> list[str]:
    if not prompts:
        return []
    found = nearest(trained.embeddings, np.stack([p.soft.mean(0) for p in prompts]))
    return [trained.reports[i] for i in found]


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]
