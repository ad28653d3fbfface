"""What one system and its baselines say about every study."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from rx_edge.errors import InputError, UsageError
from rx_edge.evaluate.corpus import Corpus, Study
from rx_edge.evaluate.systems import System
from rx_edge.metrics.baselines import constant, nearest
from rx_edge.types import FloatArray, SoftPrompt

Progress: TypeAlias = Callable[[str, int, int, str], None]  # what, done, of, detail

BATCH = 8  # studies whose soft prompts are held at once
REFUSED = ""  # the draft of a study whose image the system refuses: a failure like any other

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
        refused: studies whose image the system refused.
    """

    about: dict[str, Any]
    drafts: tuple[str, ...]
    baselines: dict[str, tuple[str, ...]]
    refused: int


@dataclass(frozen=True)
class _Trained:
    """Training images as the system sees them: embeddings (M, D), mean prompt (N, D), reports."""

    embeddings: FloatArray
    mean: SoftPrompt
    reports: tuple[str, ...]


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
    refused = 0
    for studies in _chunks(corpus.studies):
        prompts = [_encode(system, study) for study in studies]
        seen = [p for p in prompts if p is not None]
        written = iter(system.write(seen))
        drafts += [REFUSED if p is None else next(written) for p in prompts]
        refused += len(prompts) - len(seen)
        if trained:
            near = iter(_neighbours(trained, seen))
            neighbours += [REFUSED if p is None else next(near) for p in prompts]
        tick(f"{what}: drafts", len(drafts), len(corpus.studies), "")
    baselines: dict[str, tuple[str, ...]] = {}
    if trained and same is not None:
        blind = system.write([trained.mean])[0]
        baselines = {
            "constant": (same,) * len(drafts),
            "nearest": tuple(neighbours),
            "ablated": (blind,) * len(drafts),
        }
    return Answers(system.about, tuple(drafts), baselines, refused)


def _see(system: System, train: Sequence[Study], what: str, tick: Progress) -> _Trained:
    embeddings, reports = [], []
    total: Any = 0.0
    for number, study in enumerate(train, 1):
        soft = _encode(system, study)
        if soft is not None:
            total = total + soft.astype(np.float64)
            embeddings.append(soft.mean(0))
            reports.append(study.text)
        tick(f"{what}: training images", number, len(train), "")
    if not reports:
        raise UsageError(
            f"{what} refuses all {len(train)} training images; baselines need at least one: "
            "check one of them with `rx-edge report`"
        )
    mean = (total / len(reports)).astype(np.float32)
    return _Trained(np.stack(embeddings), mean, tuple(reports))


def _encode(system: System, study: Study) -> SoftPrompt | None:
    """None where the system refuses the image."""
    try:
        return system.encode(study.image)
    except (InputError, UsageError):
        return None


def _neighbours(trained: _Trained, prompts: Sequence[SoftPrompt]) -> list[str]:
    if not prompts:
        return []
    found = nearest(trained.embeddings, np.stack([p.mean(0) for p in prompts]))
    return [trained.reports[i] for i in found]


def _chunks(studies: Sequence[Study]) -> Iterator[Sequence[Study]]:
    for start in range(0, len(studies), BATCH):
        yield studies[start : start + BATCH]
