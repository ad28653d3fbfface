"""Which importance matrix? Quantise with none, a text-only and a multimodal one, and compare.

Every quantised file is compared with the float32 GGUF of the same merged model, through the same
engine and in exact arithmetic, on held-out studies and at every position of prompt, soft prompt
and report: what differs is then the rounding of the weights and nothing else. That the float32
GGUF is the trained model is proven elsewhere (`rx_edge_export.verify`).

Does not cover: drafts and labels (`deployment_loss.py`), and vision artefacts (torch encodes).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rx_edge.backends import llm_gguf
from rx_edge.backends.llm_gguf import GgufLanguage
from rx_edge.errors import UsageError
from rx_edge.metrics.bootstrap import Table, interval, resampled
from rx_edge.prompting import PromptIds
from rx_edge.types import FloatArray, SoftPrompt
from rx_edge_bench.deployment_loss import (
    BOOTSTRAP,
    HELD,
    data_note,
    log_probabilities,
    read_studies,
)
from rx_edge_bench.environment import environment
from rx_edge_export.steps import Progress

if TYPE_CHECKING:
    from rx_edge.model.report_model import ReportModel

SCHEMA = "rx-edge-imatrix/1"
MATRICES = ("none", "text", "multimodal")


@dataclass(frozen=True)
class Stream:
    """What the model reads of one study: prompt, soft prompt (N, D), prompt, target ids."""

    prompt: PromptIds
    soft: SoftPrompt
    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt.before) + len(self.soft) + len(self.prompt.after) + len(self.ids) - 1


@dataclass(frozen=True)
class Distance:
    """A quantised file against the float32 one on one study.

    Attributes:
        kl: nats per position (P,), float32 || quantised.
        changed: (P,) whether the most likely token is another one.
        targets: how many of the last positions predict the report.
        nll: nats, summed over the report's ids.
    """

    kl: Table
    changed: Table
    targets: int
    nll: float


@dataclass(frozen=True)
class Job:
    """Where weights and logits go, and with how many threads."""

    work: Path
    threads: int
    progress: Progress

    @property
    def merged(self) -> Path:
        return self.work / "merged"

    @property
    def full(self) -> Path:
        return self.work / "llm.F32.gguf"

    def logits(self, number: int) -> Path:
        return self.work / f"{number}.npy"


def measure(
    run: Path,
    pairs: Path,
    work: Path,
    *,
    file_types: Sequence[str] = ("Q4_K_M", "IQ4_NL"),
    fit: int = 32,
    check: int = 50,
    threads: int = 0,
    progress: Progress,
) -> dict[str, Any]:
    """Quantise the merged model of `run` in every way and compare.

    Args:
        work: an empty or new directory for weights and logits; about 1 GB and 30 MB per checked
            study for a 135M model. The caller removes it.
        fit: studies of the training split that the matrices are computed from.
        check: held-out studies that are compared on.
        threads: CPU threads; 0 = one per physical core.

    Returns:
        JSON-ready: per matrix and file type KL, change of the most likely token and of the
        reports' likelihood with 95 % intervals over studies, bits per weight; the matrices
        compared pairwise; environment.

    Raises:
        UsageError: `work` is not empty, or a split holds no study.
        ExportError: an unknown file type, or llama.cpp refuses.
    """
    _refuse(work, file_types)
    work.mkdir(parents=True, exist_ok=True)
    job = Job(work, threads, progress)
    fitted, checked = _prepare(job, run, pairs, fit, check)
    matrices = _matrices(job, fitted)
    nll = _write_reference(job, checked)
    tokens = sum(len(s.ids) for s in checked)
    return {
        "schema": SCHEMA,
        "reference": "float32 GGUF of the merged model, same engine, exact arithmetic",
        "kl": "nats, reference || quantised",
        "positions": "all: prompt, soft prompt and report; report: those that predict its tokens",
        "fit_studies": len(fitted),
        "n": len(checked),
        "positions_per_study": float(np.mean([len(s) for s in checked])),
        "bootstrap": BOOTSTRAP,
        "reference_nll_per_token": float(nll.sum() / tokens),
        "data": {"fit": data_note(pairs, ("train",)), "check": data_note(pairs, HELD)},
        "file_types": {name: _compared(job, name, matrices, checked, nll) for name in file_types},
        "environment": environment(),
    }


def _refuse(work: Path, file_types: Sequence[str]) -> None:
    from rx_edge_export.gguf_quantize import FILE_TYPES

    if work.exists() and any(work.iterdir()):
        raise UsageError(f"{str(work)!r} is not empty; name a new directory")
    if not file_types or set(file_types) - set(FILE_TYPES):
        raise UsageError(f"file types are {list(file_types)}; valid: {', '.join(FILE_TYPES)}")


def _compared(
    job: Job,
    file_type: str,
    matrices: Mapping[str, Mapping[str, FloatArray]],
    checked: Sequence[Stream],
    nll: Table,
) -> dict[str, Any]:
    """One file type with every matrix; a quantised file is removed once it is measured."""
    from rx_edge_export import gguf_quantize

    counts = resampled(len(checked))
    found, out = {}, {}
    for name in MATRICES:
        file = job.work / f"{name}.{file_type}.gguf"
        made = gguf_quantize.quantize(
            job.full, file, file_type=file_type, threads=job.threads, imatrix=matrices[name]
        )
        found[name] = list(_distances(job, file, checked))
        out[name] = {**_summary(found[name], nll, counts), **made}
        file.unlink()
    return {**out, "kl_differences": _differences(found, counts)}


def every_logit(language: GgufLanguage, stream: Stream) -> FloatArray:
    """Logits (P, V) after every position; the last target id is predicted and not fed.

    `prefill` keeps only the last row of embeddings, though llama.cpp can give all of them in the
    same pass. One by one they would take five times as long, hence the step below it.
    """
    language.rewind(0)
    before = language.step(np.asarray(stream.prompt.before, np.int32))
    soft = language._append(np.ascontiguousarray(stream.soft, np.float32), "all")
    rest = language.step(np.asarray([*stream.prompt.after, *stream.ids[:-1]], np.int32))
    out: FloatArray = np.concatenate([before, soft, rest])
    return out


def distance(wanted: FloatArray, found: FloatArray, ids: Sequence[int]) -> Distance:
    """Compare logits (P, V) with the reference's; the last rows predict `ids`."""
    p, q = _log_softmax(wanted), _log_softmax(found)
    changed = (wanted.argmax(-1) != found.argmax(-1)).astype(np.float64)
    kl: Table = (np.exp(p) * (p - q)).sum(-1)
    nll = -float(log_probabilities(found[-len(ids) :], ids).sum())
    return Distance(kl, changed, len(ids), nll)


