"""What a GPU could do at best with a 7B report generator: a projection, not a measurement.

Decoding reads every weight once per pass, so bytes over bandwidth bound it from below; vision and
prefill are bound by operations over peak rate. Nothing here knows launch overhead, clocks or
kernels: the second column takes the share of the bound that others report of llama.cpp.

Does not cover: measuring (`latency.py`), memory while exporting (`rx_edge_export.plan`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rx_edge_bench.export_memory import GEOMETRY, LAYERS
from rx_edge_export.gguf_architectures import Architecture, read
from rx_edge_export.plan import kv_cache, language_bytes

SCHEMA = "rx-edge-projection/1"
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A card by its data sheet.

    Attributes:
        bandwidth: bytes per second.
        rate: dense float16 tensor operations per second, float32 accumulation.
        memory: bytes.
        share: of the bound that llama.cpp is reported to reach in decoding; None = no report.
    """

    name: str
    bandwidth: float
    rate: float
    memory: int
    share: float | None = None


# NVIDIA data sheets and architecture papers; shares: third-party llama-bench tables, not ours
GPUS = (
    Gpu("GeForce RTX 4090", 1008e9, 165.2e12, 24 * GIB, 0.70),
    Gpu("RTX 6000 Ada", 960e9, 364.2e12, 48 * GIB, 0.70),
    Gpu("RTX 4000 Ada", 360e9, 106.8e12, 20 * GIB),
    Gpu("RTX A4000", 448e9, 76.7e12, 16 * GIB),
    Gpu("L4", 300e9, 121e12, 24 * GIB),
    Gpu("H200", 4800e9, 989e12, 141 * GIB, 0.25),
)


@dataclass(frozen=True)
class Tower:
    """A ViT by its numbers: blocks, width, tokens of one image (CLS included)."""

    name: str
    blocks: int
    width: int
    tokens: int

    @property
    def operations(self) -> float:
        """Of one image: 12 width^2 weights per block and token, and attention."""
        linear = 2 * 12 * self.width**2 * self.tokens
        attention = 4 * self.tokens**2 * self.width
        return float(self.blocks * (linear + attention))


TOWERS = (
    Tower("ViT-B/14 at 518 pixels", 12, 768, 1 + 37**2),
    Tower("ViT-L/14 at 336 pixels", 24, 1024, 1 + 24**2),
)


def project(
    *,
    precisions: Sequence[str] = ("F16", "Q8_0", "Q4_K_M"),
    prompt_tokens: int = 89,
    new_tokens: int = 100,
    tokens_per_pass: float = 1.0,
    proposed: int = 7,
) -> dict[str, Any]:
    """Bounds for every card and precision of an OpenLLaMA-7B geometry.

    Args:
        prompt_tokens: soft prompt and text.
        tokens_per_pass: with proposals; a measured figure of another model, 1 = without.
        proposed: tokens in such a pass beside the first.

    Returns:
        JSON-ready, schema `SCHEMA`; seconds, bytes and operations.
    """
    shape, rows = _seven_billion(), []
    for gpu in GPUS:
        for precision in precisions:
            weights = language_bytes(shape, precision)
            cache = kv_cache(shape, prompt_tokens + new_tokens)
            rows.append(_row(gpu, precision, weights, cache, shape, prompt_tokens,
                             new_tokens, tokens_per_pass, proposed))  # fmt: skip
    return {
        "schema": SCHEMA,
        "kind": "projection from bytes and operations; nothing here was measured on these cards",
        "language_model": "OpenLLaMA-7B geometry",
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "tokens_per_pass": tokens_per_pass,
        "towers": {t.name: t.operations for t in TOWERS},
        "cards": [asdict(gpu) for gpu in GPUS],
        "rows": rows,
    }


def _row(
    gpu: Gpu,
    precision: str,
    weights: int,
    cache: int,
    shape: Architecture,
    prompt_tokens: int,
    new_tokens: int,
    tokens_per_pass: float,
    proposed: int,
) -> dict[str, Any]:
    operations = 2.0 * _matrix_weights(shape)  # of one token
    read_once = (weights + cache) / gpu.bandwidth
    alone = max(read_once, operations / gpu.rate)
    wide = max(read_once, operations * (1 + proposed) / gpu.rate)
    prefill = max(weights / gpu.bandwidth, operations * prompt_tokens / gpu.rate)
    vision = {tower.name: tower.operations / gpu.rate for tower in TOWERS}
    passes = new_tokens / tokens_per_pass
    decode = passes * (alone if tokens_per_pass == 1 else wide)
    return {
        "card": gpu.name,
        "precision": precision,
        "weight_bytes": weights,
        "fits": weights + cache + GIB <= gpu.memory,  # a GiB for vision and work space
        "vision": vision,
        "prefill": prefill,
        "per_token": alone,
        "decode": decode,
        "decode_at_reported_share": decode / gpu.share if gpu.share else None,
        "report": max(vision.values()) + prefill + decode,
    }


def _matrix_weights(shape: Architecture) -> int:
    """Weights that a token is multiplied with: all matrices but the embedding table."""
    return sum(
        t.shape[0] * t.shape[1]
        for t in shape.tensors
        if len(t.shape) == 2 and t.target != "token_embd.weight"
    )


def _seven_billion() -> Architecture:
    with tempfile.TemporaryDirectory(prefix="rx-edge-") as work:
        config = Path(work) / "config.json"
        config.write_text(json.dumps({**GEOMETRY, "num_hidden_layers": LAYERS}), encoding="utf-8")
        return read(config)
