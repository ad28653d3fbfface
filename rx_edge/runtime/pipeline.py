"""One study in, one streamed draft out.

read -> guard -> prepare -> vision -> prefill -> decode. Decoding is greedy unless asked otherwise:
the same study and bundle give the same draft; in a float16 file proposals may decide a tie
(`decoding.py`). The text is streamed in whole characters, each chunk with its measurements;
benchmarks time this very stream. Closing the generator cancels the draft;
the session stays usable.

Does not cover: several studies at once (`worklist.py`), how tokens are chosen (`decoding.py`).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.decoders import DecodeStream

from rx_edge import guards, image
from rx_edge.prompting import layout
from rx_edge.radiograph import open_radiograph
from rx_edge.runtime.decoding import Draft, Sampler, decode, greedy
from rx_edge.runtime.drafting import Drafter
from rx_edge.runtime.session import Session
from rx_edge.types import FloatArray, Radiograph, Report, Timings, TokenChunk

UNVERIFIED = "this bundle was not verified against the trained model"


@dataclass
class Study:
    """An image on its way to a draft: what was read, what was noticed, and the time it took."""

    radiograph: Radiograph
    flags: list[str]
    timings: Timings
    started: float  # time.perf_counter()


def draft(session: Session, study: Path) -> Generator[TokenChunk, None, Report]:
    """Draft a report for an image file; the generator's return value is the `Report`.

    Raises:
        UsageError, InputError: the file is no usable chest radiograph.
        BackendError: an engine failed; nothing is drafted from nonsense.
    """
    opened, pixels = open_study(session, study)
    timings = opened.timings
    soft_prompt = encode(session, pixels, timings)
    logits = _prefill(session, soft_prompt, timings)
    timings.time_to_first_token = time.perf_counter() - opened.started
    growing = new_draft(session, timings, session.drafter)
    text = yield from _decode(session, logits, growing, timings)
    return report(session, opened, growing, text)


def open_study(session: Session, path: Path) -> tuple[Study, FloatArray]:
    """Read and check an image file; with its tensor (1, 3, S, S).

    Raises:
        UsageError, InputError: the file is no usable chest radiograph.
    """
    started = time.perf_counter()
    timings = Timings()
    radiograph = open_radiograph(path)
    flags = list(guards.check_image(radiograph))
    timings.read = time.perf_counter() - started
    pixels = image.prepare(radiograph, session.bundle.manifest.image)
    timings.prepare = time.perf_counter() - started - timings.read
    return Study(radiograph, flags, timings, started), pixels


def report(session: Session, study: Study, growing: Draft, text: str) -> Report:
    """The finished draft with everything a reader must know about it."""
    study.timings.total = time.perf_counter() - study.started
    flags = [*study.flags, *guards.check_text(text, finish=growing.finish or "")]
    flags += [UNVERIFIED] if session.unverified else []
    return Report(
        text=text,
        banner=session.bundle.manifest.banner,
        flags=(*study.radiograph.notes, *flags, *session.warnings),
        token_ids=tuple(growing.ids),
        finish=growing.finish or "",
        timings=study.timings,
        provenance=_provenance(session, study.radiograph),
    )


def encode(session: Session, pixels: FloatArray, timings: Timings) -> FloatArray:
    """One image tensor (1, 3, S, S) -> soft prompt (N, D_lm)."""
    started = time.perf_counter()
    soft_prompt: FloatArray = session.vision.encode(pixels)[0]
    timings.vision = time.perf_counter() - started
    return soft_prompt


def _prefill(session: Session, soft_prompt: FloatArray, timings: Timings) -> FloatArray:
    """The prompt into the KV cache, what is there already excepted; logits (V,) after it."""
    started = time.perf_counter()
    _, image_slot, after = layout(session.prompt, soft_prompt)
    before = np.asarray(session.prompt.before, np.int32)
    language = session.language
    if session.runtime.prefix_cache:
        timings.cached_tokens = language.reuse(before)
        if timings.cached_tokens < len(before):
            language.prefill([before])
        logits = language.prefill([image_slot, after])
    else:
        language.rewind(0)
        logits = language.prefill([before, image_slot, after])
    timings.prefill = time.perf_counter() - started
    timings.prompt_tokens = len(before) + len(image_slot) + len(after)
    return logits


def _decode(
    session: Session, logits: FloatArray, growing: Draft, timings: Timings
) -> Generator[TokenChunk, None, str]:
    """Stream the draft; returns its text."""
    stream: Any = DecodeStream(skip_special_tokens=True)
    steps = decode(session.language, logits, growing, session.drafter)
    parts: list[str] = []
    started = last = time.perf_counter()
    for number, step in enumerate(steps):
        arrived = time.perf_counter()
        text = "".join(stream.step(session.tokenizer, token) or "" for token in step.ids)
        parts.append(text)
        now = time.perf_counter()
        timings.detokenise += now - arrived
        if number:
            timings.gaps.append(now - last)
        yield TokenChunk(text, step.ids, step.logprobs, now - last)
        last = time.perf_counter()
    timings.decode = time.perf_counter() - started
    return "".join(parts).strip()


def new_draft(session: Session, timings: Timings, drafter: Drafter | None) -> Draft:
    """An empty draft after a prompt of `timings.prompt_tokens`."""
    runtime = session.runtime
    # the last token is never fed back, so the context must hold prompt + limit - 1
    room = session.generate.n_ctx - timings.prompt_tokens + 1
    return Draft(
        end=session.prompt.end,
        limit=min(session.generate.max_new_tokens, room),
        choose=Sampler(runtime.temperature, runtime.seed) if runtime.temperature else greedy,
        drafter=drafter,
        logprobs=runtime.logprobs,
        timings=timings,
    )


def text_of(session: Session, ids: Sequence[int]) -> str:
    """The text that streaming these ids shows: whole characters only."""
    stream: Any = DecodeStream(skip_special_tokens=True)
    return "".join(stream.step(session.tokenizer, token) or "" for token in ids).strip()


def _provenance(session: Session, radiograph: Radiograph) -> dict[str, str]:
    manifest = session.bundle.manifest
    return {
        "model": manifest.name,
        "bundle_sha256": session.bundle.digest,
        "vision": (
            f"{session.vision_artifact.format} {session.vision_artifact.precision} "
            f"{session.vision.device}"
        ),
        "language": (
            f"{session.artifact.format} {session.artifact.precision} {session.language.device}"
        ),
        "image_recipe": manifest.image.name,
        "pixel_sha256": radiograph.pixel_sha256,
        "source_format": radiograph.source_format,
    }
