"""What runs on a GPU is compared with the trained model whenever it is opened.

A bundle is verified on the exporter's processor. A TensorRT engine exists only on the hospital's
machine, and another GPU, driver or library may compute something else. So the soft prompts of the
canary studies, and the logits after their prompts, are compared with the golden vectors: a few
milliseconds per canary. The limits are those that the artefact was verified with; of TensorRT
engines the exporter wrote them into the artefact.

Does not cover: processors, which `rx-edge verify` compares; how texts change (`verify` again).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file

from rx_edge.backends.base import encode_views
from rx_edge.bundle import Artifact, Manifest
from rx_edge.errors import BundleError
from rx_edge.prompting import layout
from rx_edge.types import FloatArray

if TYPE_CHECKING:
    from rx_edge.runtime.session import Session

LIMITS = "soft_prompt_limits"  # in an artefact's details: [relative difference, |ratio - 1|]
INDICATION = "indication"  # UTF-8 bytes beside golden vectors, of models that read one


def check(session: Session) -> None:
    """Compare each half that is on a GPU with the golden vectors.

    Raises:
        BundleError: it computes something else, or there is nothing to compare it with.
    """
    halves = (
        (session.vision_artifact, session.vision.device, _check_vision),
        (session.artifact, session.language.device, _check_language),
    )
    for artifact, device, compare in halves:
        if device == "cpu":
            continue
        limits, canaries = _limits(session.bundle.manifest, artifact), _canaries(session)
        if not limits or not canaries:
            raise _refused(
                session, f"{artifact.name} has nothing to be compared with on this machine; "
                "export it again",
            )  # fmt: skip
        for name, vectors in canaries.items():
            compare(session, name, vectors, limits)
    session.language.rewind(0)


def soft_prompt_errors(found: FloatArray, wanted: FloatArray) -> tuple[float, float]:
    """(length of the difference / length, |ratio of lengths - 1|) of two soft prompts (N, D)."""
    if found.shape != wanted.shape:
        return float("inf"), float("inf")
    length = float(np.linalg.norm(wanted))
    difference = float(np.linalg.norm(found - wanted)) / length
    return difference, abs(float(np.linalg.norm(found)) / length - 1.0)


def kl_divergence(reference: FloatArray, found: FloatArray) -> float:
    """KL(softmax(reference) || softmax(found)) in nats, of two logit vectors (V,)."""
    p, q = _log_softmax(reference), _log_softmax(found)
    return float((np.exp(p) * (p - q)).sum())


def golden_indication(vectors: Mapping[str, Any]) -> str:
    """A canary's indication; "" where the model reads none."""
    return bytes(vectors[INDICATION]).decode() if INDICATION in vectors else ""


def _check_vision(
    session: Session, canary: str, vectors: Mapping[str, Any], limits: tuple[float, ...]
) -> None:
    found = encode_views(session.vision, vectors["pixels"])
    errors = soft_prompt_errors(found, vectors["soft_prompt"])
    if not all(e <= limit for e, limit in zip(errors, limits, strict=True)):  # NaN fails
        raise _refused(
            session,
            f"{session.vision_artifact.name} on {session.vision.device} gives another soft prompt "
            f"for {canary} (difference {errors[0]:.2g} of {limits[0]:.2g} allowed, scale "
            f"{errors[1]:.2g} of {limits[1]:.2g}); use --vision onnx:fp32 --device cpu and report "
            "the GPU and its driver",
        )


def _check_language(
    session: Session, canary: str, vectors: Mapping[str, Any], limits: tuple[float, ...]
) -> None:
    prompt = session.prompt_for(golden_indication(vectors))
    session.language.rewind(0)
    found = session.language.prefill(layout(prompt, vectors["soft_prompt"]))
    distance, limit = kl_divergence(vectors["logits"], found), limits[0]
    if not distance <= limit:
        raise _refused(
            session,
            f"{session.artifact.name} on {session.language.device} gives other logits for {canary} "
            f"(KL {distance:.2g} of {limit:.2g} allowed); use --device cpu and report the GPU and "
            "its driver",
        )


def _limits(manifest: Manifest, artifact: Artifact) -> tuple[float, ...]:
    """With which this artefact was verified; empty where it was not."""
    if artifact.details.get(LIMITS):
        return tuple(artifact.details[LIMITS])
    wanted = ("prefill_logits",) if artifact in manifest.language else (
        "soft_prompt", "soft_prompt_scale",
    )  # fmt: skip
    known = {
        s.stage: s.tolerance for s in manifest.verification.stages if s.artifact == artifact.file
    }
    return tuple(known[stage] for stage in wanted) if known.keys() >= set(wanted) else ()


def _canaries(session: Session) -> dict[str, Mapping[str, Any]]:
    bundle = session.bundle
    return {
        canary: load_file(bundle.path(canary.rpartition(".")[0] + ".safetensors"))
        for canary in bundle.manifest.canaries
    }


def _refused(session: Session, why: str) -> BundleError:
    return BundleError(f"bundle {str(session.bundle.root)!r} is refused: {why}")


def _log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits.astype(np.float64) - float(logits.max())
    out: FloatArray = shifted - np.log(np.exp(shifted).sum())
    return out
