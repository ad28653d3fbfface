"""`rx-edge verify`: is this bundle, on this machine, the model that was trained?

Staged and fail-closed, in the data's order, so that the first failing stage names the fault:
pixels -> soft prompt -> tokenizer -> prefill logits -> adapter -> greedy tokens -> facts. Each is
compared with what the fp32 model with its adapter unmerged said. Pixels to logits run with exact
arithmetic, so that conversion faults stand out; greedy tokens and drafts run exactly as
production does. Every language artefact is tested behind the default vision artefact, and every
other vision artefact before the default language artefact.

A canary study of a model that reads two views or an indication has them (`golden.py`); its first
image alone, without an indication, is compared up to the prefill logits.

Whole drafts are compared at export only: their images stay on the exporting machine.

Does not cover: hashes (`rx_edge.bundle`, before this), and whether the trained model is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rx_edge.backends import registry
from rx_edge.backends.base import encode_views
from rx_edge.bundle import Artifact, Bundle, StageResult, Verdict
from rx_edge.config import RuntimeConfig
from rx_edge.errors import VerificationError
from rx_edge.prompting import PromptIds, encode, filled, layout
from rx_edge.radiograph import open_radiograph
from rx_edge.runtime import pipeline, reading
from rx_edge.runtime.self_check import golden_indication, kl_divergence, soft_prompt_errors
from rx_edge.runtime.session import Session, open_checked
from rx_edge.types import FloatArray, SoftPrompt, StudyInput
from rx_edge_export import golden, tolerances
from rx_edge_export.golden import GREEDY_TOKENS, PLAIN, Drafts
from rx_edge_export.tolerances import limit
from rx_edge_export.verify_drafts import compare
from rx_edge_export.verify_drafts import encode as encode_all

# whitespace, casing, digits, punctuation, accents, wrappers: where tokenizer conversions break
AWKWARD = (
    "No pneumothorax.", "x  two  spaces\n\nand lines\t", "5.5 cm, T12; 1,024", "<img></img>",
    "<|im_start|>user\nfindings<|im_end|>", "cardiomégalie — œdème ≥ 3", "XXXX x-ray'S don't",
)  # fmt: skip
ALONE = RuntimeConfig(drafts=False)  # proposals decide no token: the model is what is tested
NOTABLE = 0.05  # share of drafts changed, ties apart, above which every draft carries a note
Golden = Mapping[str, Mapping[str, Any]]
Tick = Callable[[str], None]


def verify(bundle: Bundle, tick: Tick = lambda _: None, drafts: Drafts | None = None) -> Verdict:
    """Run every stage for every artefact of a bundle whose files are already checked.

    Args:
        drafts: the trained model's drafts of calibration studies; None leaves out "facts".

    Raises:
        VerificationError: the bundle holds nothing to compare with, or not all that it takes.
        BackendError, BundleError: an engine refuses the bundle; it did not pass.
    """
    manifest = bundle.manifest
    if not manifest.canaries or not manifest.language or not manifest.vision:
        raise VerificationError(
            f"bundle {str(bundle.root)!r} holds no canaries or lacks half of the model; "
            "export it again"
        )
    known = golden.load(bundle)
    studies = {name: golden.study(bundle, name, vectors) for name, vectors in known.items()}
    results = _pixels(bundle, studies, known)
    notes: list[str] = []
    runnable = []
    for artifact in manifest.vision:
        eyes, note = _on_this_machine(artifact)
        notes += [note] if note else []
        runnable.append(eyes)
    seen: dict[str, list[SoftPrompt]] = {}  # by file: the calibration studies
    for number, mouth in enumerate(manifest.language):
        tick(f"verifying {mouth.file}: exact")
        with open_checked(
            bundle, vision=runnable[0], language=mouth, exact=True, runtime=ALONE
        ) as session:
            results.append(_tokenizer(session))
            for name, vectors in known.items():
                results += _logits(session, name, vectors)
        for eyes in runnable if number == 0 else runnable[:1]:
            tick(f"verifying {eyes.file} + {mouth.file}: as in production")
            with open_checked(bundle, vision=eyes, language=mouth, runtime=ALONE) as session:
                first = eyes is runnable[0]
                if number == 0:
                    results += _soft_prompts(session, known)
                results += _greedy(session, studies, known, of_vision=not first)
                if drafts is not None:
                    if eyes.file not in seen:
                        seen[eyes.file] = encode_all(session, drafts)
                    facts, note = _facts(session, drafts, seen[eyes.file], of_vision=not first)
                    results += facts
                    notes += [note] if note else []
    return Verdict.of(results, tuple(notes))


def _on_this_machine(artifact: Artifact) -> tuple[Artifact, str]:
    """TensorRT needs the hospital's GPU; elsewhere ONNX Runtime computes the same graph."""
    if artifact.format != "vision_tensorrt":
        return artifact, ""
    reason = registry.load(artifact.format).is_available()
    if reason is None:
        return artifact, ""
    return replace(artifact, format="vision_onnx"), (
        f"not run on this machine: {artifact.name} ({reason}); its ONNX was compared through ONNX "
        "Runtime, and an engine is compared with the golden vectors whenever it is opened"
    )


def _pixels(bundle: Bundle, studies: Mapping[str, StudyInput], known: Golden) -> list[StageResult]:
    recipe, file = bundle.manifest.image, bundle.manifest.vision[0].file
    results = []
    for name, study in studies.items():
        found = reading.tensors([open_radiograph(path) for path in study.images], recipe)
        difference = _max_difference(found, known[name]["pixels"])
        results.append(_result("pixels", file, name, "max", difference, tolerances.PIXELS))
    return results


