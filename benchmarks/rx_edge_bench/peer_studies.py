"""The studies that engines are timed on, and what they write: their own draft, or a given report.

A demo model's drafts are shorter than what radiologists write, and engines differ in what a token
costs beside an image. With given reports every engine computes as ever, and is then made to choose
the reference report's next token: the time is that of a draft of real length.

Does not cover: taking turns (`peers.py`), how an engine is made to (`peer_engines/`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rx_edge import guards
from rx_edge.bundle import Bundle
from rx_edge.config import CorpusConfig
from rx_edge.errors import InputError, UsageError
from rx_edge.prompting import encode
from rx_edge.radiograph import open_radiograph
from rx_edge.runtime.worklist_store import studies_below
from rx_edge_bench.deployment_loss import HELD
from rx_edge_bench.peer_engines.base import Picture
from rx_edge_export.mmproj_check import write_square

if TYPE_CHECKING:
    from rx_edge.train.data import Sample


def pictures(
    paths: Iterable[Path], bundle: Bundle, work: Path, reports: Mapping[Path, tuple[int, ...]]
) -> tuple[list[Picture], int]:
    """The usable studies with their squares and reports, and how many files were none.

    Args:
        paths: image files, and directories of them.
        work: where the squares go.

    Raises:
        UsageError: there is none.
    """
    found: list[Picture] = []
    refused = 0
    for path in (f for p in paths for f in (studies_below(p) if p.is_dir() else [p])):
        square = work / f"{len(found)}.png"
        try:
            guards.check_image(open_radiograph(path))
            write_square(path, bundle.manifest.image, square)
        except InputError:
            refused += 1
        else:
            found.append(Picture(path, square, reports.get(path)))
    if not found:
        raise UsageError(f"none of {refused} files is a usable chest radiograph; see --images")
    return found, refused


def held_out_reports(
    pairs: Path, tokenizer: Any, *, studies: int | None, tokens: int
) -> dict[Path, tuple[int, ...]]:
    """Image file -> token ids of its reference report, as a model is trained to write it.

    Args:
        pairs: a pairs.jsonl or its directory; its val and test studies with a whole report, one
            per patient: texts of one patient resemble each other, and ours remembers drafts.
        studies: at most so many, the same ones every time; None = all.
        tokens: what is longer is cut.

    Raises:
        ConfigError: the corpus cannot be read.
        UsageError: there is no such study.
    """
    from rx_edge.train.data import pairs_jsonl

    corpus = pairs_jsonl.read(pairs, CorpusConfig())
    samples = [s for name in HELD for s in corpus.split(name) if s.complete]
    samples.sort(key=lambda s: hashlib.sha256(s.id.encode()).hexdigest())
    single: dict[str, Sample] = {}
    for sample in samples:
        single.setdefault(sample.patient, sample)
    found = {
        s.image: tuple(encode(tokenizer, s.target)[:tokens])
        for s in list(single.values())[:studies]
        if s.image is not None
    }
    if not found:
        raise UsageError(
            f"{str(pairs)!r} has no study with a whole report in {' + '.join(HELD)}; "
            "name a corpus that has"
        )
    return found
