"""One study in, one streamed draft out.

read -> guard -> prepare -> vision -> prefill -> decode. Decoding is greedy unless asked otherwise:
the same study and bundle give the same draft; in a float16 file proposals may decide a tie
(`decoding.py`). The text is streamed in whole characters, each chunk with its measurements;
benchmarks time this very stream. Closing the generator cancels the draft;
the session stays usable.

A study is one image; a model of two views may be given a lateral image as well, and a model whose
prompt has a slot for it an indication. That may identify a patient: nothing but the model reads it,
and no flag, error or provenance holds a word of it.

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
from rx_edge.backends.base import encode_views
from rx_edge.config import ImageRecipe, PromptConfig
from rx_edge.errors import UsageError
from rx_edge.prompting import (
    MAX_INDICATION_TOKENS,
    PromptIds,
    fitted_indication,
    layout,
    takes_indication,
)
from rx_edge.radiograph import open_radiograph
from rx_edge.runtime.decoding import Draft, Sampler, decode, greedy
from rx_edge.runtime.drafting import Drafter
from rx_edge.runtime.session import Session
from rx_edge.types import FloatArray, Radiograph, Report, StudyInput, Timings, TokenChunk

UNVERIFIED = "this bundle was not verified against the trained model"
ONE_VIEW = "drafted without a lateral image"
CUT = f"the indication was cut to {MAX_INDICATION_TOKENS} tokens"


@dataclass
class Study:
    """What was read on its way to a draft, what was noticed, and the time it took.

    Attributes:
        radiographs: the frontal image, and the lateral one where it was given.
        prompt: token ids around the image slot, with the study's indication.
        indicated: whether it has one.
    """

    radiographs: tuple[Radiograph, ...]
    prompt: PromptIds
    indicated: bool
    flags: list[str]
    timings: Timings
    started: float  # time.perf_counter()


def draft(session: Session, study: StudyInput | Path) -> Generator[TokenChunk, None, Report]:
    """Draft a report for a study; the generator's return value is the `Report`.

    Raises:
        UsageError, InputError: a file is no usable chest radiograph, or the model does not read
            what the study holds.
        BackendError: an engine failed; nothing is drafted from nonsense.
    """
    opened, pixels = open_study(session, study)
    timings = opened.timings
    soft_prompt = encode(session, pixels, timings)
    logits = _prefill(session, opened.prompt, soft_prompt, timings)
    timings.time_to_first_token = time.perf_counter() - opened.started
    growing = new_draft(session, timings, session.drafter)
    text = yield from _decode(session, logits, growing, timings)
    return report(session, opened, growing, text)


def open_study(session: Session, study: StudyInput | Path) -> tuple[Study, FloatArray]:
    """Read and check a study; with the tensors of its V images (V, 3, S, S).

    Raises:
        UsageError: the model does not read what the study holds; no file was opened.
        UsageError, InputError: a file is no usable chest radiograph, or the indication holds a
            control token.
    """
    study, manifest = StudyInput.of(study), session.bundle.manifest
    refuse_unread(manifest.prompt, study)
    started = time.perf_counter()
    timings = Timings()
    indication, cut = fitted_indication(session.tokenizer, study.indication)
    prompt = session.prompt_for(indication)
    radiographs = tuple(open_radiograph(path) for path in study.images)
    flags = [CUT] if cut else []
    flags += _image_flags(manifest.prompt, radiographs)
    timings.read = time.perf_counter() - started
    pixels = tensors(radiographs, manifest.image)
    timings.prepare = time.perf_counter() - started - timings.read
    return Study(radiographs, prompt, bool(indication), flags, timings, started), pixels


def tensors(radiographs: Sequence[Radiograph], recipe: ImageRecipe) -> FloatArray:
    """The images of a study, in their order -> (V, 3, S, S)."""
    views = [image.prepare(radiograph, recipe) for radiograph in radiographs]
    return views[0] if len(views) == 1 else np.concatenate(views)


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


def _image_flags(prompt: PromptConfig, radiographs: Sequence[Radiograph]) -> list[str]:
    """Assumptions of the readers, and what the guards say, image by image."""
    if prompt.views == "one":
        return [*radiographs[0].notes, *guards.check_image(radiographs[0])]
    frontal, lateral = radiographs[0], next(iter(radiographs[1:]), None)
    flags = [*frontal.notes, *guards.check_image(frontal, "the frontal image")]
    if lateral is not None:
        flags += [f"lateral image: {note}" for note in lateral.notes]
        flags += guards.check_image(lateral, "the lateral image")
    flags += guards.check_views(frontal.view, lateral.view if lateral is not None else None)
    return flags if lateral is not None else [*flags, ONE_VIEW]


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
    manifest, first = session.bundle.manifest, study.radiographs[0]
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
        "pixel_sha256": first.pixel_sha256,
        "source_format": first.source_format,
    }
    if manifest.prompt.views != "one":
        found["views"] = str(len(study.radiographs))
        for lateral in study.radiographs[1:]:
            found["lateral_pixel_sha256"] = lateral.pixel_sha256
    if takes_indication(manifest.prompt):
        found["indication"] = "yes" if study.indicated else "no"
    return found