def _prepare(
    job: Job, run: Path, pairs: Path, fit: int, check: int
) -> tuple[list[Stream], list[Stream]]:
    """Streams of both sets; writes the merged model and its float32 GGUF."""
    from rx_edge.model.report_model import load_run
    from rx_edge_export import llm_gguf as writer
    from rx_edge_export.merge_lora import merge

    model = load_run(run)
    fitted = _streams(job, model, pairs, ("train",), fit)
    checked = _streams(job, model, pairs, HELD, check)
    merge(model, job.merged, [])
    writer.write(job.merged, job.full, dtype="f32", name="imatrix comparison")
    return fitted, checked


def _streams(
    job: Job, model: ReportModel, pairs: Path, splits: Sequence[str], limit: int
) -> list[Stream]:
    import torch

    studies = read_studies(model, pairs, splits, limit)
    out = []
    for number, study in enumerate(studies, 1):
        with torch.inference_mode():
            soft = model.encoder(torch.from_numpy(study.pixels)).flatten(0, 1).numpy()
        out.append(Stream(model.prompt_for(study.indication), soft, study.ids))
        job.progress(f"encoding {' + '.join(splits)}", number, len(studies), "")
    return out


def _matrices(job: Job, fitted: Sequence[Stream]) -> dict[str, dict[str, FloatArray]]:
    from rx_edge_export import imatrix

    found: dict[str, dict[str, FloatArray]] = {"none": {}}
    for name in MATRICES[1:]:
        # `collect` adds the end token itself
        seen = [
            imatrix.Stream(
                s.prompt,
                s.soft if name == "multimodal" else None,
                [i for i in s.ids if i != s.prompt.end],
            )
            for s in fitted
        ]
        tick = functools.partial(_tick, job.progress, f"importance matrix: {name}", len(seen))
        found[name] = imatrix.collect(job.merged, seen, tick)
    return found


