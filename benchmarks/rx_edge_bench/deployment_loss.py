"""What deployment costs: the trained model and its bundle on the same held-out studies.

`verify` asks whether a bundle is the trained model; this asks what the difference means for the
reports. torch (float32, adapter unmerged) and the bundle (one vision artefact, one language
artefact at a time, production arithmetic) see the same pixels, the same prompt and the
same limit of tokens, and decode greedily. Every metric is a function of sums over studies, so
that one paired bootstrap gives the interval of its change.

Does not cover: whether the trained model is any good, clinical metrics that need downloaded
models, and beam search.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from rx_edge.backends.base import encode_views
from rx_edge.bundle import Bundle, describe, open_bundle
from rx_edge.config import CorpusConfig
from rx_edge.errors import UsageError
from rx_edge.metrics.bootstrap import (
    RESAMPLES,
    SEED,
    Figure,
    Table,
    finite,
    interval,
    ratio,
    resampled,
)
from rx_edge.metrics.labels import facts
from rx_edge.optional import require
from rx_edge.prompting import layout
from rx_edge.runtime.session import Session, open_checked
from rx_edge.types import FloatArray, ImageTensor, SoftPrompt
from rx_edge_bench.environment import environment
from rx_edge_bench.peer_check import first_difference
from rx_edge_export.golden import DRAFT_TOKENS, Drafts
from rx_edge_export.steps import Progress
from rx_edge_export.verify_drafts import TIE, greedy

if TYPE_CHECKING:
    from rx_edge.model.report_model import ReportModel
    from rx_edge.train.data import Sample

SCHEMA = "rx-edge-deployment-loss/1"
HELD = ("val", "test")
BOOTSTRAP = {"resamples": RESAMPLES, "seed": SEED, "interval": 0.95, "over": "studies"}
LIMIT_PERCENT = 1.0  # of the trained model's figure: what a Q8_0 bundle is meant to stay within

# which way is better, and the figure as it follows from sums over studies: (R, k) -> (R,)
Metric: TypeAlias = tuple[str, Figure]
NOTE = (
    "Study texts and images are read at run time under their own licences and are not part of "
    "this file; a model trained on them is for non-commercial research."
)


@dataclass(frozen=True)
class Held:
    """One study: what it is, what the model reads, and the target ids that are scored."""

    sample: Sample
    pixels: ImageTensor  # (V, 3, S, S)
    ids: tuple[int, ...]  # the end token included where the report is complete
    indication: str


@dataclass(frozen=True)
class Answers:
    """What one system said, study by study."""

    nll: tuple[float, ...]  # nats, summed over the study's target ids
    drafts: tuple[tuple[int, ...], ...]  # greedy ids, the end token excluded
    texts: tuple[str, ...]


def measure(
    run: Path,
    bundle: Path,
    pairs: Path,
    languages: Sequence[str],
    *,
    vision: str | None = None,
    limit: int | None = None,
    threads: int | None = None,
    allow_unverified: bool = False,
    progress: Progress,
) -> dict[str, Any]:
    """Compare `bundle` with the `run` that it was exported from, on held-out studies.

    Args:
        pairs: a pairs.jsonl or its directory; its val and test studies are used.
        languages: language artefacts by name, e.g. "gguf:Q8_0".
        vision: a vision artefact by name; None = the bundle's default.
        limit: at most so many studies, the same ones every time; None = all.
        threads: CPU threads of the bundle's engines; None = as the bundle says.
        allow_unverified: measure a bundle without a passing verdict; the result says so.

    Returns:
        JSON-ready: per artefact and metric the torch value, the bundle's, and the change with
        its 95 % interval; how many drafts changed; environment. No report text, no file name.

    Raises:
        UsageError: the bundle is not of this run, or there is no held-out study.
        BundleError: refused, or it has no such artefact.
        MissingExtraError: rouge-score or sacrebleu is not installed.
    """
    from rx_edge.model.report_model import load_run

    _rouge(), _sacrebleu()  # missing packages are reported before the long part
    opened = open_bundle(bundle, allow_unverified=allow_unverified)
    tower, chosen = opened.vision(vision), [opened.language(name) for name in languages]
    model = load_run(run)
    refuse_other_run(model, opened)
    studies = read_studies(model, pairs, HELD, limit)
    said, margins = _of_torch(model, studies, progress)
    del model  # free its memory before engines are opened
    found = {}
    for artifact in chosen:
        with open_checked(opened, vision=tower, language=artifact, threads=threads) as session:
            answers = _of_bundle(session, studies, progress)
            found[artifact.name] = compare(studies, said, answers, margins)
    note = {"data": data_note(pairs, HELD), "artifacts": found, "environment": environment()}
    return {**_header(opened, tower.name, studies), **note}


def _header(opened: Bundle, vision: str, studies: Sequence[Held]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "bundle_sha256": opened.digest,
        "verified": opened.manifest.verification.passed,
        "model": opened.manifest.name,
        "vision": vision,
        "reference": "torch float32, adapter unmerged",
        "n": len(studies),
        "n_with_report": sum(s.sample.complete for s in studies),
        "target_tokens": sum(len(s.ids) for s in studies),
        "max_new_tokens": DRAFT_TOKENS,
        "bootstrap": BOOTSTRAP,
        "limit_percent": LIMIT_PERCENT,
    }


def refuse_other_run(model: ReportModel, bundle: Bundle) -> None:
    """A `UsageError` where the encoder's hash says that the bundle was not exported from it."""
    from rx_edge.model.digest import weights_digest

    found, wanted = bundle.manifest.parts.get("encoder", ""), weights_digest(model.encoder)
    if found != wanted:
        raise UsageError(
            f"bundle {str(bundle.root)!r} was exported from another run (encoder {found[:8]}, "
            f"this run has {wanted[:8]}); name the run that it was made from"
        )


