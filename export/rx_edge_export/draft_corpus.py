"""Which reports go into `drafts.bin`: the training split of the corpora that the run learned from.

Validation and test reports never do. "auto" takes the corpora that the run's recipe names, where
they are on this machine and still are those that the run was trained on (the run's data manifest
tells); what is left out is noted. Any other report text can be named instead, or "none".

**Whoever has the bundle can read these reports**: they must be de-identified, and their licence
goes into the manifest.

Does not cover: the file (`drafts.py`) and the text that a model learns from (`rx_edge.train.data`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rx_edge.bundle import describe
from rx_edge.config import CorpusConfig, TrainRecipe
from rx_edge.draft_index import size
from rx_edge.errors import ConfigError, UsageError
from rx_edge.model.catalogue import PACKAGES, fetched_dir
from rx_edge.model.language import tokenizer_file
from rx_edge.prompting import load_tokenizer, prompt_ids
from rx_edge.train import data
from rx_edge.train.batching import target_ids
from rx_edge.train.data import Sample
from rx_edge_export.drafts import Tokens, token_width

AUTO, NONE = "auto", "none"
_IU = PACKAGES["iu-reports"]


# Corpora that anybody may read. The others need a signed agreement, and a bundle is passed on.
OPEN = ("pairs-jsonl", "openi-xml", "iu-kaggle")


@dataclass(frozen=True)
class Source:
    """One corpus. No path, id or text of it is in here.

    Attributes:
        sha256: over ids and targets of its training split.
        licence: as far as the corpus says.
    """

    name: str
    reports: int
    sha256: str
    licence: str


@dataclass(frozen=True)
class DraftCorpus:
    """Reports as training tokenises them: ids (T,) each, the end token last where it is known.

    Attributes:
        left_out: corpora of the run whose reports are not in it, and why.
    """

    reports: tuple[Tokens, ...]
    tokenizer_sha256: str
    sources: tuple[Source, ...]
    left_out: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of their `drafts.bin`; 0 where there is none."""
        if not self.reports:
            return 0
        return size(len(self.reports), sum(map(len, self.reports)), token_width(self.reports))

    @property
    def sha256(self) -> str:
        """Over all that decides the index."""
        digest = hashlib.sha256(self.tokenizer_sha256.encode())
        for report in self.reports:
            digest.update(len(report).to_bytes(8, "little") + report.astype("<u4").tobytes())
        return digest.hexdigest()

    @property
    def licences(self) -> str:
        """Of all sources; "" where there is none."""
        return "; ".join(f"{s.name}: {s.licence}" for s in self.sources)


def load(run: Path, recipe: TrainRecipe, spec: str) -> DraftCorpus:
    """Read and tokenise the training reports that `spec` names.

    Args:
        spec: "auto", "none", a pairs.jsonl or its directory, or a directory of Open-i XML.

    Raises:
        UsageError: the named corpus is absent or has no training reports.
        ConfigError, ModelError: it is damaged, or there is no tokenizer here.
    """
    left_out: list[str] = []
    if spec == NONE:
        found = {}
    elif spec == AUTO:
        found = dict(_of_the_run(run, recipe, left_out))
    else:
        found = {"drafts_from": _named(recipe, spec)}
    file = tokenizer_file(recipe.model.language)
    tokenizer = load_tokenizer(file)
    end = prompt_ids(recipe.prompt, tokenizer).end
    reports, sources = [], []
    for name, (config, samples) in found.items():
        reports += [
            np.asarray(target_ids(tokenizer, end, s, config.max_target_tokens), np.uint32)
            for s in samples
        ]
        rows = "\n".join(_row(s) for s in samples)
        digest = hashlib.sha256(rows.encode()).hexdigest()
        sources.append(Source(name, len(samples), digest, _licence(config)))
    return DraftCorpus(tuple(reports), describe(file).sha256, tuple(sources), tuple(left_out))


