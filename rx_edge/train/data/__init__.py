"""One reader per corpus; each yields the same `Sample`s.

Readers keep what the corpus says, drop what cannot be a target, and count what they dropped:
`Corpus.dropped` goes into the run's data manifest.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rx_edge.config import CorpusConfig
from rx_edge.errors import ConfigError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Sample:
    """One study: an image (or none, for text-only stages) and the text to learn.

    Attributes:
        id: study id, unique inside the corpus.
        patient: patient id, for splits and leakage checks.
        image: path, or None.
        view: "frontal", "lateral", or None when the corpus does not say.
        target: the text to generate.
        complete: False when only a beginning is known, so the end must not be learned.
        split: "train", "val" or "test".
    """

    id: str
    patient: str
    image: Path | None
    view: str | None
    target: str
    complete: bool
    split: str


@dataclass(frozen=True)
class Corpus:
    """What a reader found, and how many studies it dropped for which reason."""

    samples: tuple[Sample, ...]
    dropped: dict[str, int] = field(default_factory=dict)

    def split(self, name: str) -> list[Sample]:
        """The samples of one split, in a stable order."""
        return sorted((s for s in self.samples if s.split == name), key=lambda s: s.id)


_READERS = {
    "pairs-jsonl": "rx_edge.train.data.pairs_jsonl",
    "openi-xml": "rx_edge.train.data.openi_xml",
}


def read(name: str, config: CorpusConfig) -> Corpus:
    """Read the corpus `name` of a recipe.

    Raises:
        ConfigError: the path is missing or holds no usable study, or patients cross splits.
    """
    path = Path(os.path.expandvars(config.path)).expanduser()
    if "$" in str(path):
        raise ConfigError(f"data.{name}.path is {config.path!r}: set that environment variable")
    if not path.exists():
        raise ConfigError(f"data.{name}.path {str(path)!r} does not exist")
    reader: Callable[[Path, CorpusConfig], Corpus]
    reader = importlib.import_module(_READERS[config.reader]).read
    corpus = reader(path, config)
    if not corpus.samples:
        raise ConfigError(f"data.{name}.path {str(path)!r} holds no usable study: {corpus.dropped}")
    _refuse_leakage(name, corpus)
    return corpus


def _refuse_leakage(name: str, corpus: Corpus) -> None:
    seen: dict[str, str] = {}
    for sample in corpus.samples:
        first = seen.setdefault(sample.patient, sample.split)
        if first != sample.split:
            raise ConfigError(
                f"data.{name}: one patient is in both {first!r} and {sample.split!r} "
                f"(study {sample.id!r}); split by patient"
            )
