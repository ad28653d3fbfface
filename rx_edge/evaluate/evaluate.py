"""`rx-edge evaluate`: one system, or two on the same studies, with intervals and baselines.

The result is JSON-ready and holds no text and no id; the rows hold both, for the files that a
user asks for by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rx_edge.errors import ModelError, UsageError
from rx_edge.evaluate.answers import BASELINES, Answers, Progress, ask, constant_report
from rx_edge.evaluate.corpus import Corpus, open_corpus
from rx_edge.evaluate.systems import Settings, check, open_system
from rx_edge.metrics import meteor as meteors
from rx_edge.metrics import radeval
from rx_edge.metrics.baselines import TRAIN_LIMIT
from rx_edge.metrics.bootstrap import (
    INTERVAL,
    RESAMPLES,
    SEED,
    Sampled,
    Table,
    finite,
    p_value,
    resampled,
    sampled,
    swaps,
)
from rx_edge.metrics.label_scores import DEFAULT_POLICY, Policy, per_finding
from rx_edge.metrics.meteor import Meteor
from rx_edge.metrics.protocols import protocol
from rx_edge.metrics.scores import Metric, Texts, columns, metrics

SCHEMA = "rx-edge-evaluation/1"


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        data: a corpus: pairs.jsonl, or a directory in a layout that a training reader knows.
        limit, train_limit: at most so many studies to score, and for baselines.
        radeval: names of `rx_edge.metrics.radeval.KEYS` to try.
        reader: of the corpus; None = by its layout.
    """

    data: Path
    split: str = "test"
    protocol: str = "study-findings"
    policy: Policy = DEFAULT_POLICY
    limit: int | None = None
    train_limit: int = TRAIN_LIMIT
    resamples: int = RESAMPLES
    radeval: tuple[str, ...] = ()
    reader: str | None = None


@dataclass(frozen=True)
class Row:
    """One study of one system: texts, and every metric on this study alone."""

    system: str
    id: str
    reference: str
    draft: str
    empty: bool
    values: dict[str, float | None]


@dataclass(frozen=True)
class Evaluation:
    """`result`: JSON-ready, no text, no id. `rows`: with both, system by system."""

    result: dict[str, Any]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class _Scoring:
    """What every text is scored with, the same for all."""

    corpus: Corpus
    references: Texts
    policy: Policy
    meteor: Meteor | None
    counts: Table

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return metrics(self.meteor)

    def texts(self, drafts: Sequence[str]) -> Texts:
        return Texts(drafts, [self.corpus.tokens.draft(d) for d in drafts])

    def sums(self, drafts: Texts) -> dict[str, Table]:
        return columns(self.references, drafts, self.policy, self.meteor)

    def sampled(self, sums: dict[str, Table]) -> dict[str, Sampled]:
        return {m.name: sampled(m.figure, sums[m.sums], self.counts) for m in self.metrics}


def evaluate(
    systems: Sequence[Path], request: Request, settings: Settings, tick: Progress
) -> Evaluation:
    """Score one or two systems on the same studies.

    Raises:
        UsageError: what is asked for makes no sense; nothing was loaded.
        RxEdgeError: a system does not open, or its engine failed.
    """
    if not 1 <= len(systems) <= 2:
        raise UsageError(f"{len(systems)} systems are named; one is scored, two are compared")
    radeval.check(request.radeval)
    chosen = protocol(request.protocol)
    checked = [check(path, settings) for path in systems]
    corpus = open_corpus(
        request.data,
        request.split,
        chosen,
        request.limit,
        request.train_limit,
        request.reader,
        [prompt for _, prompt in checked],
    )
    same = constant_report(corpus)
    said = []
    for path, (what, _) in zip(systems, checked, strict=True):
        with open_system(path, settings) as system:  # one at a time: each may fill the memory
            said.append(ask(system, corpus, same, f"{what} {path.resolve().name}", tick))
    with _meteor() as (meteor, no_meteor):
        scoring = _scoring(corpus, request, meteor)
        result, rows = _score(scoring, said, tick)
    clinical, missing = _radeval(request, corpus, said)
    missing |= {"meteor": no_meteor} if no_meteor else {}
    missing |= {} if corpus.train else {"baselines": "the corpus has no training split"}
    for one, found in zip(result["systems"], clinical, strict=True):
        one["radeval"] = found
    return Evaluation({**_header(corpus, request), "missing": missing, **result}, rows)


