"""One study in, one streamed draft out.

read -> guard -> prepare -> vision -> prefill -> decode. Decoding is greedy unless asked otherwise:
the same study and bundle give the same draft; in a float16 file proposals may decide a tie
(`decoding.py`). The text is streamed in whole characters, each chunk with its measurements;
benchmarks time this very stream. Closing the generator cancels the draft;
the session stays usable.

A study is one image; a model of two views may be given a lateral image as well, and a model whose
prompt has a slot for it an indication. That may identify a patient: nothing but the model reads it,
and no flag, error or provenance holds a word of it.

Does not cover: what becomes of a study's files (`reading.py`), several studies at once
(`worklist.py`), how tokens are chosen (`decoding.py`).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.decoders import DecodeStream

from rx_edge import guards
from rx_edge.backends.base import encode_views
from rx_edge.config import PromptConfig
from rx_edge.errors import UsageError
from rx_edge.prompting import (
    MAX_INDICATION_TOKENS,
    PromptIds,
    fitted_indication,
    layout,
    takes_indication,
)
from rx_edge.runtime.decoding import Draft, Sampler, decode, greedy
from rx_edge.runtime.drafting import Drafter
from rx_edge.runtime.reading import StudyImages, read_images
from rx_edge.runtime.session import Session
from rx_edge.types import FloatArray, Report, StudyInput, Timings, TokenChunk

UNVERIFIED = "this bundle was not verified against the trained model"
CUT = f"the indication was cut to {MAX_INDICATION_TOKENS} tokens"


@dataclass
class Study:
    """What was read on its way to a draft, what was noticed, and the time it took.

    Attributes:
        prompt: token ids around the image slot, with the study's indication.
        indicated: whether it has one.
        started: time.perf_counter() when reading began; where that was ahead of time, what it
            would have been otherwise.
    """

    images: StudyImages
    prompt: PromptIds
    indicated: bool
    flags: list[str]
    timings: Timings
    started: float


def draft(
    session: Session, study: StudyInput | Path, *, images: StudyImages | None = None
) -> Generator[TokenChunk, None, Report]:
    """Draft a report for a study; the generator's return value is the `Report`.

    Args:
        images: of this very study, where they were read ahead.

    Raises:
        UsageError, InputError: a file is no usable chest radiograph, or the model does not read
            what the study holds.
        BackendError: an engine failed; nothing is drafted from nonsense.
    """
    opened = open_study(session, study, images=images)
    timings = opened.timings
    soft_prompt = encode(session, opened.images.pixels, timings)
    logits = _prefill(session, opened.prompt, soft_prompt, timings)
    timings.time_to_first_token = time.perf_counter() - opened.started
    growing = new_draft(session, timings, session.drafter)
    text = yield from _decode(session, logits, growing, timings)
    return report(session, opened, growing, text)


def open_study(
    session: Session, study: StudyInput | Path, *, images: StudyImages | None = None
) -> Study:
    """Read and check a study.

    Args:
        images: of this very study, where they were read ahead.

    Raises:
        UsageError: the model does not read what the study holds; no file was opened.
        UsageError, InputError: a file is no usable chest radiograph, or the indication holds a
            control token.
    """
    study, manifest = StudyInput.of(study), session.bundle.manifest
    refuse_unread(manifest.prompt, study)
    indication, cut = fitted_indication(session.tokenizer, study.indication)
    prompt = session.prompt_for(indication)
    images = images or read_images(study.images, manifest.prompt, manifest.image)
    timings = Timings(read=images.read_seconds, prepare=images.prepare_seconds)
    return Study(
        images=images,
        prompt=prompt,
        indicated=bool(indication),
        flags=[*([CUT] if cut else []), *images.flags],
        timings=timings,
        started=time.perf_counter() - timings.read - timings.prepare,
    )


def refuse_unread(prompt: PromptConfig, study: StudyInput) -> None:
    """What a model cannot read is never dropped in silence.

    Raises:
        UsageError: a lateral image for a model of one view, or an indication for one without.
    """
    if study.lateral is not None and prompt.views == "one":
        raise UsageError(
            "this model reads one image of a study; leave the lateral image out, or draft it as a "
            "study of its own"
        )
    if study.indication.strip() and not takes_indication(prompt):
        raise UsageError("this model was trained without indications; leave the indication out")


def report(session: Session, study: Study, growing: Draft, text: str) -> Report:
    """The finished draft with everything a reader must know about it."""
    study.timings.total = time.perf_counter() - study.started
    flags = [*study.flags, *guards.check_text(text, finish=growing.finish or "")]
    flags += [UNVERIFIED] if session.unverified else []
    return Report(
        text=text,
        banner=session.bundle.manifest.banner,
        flags=(*flags, *session.warnings),
        token_ids=tuple(growing.ids),
        finish=growing.finish or "",
        timings=study.timings,
        provenance=_provenance(session, study),
    )


def encode(session: Session, pixels: FloatArray, timings: Timings) -> FloatArray:
    """The tensors of a study's images (V, 3, S, S) -> its soft prompt (V * N, D_lm)."""
    started = time.perf_counter()
    soft_prompt = encode_views(session.vision, pixels)
    timings.vision = time.perf_counter() - started
    return soft_prompt


def _prefill(
    session: Session, prompt: PromptIds, soft_prompt: FloatArray, timings: Timings
) -> FloatArray:
    """The prompt into the KV cache, what is there already excepted; logits (V,) after it."""
    started = time.perf_counter()
    _, image_slot, after = layout(prompt, soft_prompt)
    before = np.asarray(prompt.before, np.int32)
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


def _provenance(session: Session, study: Study) -> dict[str, str]:
    manifest, images = session.bundle.manifest, study.images
    found = {
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
        "pixel_sha256": images.pixel_sha256[0],
        "source_format": images.source_format,
    }
    if manifest.prompt.views != "one":
        found["views"] = str(len(images.pixel_sha256))
        for lateral in images.pixel_sha256[1:]:
            found["lateral_pixel_sha256"] = lateral
    if takes_indication(manifest.prompt):
        found["indication"] = "yes" if study.indicated else "no"
    return found
