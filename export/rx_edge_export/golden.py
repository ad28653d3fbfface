"""What the trained model said, as plain arrays: `reference.py` makes them, `verify.py` reads them.

`verify` runs on machines without torch, so nothing here may need it.
"""

from __future__ import annotations

from dataclasses import dataclass

from rx_edge.types import FloatArray

GREEDY_TOKENS = 32  # of a canary study
DRAFT_TOKENS = 64  # of a calibration study's draft


@dataclass(frozen=True)
class Drafts:
    """The trained model's drafts of studies.

    Attributes:
        pixels: float32 (K, 3, S, S).
        soft_prompts: float32 (K, N, D).
        tokens: greedy token ids per study, the end token excluded, at most `DRAFT_TOKENS`.
        margins: by how many logits each of them was preferred; the end token's comes last.
    """

    names: tuple[str, ...]
    pixels: FloatArray
    soft_prompts: FloatArray
    tokens: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]


def golden_file(canary: str) -> str:
    """The vectors that belong to a canary's image file."""
    return canary.rpartition(".")[0] + ".safetensors"