def kind(spec: str) -> str:
    """`spec` without the path that it may be."""
    return spec if spec in (AUTO, NONE) else "named"


def lineage(corpus: DraftCorpus) -> dict[str, Any]:
    """What the manifest says about `drafts.bin`."""
    return {
        "reports": len(corpus.reports),
        "tokens": sum(map(len, corpus.reports)),
        "split": "train",
        "sources": [vars(source) for source in corpus.sources],
        "left_out": list(corpus.left_out),
    }


def _of_the_run(
    run: Path, recipe: TrainRecipe, left_out: list[str]
) -> Iterator[tuple[str, tuple[CorpusConfig, list[Sample]]]]:
    """Corpora that a stage learned from, in the recipe's order; reasons go to `left_out`."""
    known = _trained_on(run)
    used = {name for stage in recipe.stages for name in stage.data}
    for name, config in recipe.data.items():
        if name not in used:
            continue
        if config.reader not in OPEN:
            left_out.append(f"{name}: reports behind an agreement do not go into a bundle unasked")
            continue
        here = _here(config)
        if here is None:
            left_out.append(f"{name}: not on this machine")
            continue
        try:
            samples = data.read(name, here).split("train")
        except ConfigError:
            left_out.append(f"{name}: cannot be read on this machine")
            continue
        if {_row(s) for s in samples} != known.get(name):
            left_out.append(f"{name}: not the reports that the run was trained on")
            continue
        yield name, (here, samples)


def _named(recipe: TrainRecipe, spec: str) -> tuple[CorpusConfig, list[Sample]]:
    path = _expanded(spec)
    if not spec or not path.exists():
        raise UsageError(
            f"--drafts-from {spec!r} does not exist; name a pairs.jsonl, its directory or a "
            f'directory of Open-i XML, "{AUTO}" or "{NONE}"'
        )
    xml = path.is_dir() and not (path / "pairs.jsonl").is_file()
    reader: Literal["openi-xml", "pairs-jsonl"] = "openi-xml" if xml else "pairs-jsonl"
    # cut as the run's own corpus of this kind is, where it has one
    kinds = (c for c in recipe.data.values() if c.reader == reader)
    config = replace(next(kinds, CorpusConfig()), reader=reader, path=spec)
    samples = data.read("drafts_from", config).split("train")
    if not samples:
        raise UsageError(f"--drafts-from {spec!r} has no report in its training split")
    return config, samples


def _here(config: CorpusConfig) -> CorpusConfig | None:
    """`config` with a path that exists: the recipe's own, or that of `rx-edge models fetch`."""
    paths = [config.path]
    if config.reader == "openi-xml":
        paths.append(str(fetched_dir(_IU.name)))
    found = (path for path in paths if path and _expanded(path).exists())
    path = next(found, None)
    return None if path is None else replace(config, path=path)


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser()


def _row(sample: Sample) -> str:
    """As in data_manifest.json, the image apart: hashes of id and target."""
    parts = (hashlib.sha256(text.encode()).hexdigest()[:16] for text in (sample.id, sample.target))
    return " ".join(parts)


def _trained_on(run: Path) -> Mapping[str, set[str]]:
    """`_row`s of the training split per corpus of the run."""
    try:
        manifest = json.loads((run / "data_manifest.json").read_text(encoding="utf-8"))
        return {
            name: {
                " ".join(row.split()[1:3]) for row in entry["studies"] if row.startswith("train ")
            }
            for name, entry in manifest.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # nothing can be shown to be the run's own


def _licence(config: CorpusConfig) -> str:
    """What the corpus says about itself; texts of different licences may be in one file."""
    if config.reader != "pairs-jsonl":
        return _IU.licence
    path = _expanded(config.path)
    file = path / "pairs.jsonl" if path.is_dir() else path
    rows: Sequence[dict[str, Any]] = [
        json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()
    ]
    said = {str(r.get("licence") or "not stated") for r in rows if r["split"] == "train"}
    return ", ".join(sorted(said))
