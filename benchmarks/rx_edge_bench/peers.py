"""Other engines beside ours, in time: the same weights, images and prompt, greedy, taking turns.

Two tables. *End to end*: image file to final text. *Language model alone*: random token ids in, a
fixed number of tokens out, with as many as our drafts had; engines that take no soft prompt can be
compared only here, and `llama.cpp raw` is what `llama-bench` times, so that ours / raw is the
overhead of our own code. Before the next study every engine has its turn, in an order of chance
and after a rest, in which the idle threads of the engine before stop spinning. No study is drafted
from memory of an earlier round.

A ratio is seconds of the engine / seconds of ours, the median over studies, with a 95 % interval by
a bootstrap over studies; from 30 studies on also for short, middling and long drafts, because what
an engine costs per token and per image differ. What cannot run here is reported with the reason,
never left out.

Does not cover: whether other engines say the same on text prompts (`peer_check.py`), servers.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np

from rx_edge.bundle import Bundle, open_bundle
from rx_edge.errors import UsageError
from rx_edge.machine import physical_cores
from rx_edge.prompting import PromptIds, load_tokenizer, prompt_ids
from rx_edge_bench.environment import environment, fingerprint
from rx_edge_bench.latency import median, spread
from rx_edge_bench.peer_check import LLAMA_CPP, first_difference
from rx_edge_bench.peer_engines import hf, llama_mtmd, llama_raw, openvino_lm, ours
from rx_edge_bench.peer_engines.base import (
    Answer,
    Drafter,
    Engine,
    Job,
    Picture,
    Writer,
    random_ids,
)
from rx_edge_bench.peer_studies import held_out_reports, pictures
from rx_edge_bench.turns import Rounds, ratio, take_turns

SCHEMA = "rx-edge-peers-latency/2"
OURS, PLAIN = "rx-edge", "rx-edge, drafts off"
INT8 = "rx-edge, vision int8"
MTMD, RAW, OPENVINO = "llama.cpp multimodal", "llama.cpp raw", "OpenVINO GenAI"
SOFT = "rx-edge, soft prompt"
OVERHEAD_LIMIT = 1.03  # ours / llama.cpp raw
NOTES = (
    "llama.cpp multimodal reads the 8-bit PNG square of `rx-edge prepare`, made before and not "
    "timed; ours and transformers read and prepare the study itself. That favours llama.cpp.",
    "transformers computes with float32 weights, not with those of the GGUF.",
    "OpenVINO GenAI takes no soft prompt: its language half alone, with its own defaults "
    "(8-bit KV cache).",
    "Language model alone: prompts are random token ids. llama.cpp raw is what llama-bench times.",
)
LEAST_STUDIES = 10  # a bootstrap over fewer gives intervals that are too narrow
FEW = f"Fewer than {LEAST_STUDIES} studies: a trial; the intervals are too narrow to conclude from."

E = TypeVar("E", bound=Engine)
Tick: TypeAlias = Callable[[str, int, int], None]
Margin: TypeAlias = Callable[[int, Sequence[int]], float]  # of our choice in a study, after ids


@dataclass(frozen=True)
class Candidate(Generic[E]):
    """An engine that may run here. `missing`: why it does not, known without opening it."""

    open: Callable[[], E]
    missing: str | None = None


def measure(
    root: Path,
    studies: Sequence[Path],
    *,
    run: Path | None = None,
    reports: Path | None = None,
    limit: int | None = None,
    repeats: int = 3,
    language: str | None = None,
    max_new_tokens: int | None = None,
    threads: int | None = None,
    tick: Tick = lambda *_: None,
) -> dict[str, Any]:
    """Time every engine on every study.

    Args:
        studies: image files, and directories of them; empty = the bundle's canaries.
        run: the training run of the bundle, for transformers; None = reported as missing.
        reports: a pairs.jsonl or its directory instead of `studies`: every engine writes the
            reference report of each held-out study (`peer_studies.py`).
        limit: at most so many of those.
        language: a GGUF artefact; None = the bundle's default.
        max_new_tokens: most tokens of a draft; None = as the bundle says.
        threads: CPU threads of every engine; None = as the bundle says, else one per core.

    Returns:
        JSON-ready, schema `SCHEMA`; seconds, counts and ratios. No text and no file name.

    Raises:
        UsageError: no usable study, both studies and reports, or the artefact is no GGUF.
        BundleError, BackendError: our own engine refuses.
    """
    bundle = open_bundle(root)
    job, prompt = _job(bundle, run, language, max_new_tokens, threads)
    given = _reports(job, studies, reports, limit)
    named = studies or list(given) or [bundle.path(name) for name in bundle.manifest.canaries]
    with tempfile.TemporaryDirectory(prefix="rx-edge-peers-") as work:
        found, refused = pictures(named, bundle, Path(work), given)
        whole, answers = _end_to_end(job, found, repeats, tick)
    read = len(prompt.before) + bundle.manifest.soft_tokens + len(prompt.after)
    written = max(2, round(median([len(rounds[0].ids) for rounds in answers])))
    alone = _language_alone(job, (read, written), len(found), repeats, tick)
    return {
        **_header(job),
        "texts": "reference reports, dictated" if given else "own drafts",
        "studies": len(found),
        "studies_refused": refused,
        "repeats": repeats,
        "notes": [*NOTES, *([FEW] if len(found) < LEAST_STUDIES else [])],
        "end_to_end": whole,
        "language_alone": alone,
        "fingerprint": fingerprint(),
        "environment": environment(),
    }


def _header(job: Job) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "bundle_sha256": job.bundle.digest,
        "model": job.bundle.manifest.name,
        "artifact": job.artifact.name,
        "threads": job.threads,
        "max_new_tokens": job.limit,
    }


def _job(
    bundle: Bundle, run: Path | None, language: str | None, limit: int | None, threads: int | None
) -> tuple[Job, PromptIds]:
    manifest, artifact = bundle.manifest, bundle.language(language)
    if artifact.format != "llm_gguf":
        raise UsageError(
            f"other engines read GGUF: {artifact.name!r} is none; name one, e.g. --llm gguf:Q8_0"
        )
    prompt = prompt_ids(manifest.prompt, load_tokenizer(bundle.path(manifest.tokenizer)))
    job = Job(
        bundle=bundle,
        artifact=artifact,
        run=run,
        end=prompt.end,
        limit=limit or manifest.generate.max_new_tokens,
        threads=threads or manifest.generate.threads or physical_cores(),
    )
    return job, prompt


def _reports(
    job: Job, studies: Sequence[Path], reports: Path | None, limit: int | None
) -> dict[Path, tuple[int, ...]]:
    """What is dictated, per image file; empty where engines write their own drafts."""
    if reports is None:
        if limit is not None:
            raise UsageError("--limit counts the studies of --reports; name those too")
        return {}
    if studies:
        raise UsageError("--images and --reports both name studies; give one of them")
    tokenizer = load_tokenizer(job.bundle.path(job.bundle.manifest.tokenizer))
    return held_out_reports(reports, tokenizer, studies=limit, tokens=job.limit)


# --- end to end ---------------------------------------------------------------------------------


def _end_to_end(
    job: Job, studies: Sequence[Picture], repeats: int, tick: Tick
) -> tuple[dict[str, Any], Rounds[Answer]]:
    """A row per engine; and our answers, drafts off."""
    merged = functools.cache(lambda: hf.load_merged(job))  # both caches share it
    absent = hf.is_available(job)
    peers: dict[str, Candidate[Drafter]] = {
        MTMD: Candidate(lambda: llama_mtmd.LlamaMtmd(job), llama_mtmd.is_available(job))
    }
    for name, cache in hf.CACHES.items():
        peers[name] = Candidate(functools.partial(hf.Transformers, merged, job, cache), absent)
    with ExitStack() as stack:
        plain = ours.open_ours(job, drafts=False)
        stack.enter_context(plain)
        drafting = stack.enter_context(ours.open_ours(job, drafts=True))
        engines: dict[str, Drafter] = {OURS: drafting, PLAIN: plain}
        others = job.bundle.manifest.vision[1:]  # the first is the default, which has its row
        if any(artifact.name == "onnx:int8" for artifact in others):
            quick = ours.open_ours(job, drafts=True, vision="onnx:int8")
            engines[INT8] = stack.enter_context(quick)
        for engine in engines.values():
            engine.draft(studies[0])
        missing = _open(stack, peers, engines, lambda e: e.draft(studies[0]))
        found = take_turns(
            engines,
            lambda engine, study, _: engine.draft(studies[study]),
            len(studies),
            repeats,
            functools.partial(tick, "end to end"),
        )

        def margin(study: int, ids: Sequence[int]) -> float:
            return plain.margin(studies[study], ids)

        rows = {name: _drafts_row(engines[name], found, name, margin) for name in engines}
    return {**rows, **missing}, found[PLAIN]


def _drafts_row(
    engine: Drafter, found: Mapping[str, Rounds[Answer]], name: str, margin: Margin
) -> dict[str, Any]:
    plain = [rounds[0] for rounds in found[PLAIN]]
    mine = [rounds[0] for rounds in found[name]]
    # bytes that are no UTF-8, which a model of random weights writes, are shown differently
    equal = [a.ids == b.ids or a.text == b.text for a, b in zip(plain, mine, strict=True)]
    seconds = {n: [[a.seconds for a in r] for r in rounds] for n, rounds in found.items()}

    def against(other: str, studies: Sequence[bool]) -> dict[str, float] | None:
        one, two = (
            [r for r, use in zip(seconds[n], studies, strict=True) if use] for n in (other, name)
        )
        return ratio(one, two) if one else None

    bases = [base for base in (OURS, INT8, PLAIN) if base in found]
    return {
        "ran": True,
        "weights": engine.weights,
        "settings": engine.settings,
        "seconds": spread([s for rounds in seconds[name] for s in rounds]),
        "new_tokens": spread([float(len(a.ids)) for a in mine]),
        "against": {other: against(other, [True] * len(mine)) for other in bases},
        "against_where_text_is_equal": {other: against(other, equal) for other in bases},
        "against_by_length": [
            {"tokens": tokens, "against": {other: against(other, part) for other in bases}}
            for tokens, part in _thirds([len(answer.ids) for answer in plain])
        ],
        "text": {
            "equal": sum(equal),
            "of": len(equal),
            "differ": [
                _difference(number, a.ids, b.ids, margin)
                for number, (a, b, same) in enumerate(zip(plain, mine, equal, strict=True))
                if not same
            ],
            "same_every_time": all(len({a.ids for a in rounds}) == 1 for rounds in found[name]),
        },
    }


def _thirds(lengths: Sequence[int]) -> list[tuple[tuple[int, int], list[bool]]]:
    """Short, middling and long drafts: least and most tokens, and which studies have them.

    Drafts of one length stay together. Empty where there are too few studies for intervals.
    """
    if len(lengths) < 3 * LEAST_STUDIES:
        return []
    parts = np.digitize(lengths, np.quantile(lengths, (1 / 3, 2 / 3)), right=True)
    found = []
    for part in np.unique(parts):
        own = [n for n, its in zip(lengths, parts, strict=True) if its == part]
        found.append(((min(own), max(own)), [bool(its == part) for its in parts]))
    return found


def _difference(
    study: int, wanted: Sequence[int], found: Sequence[int], margin: Margin
) -> dict[str, Any]:
    """Where two drafts part, and how undecided ours was there: little counts for little."""
    at = first_difference(wanted, found)
    logits = None if at is None else round(margin(study, wanted[:at]), 3)
    return {"study": study, "first_difference": at, "margin": logits}


# --- language model alone -----------------------------------------------------------------------


def _language_alone(
    job: Job, tokens: tuple[int, int], prompts: int, repeats: int, tick: Tick
) -> dict[str, Any]:
    """A row per engine.

    Args:
        tokens: how many are read and how many are written.
    """
    read, written = tokens
    with ExitStack() as stack:
        own = ours.Language(job, job.artifact)
        engines: dict[str, Writer] = {OURS: stack.enter_context(own)}
        engines[SOFT] = stack.enter_context(ours.Language(job, job.artifact, soft=True))

        def turn(engine: Writer, prompt: int, repeat: int) -> float:
            # never the same prompt twice: OpenVINO GenAI keeps the cache of what it has read
            ids = random_ids(read, own.n_vocab, prompt + repeat * prompts)
            return engine.write(ids, written)

        for engine in engines.values():
            turn(engine, 0, repeats)
        missing = _open(stack, _writers(job), engines, lambda e: turn(e, 0, repeats))
        seconds = take_turns(
            engines, turn, prompts, repeats, functools.partial(tick, "language model alone")
        )
        rows = {
            name: {
                "ran": True,
                "weights": engine.weights,
                "settings": engine.settings,
                "seconds": spread([s for rounds in seconds[name] for s in rounds]),
                "against": {OURS: ratio(seconds[OURS], seconds[name])},
            }
            for name, engine in engines.items()
        }
    return {
        "prompt_tokens": read,
        "new_tokens": written,
        "engines": {**rows, **missing},
        "overhead": _overhead(seconds),
    }


def _writers(job: Job) -> dict[str, Candidate[Writer]]:
    absent = llama_raw.is_available()
    found: dict[str, Candidate[Writer]] = {RAW: Candidate(lambda: llama_raw.LlamaRaw(job), absent)}
    for name, flash in LLAMA_CPP.items():
        found[name] = Candidate(
            functools.partial(llama_raw.LlamaHighLevel, job, flash_attn=flash), absent
        )
    graphs = [a for a in job.bundle.manifest.language if a.format == "llm_onnx"]
    for graph in graphs:
        name = f"ONNX Runtime {graph.precision}"
        found[name] = Candidate(functools.partial(ours.Language, job, graph))
    if not graphs:
        found["ONNX Runtime"] = Candidate(
            lambda: ours.Language(job, job.artifact),
            "the bundle has no ONNX language model: export it with --llm onnx:int8",
        )
    found[OPENVINO] = Candidate(
        lambda: openvino_lm.OpenVinoLanguage(job), openvino_lm.is_available()
    )
    return found


def _overhead(seconds: Mapping[str, Rounds[float]]) -> dict[str, Any] | None:
    """Ours / llama.cpp raw, with token ids and with a soft prompt; None without raw."""
    if RAW not in seconds:
        return None
    ratios = {name: ratio(seconds[RAW], seconds[name]) for name in (OURS, SOFT)}
    within = {name: found["ratio"] <= OVERHEAD_LIMIT for name, found in ratios.items()}
    return {"of": RAW, "limit": OVERHEAD_LIMIT, "ratios": ratios, "within_limit": within}


def _open(
    stack: ExitStack,
    candidates: Mapping[str, Candidate[E]],
    engines: dict[str, E],
    warm: Callable[[E], object],
) -> dict[str, Any]:
    """Open and warm up what can run, into `engines`; a row with the reason for the others."""
    missing: dict[str, Any] = {}
    for name, candidate in candidates.items():
        reason = candidate.missing
        if reason is None:
            try:
                engine = candidate.open()
                stack.enter_context(engine)
                warm(engine)
                engines[name] = engine
            except Exception as error:  # other engines raise anything
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            missing[name] = {"ran": False, "reason": without_directories(reason)}
    return missing


def without_directories(message: str) -> str:
    """A message whose paths are cut down to the file's own name."""
    return re.sub(r"(?<![\w.])(?:/[^/\s'\"]+)*/(?=[^/\s'\"])", "", message)
