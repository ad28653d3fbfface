"""llama.cpp's fused attention kernel, on and off: is it faster, and does a batch change a token?

Both contexts compute in turns: a prompt of a soft prompt's length, and passes of several widths
over the same tokens. The largest difference between a token's logits in a pass of its own and in a
wider one says whether proposals could decide a tie.

Does not cover: GPUs, contexts much longer than a report.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from rx_edge.backends import llm_gguf
from rx_edge.bundle import open_bundle
from rx_edge.types import Logits
from rx_edge_bench.environment import environment, fingerprint
from rx_edge_bench.latency import spread

SCHEMA = "rx-edge-attention/1"
PROMPT, TOKENS = 90, 16  # tokens
WIDTHS = (1, 2, 4, 8, 16)


def measure(root: Path, *, language: str | None = None, repeats: int = 20) -> dict[str, Any]:
    """Time and compare both settings for one GGUF artefact of a bundle.

    Returns:
        JSON-ready: seconds of a prompt and of a pass per width; largest absolute difference of
        logits between widths.
    """
    bundle = open_bundle(root)
    artifact = bundle.language(language)
    file, generate = bundle.path(artifact.file), bundle.manifest.generate
    random = np.random.default_rng(0)
    names = ("off", "on")
    seconds: dict[str, dict[str, list[float]]] = {n: {} for n in names}
    rows: dict[str, dict[int, Logits]] = {n: {} for n in names}
    models = {
        name: llm_gguf.open(
            file, n_ctx=generate.n_ctx, threads=generate.threads, flash_attention=name == "on"
        )
        for name in names
    }
    ids = random.integers(0, models["on"].n_vocab, PROMPT + TOKENS).astype(np.int32)
    for _ in range(repeats):
        for name, model in models.items():
            model.rewind(0)
            started = time.perf_counter()
            model.prefill([ids[:PROMPT]])
            seconds[name].setdefault("prompt", []).append(time.perf_counter() - started)
            for width in WIDTHS:
                model.rewind(PROMPT)
                started = time.perf_counter()
                found = [model.step(ids[i : i + width]) for i in _starts(width)]
                taken = (time.perf_counter() - started) / len(found)
                seconds[name].setdefault(f"pass of {width}", []).append(taken)
                rows[name][width] = np.concatenate(found)
    for model in models.values():
        model.close()
    return {
        "schema": SCHEMA,
        "bundle_sha256": bundle.digest,
        "model": bundle.manifest.name,
        "artefact": artifact.name,
        "prompt_tokens": PROMPT,
        "repeats": repeats,
        "flash_attention": {
            name: {
                "seconds": {what: spread(values) for what, values in seconds[name].items()},
                "largest_difference_to_single_tokens": {
                    str(width): float(np.abs(found - rows[name][1]).max())
                    for width, found in rows[name].items()
                },
            }
            for name in names
        },
        "fingerprint": fingerprint(),
        "environment": environment(),
    }


def _starts(width: int) -> range:
    return range(PROMPT, PROMPT + TOKENS, width)
