"""What the trained model said, as plain arrays: `reference.py` makes them, `verify.py` reads them.

A canary of a model of two views is its own image with the next canary's as lateral one; a canary of
a model that reads indications has one, whose words lie beside the vectors. What such a model says
of the first image alone, without an indication, is kept as well (`PLAIN`).

`verify` runs on machines without torch, so nothing here may need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from rx_edge.bundle import SCHEMA, Bundle, schema_for
from rx_edge.config import PromptConfig
from rx_edge.errors import VerificationError
from rx_edge.prompting import takes_indication
from rx_edge.runtime.self_check import INDICATION, golden_indication
from rx_edge.types import FloatArray, StudyInput

GREEDY_TOKENS = 32  # of a canary study
DRAFT_TOKENS = 64  # of a calibration study's draft
ASKED = "Cough and fever."  # a canary's indication
PLAIN = "logits_plain"  # of vectors that only such models have, beside INDICATION


@dataclass(frozen=True)
class Drafts:
    """The trained model's drafts of studies.

    Attributes:
        pixels: of each study float32 (V, 3, S, S).
        soft_prompts: of each study float32 (V * N, D).
        tokens: greedy token ids per study, the end token excluded, at most `DRAFT_TOKENS`.
        margins: by how many logits each of them was preferred; the end token's comes last.
        indications: of each study; empty = none has one.
    """

    names: tuple[str, ...]
    pixels: tuple[FloatArray, ...]
    soft_prompts: tuple[FloatArray, ...]
    tokens: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]
    indications: tuple[str, ...] = ()


def golden_file(canary: str) -> str:
    """The vectors that belong to a canary's image file."""
    return canary.rpartition(".")[0] + ".safetensors"


def load(bundle: Bundle) -> dict[str, Mapping[str, Any]]:
    """The vectors of every canary of a bundle.

    Raises:
        VerificationError: its prompt reads more than the vectors tell of.
    """
    found = {name: load_file(bundle.path(golden_file(name))) for name in bundle.manifest.canaries}
    prompt = bundle.manifest.prompt
    needed = {PLAIN} if schema_for(prompt) > SCHEMA else set()
    needed |= {INDICATION} if takes_indication(prompt) else set()
    for name, vectors in found.items():
        if not needed <= vectors.keys():
            raise VerificationError(
                f"{golden_file(name)} lacks {', '.join(sorted(needed - vectors.keys()))}, which "
                "this model's prompt needs to be verified; export it again"
            )
    return found


def study(bundle: Bundle, canary: str, vectors: Mapping[str, Any]) -> StudyInput:
    """What the golden vectors of a canary were computed from."""
    manifest = bundle.manifest
    files = [bundle.path(name) for name in views(manifest.prompt, manifest.canaries, canary)]
    return StudyInput(files[0], files[1] if len(files) == 2 else None, golden_indication(vectors))


def views(prompt: PromptConfig, canaries: Sequence[str], canary: str) -> list[str]:
    """The image files of a canary study: its own, and the next canary's for two views."""
    if prompt.views == "one":
        return [canary]
    return [canary, canaries[(list(canaries).index(canary) + 1) % len(canaries)]]


def as_vector(text: str) -> Any:
    """Text as uint8 (n,), UTF-8."""
    return np.frombuffer(text.encode(), np.uint8)