def _soft_prompts(session: Session, known: Golden) -> list[StageResult]:
    artifact = session.vision_artifact
    noise = limit(tolerances.SOFT_PROMPT, artifact.precision)
    scale = limit(tolerances.SOFT_PROMPT_SCALE, artifact.precision)
    results = []
    for name, vectors in known.items():
        found = encode_views(session.vision, vectors["pixels"])
        difference, ratio = soft_prompt_errors(found, vectors["soft_prompt"])
        results += [
            _result("soft_prompt", artifact.file, name, "relative difference", difference, noise),
            _result("soft_prompt_scale", artifact.file, name, "|ratio - 1|", ratio, scale),
        ]
    return results


def _tokenizer(session: Session) -> StageResult:
    prompt = session.bundle.manifest.prompt
    texts = [*AWKWARD, *filled(prompt).split("{image}"), prompt.image_begin, prompt.image_end]
    wrong = sum(
        session.language.tokenize(text) != encode(session.tokenizer, text) for text in texts
    )
    return _result(
        "tokenizer", session.artifact.file, "", "texts", float(wrong), tolerances.TOKENIZER
    )


def _logits(session: Session, name: str, vectors: Mapping[str, Any]) -> list[StageResult]:
    file, soft_prompt = session.artifact.file, vectors["soft_prompt"]
    asked = session.prompt_for(golden_indication(vectors))
    wanted = vectors["logits"]
    distance = kl_divergence(wanted, _after(session, asked, soft_prompt))
    of_adapter = kl_divergence(wanted, vectors["logits_without_adapter"])
    tolerance = limit(tolerances.PREFILL_KL, session.artifact.precision)
    # an adapter that changes nothing cannot be told from a lost one: that is a failure too
    share = distance / of_adapter if of_adapter > 0 else float("inf")
    results = [
        _result("prefill_logits", file, name, "kl", distance, tolerance),
        _result("adapter", file, name, "share of the adapter's KL", share, tolerances.ADAPTER),
    ]
    if PLAIN in vectors:
        first = soft_prompt[: session.bundle.manifest.soft_tokens]
        plain = kl_divergence(vectors[PLAIN], _after(session, session.prompt, first))
        metric = "kl (first image alone, no indication)"
        results.append(_result("prefill_logits", file, name, metric, plain, tolerance))
    return results


def _after(session: Session, prompt: PromptIds, soft_prompt: SoftPrompt) -> FloatArray:
    """Logits (V,) after a whole prompt."""
    session.language.rewind(0)
    return session.language.prefill(layout(prompt, soft_prompt))


def _greedy(
    session: Session, studies: Mapping[str, StudyInput], known: Golden, *, of_vision: bool
) -> list[StageResult]:
    """The whole path; `of_vision` says which half is on trial.

    Behind a vision artefact the language model may change the tokens that it may change anyway.
    """
    artifact = session.vision_artifact if of_vision else session.artifact
    margin = limit(tolerances.TOKEN_MARGIN, session.artifact.precision)
    metric = "margin of a changed token"
    if of_vision:
        margin = max(margin, limit(tolerances.VISION_MARGIN, artifact.precision))
    return [
        _result("greedy_tokens", artifact.file, name, metric,
                _changed_margin(session, study, known[name]), margin)
        for name, study in studies.items()
    ]  # fmt: skip


def _facts(
    session: Session, drafts: Drafts, soft_prompts: list[SoftPrompt], *, of_vision: bool
) -> tuple[list[StageResult], str]:
    """Whole drafts of calibration studies, by what they say; and a note where many changed.

    A vision artefact is tried before a language artefact that may change facts itself.
    """
    artifact = session.vision_artifact if of_vision else session.artifact
    allowed = limit(tolerances.FACTS, artifact.precision)
    if of_vision:
        allowed = max(allowed, limit(tolerances.FACTS, session.artifact.precision))
    found = compare(session, drafts, soft_prompts)
    metric = f"flips per study ({found.changed} drafts changed, {found.tied} of them at ties)"
    stages = [
        _result(f"facts_{kind}", artifact.file, f"{found.studies} studies", metric,
                count / found.studies, allowed)
        for kind, count in found.flips.items()
    ]  # fmt: skip
    note = ""
    if (found.changed - found.tied) / found.studies > NOTABLE:
        note = (
            f"{artifact.file}: {found.changed} of {found.studies} drafts differ from the trained "
            f"model's, {found.changed - found.tied} of them where it was not undecided; prefer a "
            "higher precision"
        )
    return stages, note


def _changed_margin(session: Session, study: StudyInput, vectors: Mapping[str, Any]) -> float:
    """Feed the trained model's tokens; where ours would differ, how sure was the trained one?"""
    opened = pipeline.open_study(session, study)
    soft_prompt = pipeline.encode(session, opened.images.pixels, opened.timings)
    rows = [_after(session, opened.prompt, soft_prompt)[None]]
    for token in vectors["tokens"]:  # one by one, as production decodes
        rows.append(session.language.step(np.asarray([token], np.int32)))
    best = np.concatenate(rows).argmax(-1)  # (1 + T,)
    if len(vectors["tokens"]) < GREEDY_TOKENS and vectors["best"][-1] != session.prompt.end:
        return float("inf")  # the trained draft ended here with another token than ours would
    differs = best != vectors["best"]
    return float(vectors["margins"][differs].max()) if differs.any() else 0.0


def _result(
    stage: str, file: str, canary: str, metric: str, value: float, tolerance: float
) -> StageResult:
    # written so that NaN fails
    return StageResult(stage, file, canary, metric, value, tolerance, bool(value <= tolerance))


def _max_difference(found: FloatArray, wanted: FloatArray) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    return float(np.abs(found - wanted).max())
