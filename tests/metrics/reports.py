"""Real reports to score: the 590 IU X-ray test reports against each other, shifted by one."""

from __future__ import annotations

import random

import pytest

from rx_edge.config import CorpusConfig
from rx_edge.metrics.protocols import PROTOCOLS, split
from rx_edge.model.catalogue import fetched_dir
from rx_edge.train.data import read


def iu_reports(name: str = "test") -> list[str]:
    """The FINDINGS of a split, in the order of their ids."""
    path = fetched_dir("iu-reports")
    if not path.is_dir():
        pytest.skip("IU reports are absent: rx-edge models fetch iu-reports")
    corpus = read("iu", CorpusConfig(reader="openi-xml", path=str(path)))
    return [s.target for s in corpus.split(name)]


def iu_pairs() -> tuple[list[list[str]], list[list[str]]]:
    """References and shuffled reports as drafts, tokens of `study-findings`; some are empty."""
    references = [split(PROTOCOLS["study-findings"], text) for text in iu_reports()]
    drafts = list(references)
    random.Random(0).shuffle(drafts)
    drafts[::100] = [[] for _ in drafts[::100]]
    return references, drafts


def words(*texts: str) -> list[list[str]]:
    """Texts split at spaces."""
    return [text.split() for text in texts]