def _tick(progress: Progress, what: str, of: int, done: int) -> None:
    progress(what, done, of, "")


def _opened(job: Job, file: Path, streams: Sequence[Stream]) -> GgufLanguage:
    return llm_gguf.open(file, n_ctx=max(map(len, streams)), threads=job.threads, exact=True)


def _write_reference(job: Job, streams: Sequence[Stream]) -> Table:
    """The float32 model's logits of every study, to disk; returns nats per study."""
    nll = []
    with _opened(job, job.full, streams) as language:
        for number, stream in enumerate(streams):
            logits = every_logit(language, stream)
            np.save(job.logits(number), logits)
            nll.append(-float(log_probabilities(logits[-len(stream.ids) :], stream.ids).sum()))
            job.progress("float32", number + 1, len(streams), "")
    return np.asarray(nll, np.float64)


def _distances(job: Job, file: Path, streams: Sequence[Stream]) -> Iterator[Distance]:
    with _opened(job, file, streams) as language:
        for number, stream in enumerate(streams):
            wanted: FloatArray = np.load(job.logits(number))
            yield distance(wanted, every_logit(language, stream), stream.ids)
            job.progress(file.stem, number + 1, len(streams), "")


def _summary(rows: Sequence[Distance], reference: Table, counts: Table) -> dict[str, Any]:
    """Figures over all positions, and over those that predict the report."""
    nll = np.asarray([row.nll for row in rows])
    tokens = np.asarray([row.targets for row in rows], np.float64)
    return {
        "all_positions": _positions([(r.kl, r.changed) for r in rows], counts),
        "report_positions": _positions(
            [(r.kl[-r.targets :], r.changed[-r.targets :]) for r in rows], counts
        ),
        "nll_per_token": _mean(nll, tokens, counts),
        "nll_change": _mean(nll - reference, tokens, counts),
    }


def _positions(rows: Sequence[tuple[Table, Table]], counts: Table) -> dict[str, Any]:
    sizes = np.asarray([len(kl) for kl, _ in rows], np.float64)
    changed = np.asarray([c.sum() for _, c in rows])
    kl = np.concatenate([kl for kl, _ in rows])
    owner = np.repeat(np.arange(len(rows)), sizes.astype(int))
    order = np.argsort(kl)
    out: dict[str, Any] = {
        "kl_mean": _mean(np.asarray([kl.sum() for kl, _ in rows]), sizes, counts),
        "argmax_changed": _mean(changed, sizes, counts),
    }
    for name, share in (("kl_median", 0.5), ("kl_p99", 0.99)):
        many = np.asarray([_quantile(kl[order], c[owner[order]], share) for c in counts])
        low, high = interval(many)
        one = _quantile(kl[order], np.ones(len(kl)), share)
        out[name] = {"value": one, "low": low, "high": high}
    return out


def _differences(found: dict[str, list[Distance]], counts: Table) -> dict[str, Any]:
    """Mean KL at report positions, matrix against matrix on the same studies."""
    out = {}
    for better, worse in (("text", "none"), ("multimodal", "none"), ("multimodal", "text")):
        one, other = (
            np.asarray([r.kl[-r.targets :].sum() for r in found[name]]) for name in (better, worse)
        )
        sizes = np.asarray([r.targets for r in found[better]], np.float64)
        out[f"{better} - {worse}"] = _mean(one - other, sizes, counts)
    return out


def _mean(sums: Table, sizes: Table, counts: Table) -> dict[str, float | None]:
    low, high = interval((counts @ sums) / (counts @ sizes))
    return {"value": float(sums.sum() / sizes.sum()), "low": low, "high": high}


def _quantile(ordered: Table, weights: Table, share: float) -> float:
    """Smallest value with at least `share` of the weight at or below it."""
    total = np.cumsum(weights)
    return float(ordered[int(np.searchsorted(total, share * total[-1]))])


def _log_softmax(logits: FloatArray) -> Table:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    out: Table = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return out