def read_studies(
    model: ReportModel, pairs: Path, splits: Sequence[str], limit: int | None
) -> list[Held]:
    """The studies of `splits` with an image, in an order that does not depend on the file.

    Of each what the model reads: one view or two, its indication or none.

    Raises:
        UsageError: there is none.
        ConfigError, InputError: the corpus, or an image in it, cannot be read.
    """
    from rx_edge import image
    from rx_edge.train.batching import examples
    from rx_edge.train.data import pairs_jsonl
    from rx_edge.train.data.images import open_images

    views, recipe = model.recipe.prompt.views, model.recipe.image
    config = CorpusConfig() if views == "one" else CorpusConfig(views=views)
    corpus = pairs_jsonl.read(pairs, config)
    samples = [s for name in splits for s in corpus.split(name) if s.image is not None]
    samples.sort(key=lambda s: hashlib.sha256(s.id.encode()).hexdigest())
    if not samples[:limit]:
        raise UsageError(
            f"{str(pairs)!r} has {len(samples)} studies in {' + '.join(splits)} and --limit is "
            f"{limit}; at least one study is needed"
        )
    return [
        Held(
            sample=e.sample,
            pixels=np.concatenate([image.prepare(r, recipe) for r in open_images(e.sample)]),
            ids=e.ids,
            indication=e.indication,
        )
        for e in examples(model, samples[:limit], config.max_target_tokens)
    ]


def data_note(pairs: Path, splits: Sequence[str]) -> dict[str, Any]:
    """Hash, licences and splits of the corpus; no names."""
    file = pairs / "pairs.jsonl" if pairs.is_dir() else pairs
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    licences = Counter(row.get("licence") or "unstated" for row in rows if row["split"] in splits)
    return {
        "sha256": describe(file).sha256,
        "splits": list(splits),
        "licences": dict(sorted(licences.items())),
        "note": NOTE,
    }


