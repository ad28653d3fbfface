"""An engine that was built on this machine is compared with the trained model before it is used.

A TensorRT engine exists only on the hospital's machine, so no verification at export can vouch
for it: a GPU, driver or library of another kind may compute something else. Its soft prompts of
the canary studies are therefore compared with the golden vectors each time it is opened (a few
milliseconds per canary), with the limits that the exporter wrote into the artefact.

Does not cover: portable files, which are compared at export and by `rx-edge verify`.
"""

from __future__ import annotations

import numpy as np
from safetensors.numpy import load_file

from rx_edge.backends.base import VisionBackend, encode_views
from rx_edge.bundle import Artifact, Bundle
from rx_edge.errors import BundleError
from rx_edge.types import FloatArray

LIMITS = "soft_prompt_limits"  # in an artefact's details: [relative difference, |ratio - 1|]


def soft_prompt_errors(found: FloatArray, wanted: FloatArray) -> tuple[float, float]:
    """(length of the difference / length, |ratio of lengths - 1|) of two soft prompts (N, D)."""
    if found.shape != wanted.shape:
        return float("inf"), float("inf")
    length = float(np.linalg.norm(wanted))
    difference = float(np.linalg.norm(found - wanted)) / length
    return difference, abs(float(np.linalg.norm(found)) / length - 1.0)


def check(bundle: Bundle, artifact: Artifact, vision: VisionBackend) -> None:
    """Compare `vision` with every canary's golden soft prompt.

    Raises:
        BundleError: no canaries, no limits, or another soft prompt than the trained model's.
    """
    limits = artifact.details.get(LIMITS)
    if not limits or not bundle.manifest.canaries:
        raise BundleError(
            f"bundle {str(bundle.root)!r} is refused: {artifact.name} has nothing to be compared "
            "with on this machine; export it again"
        )
    for canary in bundle.manifest.canaries:
        golden = load_file(bundle.path(canary.rpartition(".")[0] + ".safetensors"))
        found = encode_views(vision, golden["pixels"])
        errors = soft_prompt_errors(found, golden["soft_prompt"])
        if not all(e <= limit for e, limit in zip(errors, limits, strict=True)):  # NaN fails
            raise BundleError(
                f"bundle {str(bundle.root)!r} is refused: {artifact.name} on {vision.device} gives "
                f"another soft prompt for {canary} (difference {errors[0]:.2g} of {limits[0]:.2g} "
                f"allowed, scale {errors[1]:.2g} of {limits[1]:.2g}); use --vision onnx:fp32 and "
                "report the GPU and its driver"
            )