def _header(corpus: Corpus, request: Request) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "protocol": asdict(corpus.tokens.protocol),
        "labels": {"rules": "CheXpert-phrase rule labels", "uncertain": request.policy},
        "data": corpus.note,
        "sampling": {
            "resamples": request.resamples,
            "seed": SEED,
            "interval": INTERVAL,
            "over": "studies",
            "test": "paired approximate randomisation, two-sided",
        },
        "baselines": BASELINES if corpus.train else {},
    }


@contextlib.contextmanager
def _meteor() -> Iterator[tuple[Meteor | None, str | None]]:
    """METEOR, or None and why."""
    reason = meteors.missing()
    if reason:
        yield None, reason
    else:
        with Meteor() as running:
            yield running, None


def _scoring(corpus: Corpus, request: Request, meteor: Meteor | None) -> _Scoring:
    raw = [s.text for s in corpus.studies]
    references = Texts(raw, [corpus.tokens.reference(text) for text in raw])
    counts = resampled(len(raw), request.resamples)
    return _Scoring(corpus, references, request.policy, meteor, counts)


def _score(
    scoring: _Scoring, said: Sequence[Answers], tick: Progress
) -> tuple[dict[str, Any], tuple[Row, ...]]:
    found, kept = [], []
    rows: list[Row] = []
    for done, answers in enumerate(said, 1):
        texts = scoring.texts(answers.drafts)
        sums = scoring.sums(texts)
        many = scoring.sampled(sums)
        # two systems may have one label: the same bundle name in two places
        name = f"{done}: {answers.about['kind']} {answers.about['label']}"
        found.append({"name": name, **_of_system(scoring, answers, texts, sums, many)})
        rows += _rows(scoring, name, texts, sums)
        kept.append((sums, many))
        tick("scoring", done, len(said), "")
    result: dict[str, Any] = {"systems": found}
    if len(said) == 2:
        result["comparison"] = {
            "same_encoder": len({a.about.get("encoder_sha256") for a in said}) == 1,
            "identical_drafts": _same(said),
            "metrics": _compare(scoring, *kept),
        }
    return result, tuple(rows)


def _of_system(
    scoring: _Scoring,
    answers: Answers,
    texts: Texts,
    sums: dict[str, Table],
    many: dict[str, Sampled],
) -> dict[str, Any]:
    baselines = {}
    for name, written in answers.baselines.items():
        other = scoring.sampled(scoring.sums(scoring.texts(written)))
        baselines[name] = {
            "metrics": {k: asdict(v.estimate()) for k, v in other.items()},
            "system_minus_baseline": {k: asdict(many[k].minus(v)) for k, v in other.items()},
        }
    return {
        **answers.about,
        "empty": sum(not t for t in texts.tokens),
        "refused": answers.refused,
        "metrics": {k: asdict(v.estimate()) for k, v in many.items()},
        "findings": per_finding(sums["labels"]),
        "baselines": baselines,
    }


def _compare(
    scoring: _Scoring,
    one: tuple[dict[str, Table], dict[str, Sampled]],
    other: tuple[dict[str, Table], dict[str, Sampled]],
) -> dict[str, Any]:
    """Second system minus first, per metric."""
    swapped = swaps(len(scoring.counts[0]), len(scoring.counts))
    out = {}
    for metric in scoring.metrics:
        a, b = one[1][metric.name], other[1][metric.name]
        out[metric.name] = {
            **asdict(b.minus(a)),
            "percent": finite(100.0 * (b.value - a.value) / a.value) if a.value else None,
            "p": p_value(metric.figure, one[0][metric.sums], other[0][metric.sums], swapped),
        }
    return out


def _same(said: Sequence[Answers]) -> float:
    one, other = said[0].drafts, said[1].drafts
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def _rows(scoring: _Scoring, system: str, texts: Texts, sums: dict[str, Table]) -> Iterator[Row]:
    each = {m.name: m.figure(sums[m.sums]) for m in scoring.metrics}
    for i, study in enumerate(scoring.corpus.studies):
        values = {name: finite(column[i]) for name, column in each.items()}
        draft = texts.raw[i]
        yield Row(system, study.id, study.text, draft, not texts.tokens[i], values)


def _radeval(
    request: Request, corpus: Corpus, said: Sequence[Answers]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """RadEval's figures per system, and why the others are missing."""
    found: list[dict[str, Any]] = [{} for _ in said]
    missing: dict[str, str] = {}
    references = [s.text for s in corpus.studies]
    for name in radeval.KEYS:
        reason = radeval.missing(name, name in request.radeval)
        try:
            for one, answers in zip(found, said, strict=True):
                one.update({} if reason else radeval.score(name, references, answers.drafts))
        except ModelError as error:
            reason = str(error)
        missing |= {name: reason} if reason else {}
    return found, missing
