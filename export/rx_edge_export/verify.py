"""`rx-edge verify`: is this bundle, on this machine, the model that was trained?

Staged and fail-closed, in the data's order, so that the first failing stage names the fault:
pixels -> soft prompt -> tokenizer -> prefill logits -> adapter -> greedy tokens. Each is compared
with golden vectors of the fp32 model with its adapter unmerged. Pixels to logits run with exact
arithmetic, so that conversion faults stand out; greedy tokens run exactly as production does.

Does not cover: hashes (`rx_edge.bundle`, before this) and clinical facts in long drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from rx_edge import image
from rx_edge.bundle import Artifact, Bundle, StageResult, Verdict
from rx_edge.errors import VerificationError
from rx_edge.prompting import encode, layout
from rx_edge.radiograph import open_radiograph
from rx_edge.runtime.session import Session, open_checked
from rx_edge.types import FloatArray
from rx_edge_export import tolerances
from rx_edge_export.tolerances import limit

# whitespace, casing, digits, punctuation, accents, wrappers: where tokenizer conversions break
AWKWARD = (
    "No pneumothorax.", "  two  spaces\n\nand lines\t", "5.5 cm, T12; 1,024", "<img></img>",
    "<|im_start|>user\nfindings<|im_end|>", "cardiomégalie — œdème ≥ 3", "XXXX x-ray'S don't",
)  # fmt: skip


def verify(bundle: Bundle, tick: Callable[[str], None] = lambda _: None) -> Verdict:
    """Run every stage for every artefact of a bundle whose files are already checked.

    Raises:
        VerificationError: the bundle holds nothing to compare with.
        BackendError, BundleError: an engine refuses the bundle; it did not pass.
    """
    manifest = bundle.manifest
    if not manifest.canaries or not manifest.language:
        raise VerificationError(
            f"bundle {str(bundle.root)!r} holds no canaries or no language model; export it again"
        )
    golden = {name: load_file(bundle.path(_golden_file(name))) for name in manifest.canaries}
    results: list[StageResult] = []
    for number, artifact in enumerate(manifest.language):
        tick(f"{artifact.precision}: exact")
        with open_checked(bundle, precision=artifact.precision, exact=True) as session:
            if number == 0:
                results += _vision_stages(session, golden)
            results.append(_tokenizer(session))
            for name, vectors in golden.items():
                results += _logit_stages(session, name, vectors)
        tick(f"{artifact.precision}: as in production")
        with open_checked(bundle, precision=artifact.precision) as session:
            for name, vectors in golden.items():
                results.append(_greedy_tokens(session, name, vectors))
    return Verdict.of(results)


def kl_divergence(reference: FloatArray, found: FloatArray) -> float:
    """KL(softmax(reference) || softmax(found)) in nats, of two logit vectors (V,)."""
    p, q = _log_softmax(reference), _log_softmax(found)
    return float((np.exp(p) * (p - q)).sum())


def _golden_file(canary: str) -> str:
    return canary.rpartition(".")[0] + ".safetensors"


def _vision_stages(session: Session, golden: dict[str, dict[str, Any]]) -> list[StageResult]:
    manifest = session.bundle.manifest
    results = []
    for name, vectors in golden.items():
        radiograph = open_radiograph(session.bundle.path(name))
        pixels = image.prepare(radiograph, manifest.image)
        distance = _max_difference(pixels, vectors["pixels"])
        results.append(_result("pixels", manifest.vision, name, "max", distance, tolerances.PIXELS))
        found = session.vision.encode(vectors["pixels"])[0]
        wanted = vectors["soft_prompt"]
        error = _max_difference(found, wanted) / float(np.abs(wanted).max())
        tolerance = limit(tolerances.SOFT_PROMPT, manifest.vision.precision)
        results.append(_result("soft_prompt", manifest.vision, name, "max", error, tolerance))
    return results


def _tokenizer(session: Session) -> StageResult:
    wrong = sum(
        session.language.tokenize(text) != encode(session.tokenizer, text) for text in AWKWARD
    )
    return _result("tokenizer", session.artifact, "", "texts", float(wrong), tolerances.TOKENIZER)


def _logit_stages(session: Session, name: str, vectors: dict[str, Any]) -> list[StageResult]:
    artifact = session.artifact
    session.language.rewind(0)
    found = session.language.prefill(layout(session.prompt, vectors["soft_prompt"]))
    wanted = vectors["logits"]
    distance = kl_divergence(wanted, found)
    of_adapter = kl_divergence(wanted, vectors["logits_without_adapter"])
    tolerance = limit(tolerances.PREFILL_KL, artifact.precision)
    # an adapter that changes nothing cannot be told from a lost one: that is a failure too
    share = distance / of_adapter if of_adapter > 0 else float("inf")
    return [
        _result("prefill_logits", artifact, name, "kl", distance, tolerance),
        _result("adapter", artifact, name, "share of the adapter's KL", share, tolerances.ADAPTER),
    ]


def _greedy_tokens(session: Session, name: str, vectors: dict[str, Any]) -> StageResult:
    """Feed the trained model's tokens; where ours would differ, how sure was the trained one?"""
    radiograph = open_radiograph(session.bundle.path(name))
    pixels = image.prepare(radiograph, session.bundle.manifest.image)
    soft_prompt = session.vision.encode(pixels)[0]
    session.language.rewind(0)
    rows = [session.language.prefill(layout(session.prompt, soft_prompt))[None]]
    for token in vectors["tokens"]:  # one by one, as production decodes
        rows.append(session.language.step(np.asarray([token], np.int32)))
    best = np.concatenate(rows).argmax(-1)  # (1 + T,)
    differs = best != vectors["best"]
    worst = float(vectors["margins"][differs].max()) if differs.any() else 0.0
    tolerance = limit(tolerances.TOKEN_MARGIN, session.artifact.precision)
    return _result(
        "greedy_tokens", session.artifact, name, "margin of a changed token", worst, tolerance
    )


def _result(
    stage: str, artifact: Artifact, canary: str, metric: str, value: float, tolerance: float
) -> StageResult:
    # written so that NaN fails
    return StageResult(
        stage, artifact.file, canary, metric, value, tolerance, passed=bool(value <= tolerance)
    )


def _max_difference(found: FloatArray, wanted: FloatArray) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    return float(np.abs(found - wanted).max())


def _log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits.astype(np.float64) - float(logits.max())
    out: FloatArray = shifted - np.log(np.exp(shifted).sum())
    return out