def compare(
    studies: Sequence[Held], said: Answers, found: Answers, margins: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Every metric of both systems, the change, and how many drafts differ.

    Args:
        margins: by how many logits torch preferred each token of `said.drafts`, the end last.
    """
    counts = resampled(len(studies))
    one, other = _columns(studies, said), _columns(studies, found)
    metrics = {
        name: paired(metric, one[name], other[name], counts) for name, metric in METRICS.items()
    }
    first = [first_difference(a, b) for a, b in zip(said.drafts, found.drafts, strict=True)]
    decided = [at is not None and m[at] >= TIE for at, m in zip(first, margins, strict=True)]
    return {
        "metrics": metrics,
        "drafts": {
            "identical": _share([at is None for at in first], counts),
            "changed_where_torch_was_decided": _share(decided, counts),
            "decided_margin_logits": TIE,
        },
    }


def paired(metric: Metric, one: Table, other: Table, counts: Table) -> dict[str, Any]:
    """A metric of two systems on the same studies; `one` is the reference."""
    better, figure = metric
    a, b = (float(figure(t.sum(0, keepdims=True))[0]) for t in (one, other))
    many_a, many_b = figure(counts @ one), figure(counts @ other)
    low, high = interval(many_b - many_a)
    with np.errstate(divide="ignore", invalid="ignore"):
        least, most = interval(100.0 * (many_b - many_a) / many_a)
    percent = 100.0 * (b - a) / a if a else np.nan
    ends = [x for x in (least, most) if x is not None]
    return {
        "better": better,
        "torch": finite(a),
        "bundle": finite(b),
        "change": finite(b - a),
        "change_low": low,
        "change_high": high,
        "percent": finite(percent),
        "percent_low": least,
        "percent_high": most,
        "within_limit": bool(abs(percent) <= LIMIT_PERCENT),  # False where it is unknown
        "interval_within_limit": bool(ends) and max(map(abs, ends)) <= LIMIT_PERCENT,
    }


def log_probabilities(logits: FloatArray, ids: Sequence[int]) -> Table:
    """Natural-log probability of each id under its row of logits (T, V) -> (T,)."""
    rows = logits.astype(np.float64)
    top = rows.max(-1)
    picked = rows[np.arange(len(ids)), np.asarray(ids)]
    out: Table = picked - top - np.log(np.exp(rows - top[:, None]).sum(-1))
    return out


def bundle_logits(
    session: Session, soft: SoftPrompt, ids: Sequence[int], indication: str = ""
) -> FloatArray:
    """The bundle's logits (T, V) that predict each of `ids` after the prompt."""
    session.language.rewind(0)
    rows = [session.language.prefill(layout(session.prompt_for(indication), soft))[None]]
    if len(ids) > 1:
        rows.append(session.language.step(np.asarray(ids[:-1], np.int32)))
    out: FloatArray = np.concatenate(rows)
    return out


@functools.cache
def _rouge() -> Any:
    return require("rouge_score.rouge_scorer", extra="bench").RougeScorer(["rougeL"])


@functools.cache
def _sacrebleu() -> Any:
    return require("sacrebleu.metrics", extra="bench").BLEU()


def _of_torch(
    model: ReportModel, studies: Sequence[Held], progress: Progress
) -> tuple[Answers, tuple[tuple[float, ...], ...]]:
    import torch

    from rx_edge_export.calibration import Study
    from rx_edge_export.reference import draft

    total = len(studies)
    plain = [Study(s.sample.id, s.pixels, s.sample.target, s.indication) for s in studies]
    said: Drafts = draft(model, plain, lambda n: progress("torch drafts", n, total, ""))
    nll = []
    for number, (study, soft) in enumerate(zip(studies, said.soft_prompts, strict=True), 1):
        fed = list(study.ids[:-1])
        logits = model.teacher_forced(torch.from_numpy(soft), fed, study.indication).numpy()
        nll.append(-float(log_probabilities(logits, study.ids).sum()))
        progress("torch likelihood", number, total, "")
    return Answers(tuple(nll), said.tokens, _texts(model.tokenizer, said.tokens)), said.margins


def _of_bundle(session: Session, studies: Sequence[Held], progress: Progress) -> Answers:
    nll, drafts, what = [], [], session.artifact.name
    for number, study in enumerate(studies, 1):
        soft = encode_views(session.vision, study.pixels)
        logits = bundle_logits(session, soft, study.ids, study.indication)
        nll.append(-float(log_probabilities(logits, study.ids).sum()))
        # one token at a time, as production decodes
        drafts.append(greedy(session, soft, (), study.indication))
        progress(what, number, len(studies), "")
    return Answers(tuple(nll), tuple(drafts), _texts(session.tokenizer, drafts))


def _texts(tokenizer: Any, drafts: Iterable[Sequence[int]]) -> tuple[str, ...]:
    return tuple(tokenizer.decode(list(ids), skip_special_tokens=True).strip() for ids in drafts)


def _columns(studies: Sequence[Held], said: Answers) -> dict[str, Table]:
    """What each metric sums, (studies, k). Text metrics skip studies without a written report."""
    rows = []
    for study, nll, text in zip(studies, said.nll, said.texts, strict=True):
        wanted = study.sample.target if study.sample.complete else None
        row: dict[str, Sequence[float]] = {
            "nll_per_token": [nll, len(study.ids)],
            "view_accuracy": _view(study.sample.view, text),
            "rouge_l": [0.0] * 2 if wanted is None else [_rouge_l(wanted, text), 1.0],
            "bleu_4": [0.0] * 10 if wanted is None else _bleu_sums(wanted, text),
            "label_f1": [0.0] * 3 if wanted is None else _labels(wanted, text),
        }
        rows.append(row)
    return {name: np.asarray([row[name] for row in rows], np.float64) for name in METRICS}


def _rouge_l(wanted: str, text: str) -> float:
    return float(_rouge().score(wanted, text)["rougeL"].fmeasure)


def _view(view: str | None, text: str) -> list[float]:
    from rx_edge.train.data.pairs_jsonl import VIEW_SENTENCE

    return [0.0, 0.0] if view is None else [float(text.startswith(VIEW_SENTENCE[view])), 1.0]


def _bleu_sums(wanted: str, text: str) -> list[float]:
    """Matched n-grams, all n-grams (n = 1..4), length of draft and of reference."""
    score = _sacrebleu().corpus_score([text], [[wanted]])
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def _labels(wanted: str, text: str) -> list[float]:
    """TP, FP and FN over findings that are present."""
    one, other = ({f.finding for f in facts(t) if f.status == "present"} for t in (wanted, text))
    return [float(len(one & other)), float(len(other - one)), float(len(one - other))]


def _f1(sums: Table) -> Table:
    return ratio(sums @ np.array([[2.0, 2.0], [0.0, 1.0], [0.0, 1.0]]))  # 2 TP / (2 TP + FP + FN)


def _bleu(sums: Table) -> Table:
    """Corpus BLEU in [0, 100] as sacrebleu computes it (13a tokens, exponential smoothing)."""
    rows = ([int(v) for v in row] for row in sums.round())
    return np.asarray(
        [_sacrebleu().compute_bleu(r[:4], r[4:8], r[8], r[9]).score for r in rows], np.float64
    )


def _share(hits: Sequence[bool], counts: Table) -> dict[str, Any]:
    low, high = interval(counts @ np.asarray(hits, np.float64) / len(hits))
    return {"share": float(np.mean(hits)), "low": low, "high": high, "studies": sum(hits)}


METRICS: dict[str, Metric] = {
    "nll_per_token": ("lower", ratio),  # nats
    "view_accuracy": ("higher", ratio),
    "rouge_l": ("higher", ratio),
    "bleu_4": ("higher", _bleu),
    "label_f1": ("higher", _f1),
}
