"""llama.cpp's fused attention, on and off: is it faster, and can a wider pass change a draft?

For every real study both settings compute the prompt and a greedy draft, one token at a time, in
turns; the same tokens then go in again, several per pass. Where a wider pass would have chosen
another token, proposals could have changed the draft. Random tokens show nothing of this.

Does not cover: GPUs, contexts much longer than a report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from rx_edge.backends import llm_gguf
from rx_edge.backends.llm_gguf import GgufLanguage
from rx_edge.prompting import layout
from rx_edge.runtime.pipeline import open_study
from rx_edge.runtime.session import Session
from rx_edge.types import Logits
from rx_edge_bench.environment import environment, fingerprint
from rx_edge_bench.latency import spread

SCHEMA = "rx-edge-attention/2"
TOKENS = 32  # of a draft at most
WIDTHS = (2, 4, 8)
SETTINGS = {"on": True, "off": False}


class _Found:
    """What one setting did, study by study."""

    def __init__(self) -> None:
        self.prompt: list[float] = []
        self.token: list[float] = []
        self.tokens = 0
        self.largest = dict.fromkeys(WIDTHS, 0.0)
        self.other_choice = dict.fromkeys(WIDTHS, 0)

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": {"prompt": spread(self.prompt), "token": spread(self.token)},
            "tokens": self.tokens,
            "by_tokens_per_pass": {
                str(width): {
                    "largest_difference": self.largest[width],
                    "other_choices": self.other_choice[width],
                }
                for width in WIDTHS
            },
        }


def measure(
    session: Session,
    studies: Sequence[Path],
    tick: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Compare both settings for the session's language model, a GGUF file.

    Returns:
        JSON-ready: seconds of the prompt and of a token; per width the largest absolute
        difference of logits from single passes, and how many tokens would have been others.
    """
    file = session.bundle.path(session.artifact.file)
    n_ctx, threads = session.generate.n_ctx, session.generate.threads
    found = {name: _Found() for name in SETTINGS}
    with ExitStack() as stack:
        models = {
            name: stack.enter_context(
                llm_gguf.open(file, n_ctx=n_ctx, threads=threads, flash_attention=flash)
            )
            for name, flash in SETTINGS.items()
        }
        for number, study in enumerate(studies, start=1):
            soft = session.vision.encode(open_study(session, study).images.pixels)[0]
            names = list(models) if number % 2 else list(models)[::-1]
            for name in names:
                _compare(session, models[name], layout(session.prompt, soft), found[name])
            tick(number, len(studies))
    return {
        "schema": SCHEMA,
        "bundle_sha256": session.bundle.digest,
        "model": session.bundle.manifest.name,
        "artefact": session.artifact.name,
        "studies": len(studies),
        "flash_attention": {name: result.to_json() for name, result in found.items()},
        "fingerprint": fingerprint(),
        "environment": environment(),
    }


def _compare(session: Session, model: GgufLanguage, prompt: Any, found: _Found) -> None:
    before, *rest = prompt
    if not model.reuse(before):  # as production does: the constant start stays
        model.prefill([before])
    started = time.perf_counter()
    logits = model.prefill(rest)
    found.prompt.append(time.perf_counter() - started)
    start = model.position
    ids: list[int] = []
    rows: list[Logits] = []
    while len(ids) < TOKENS and (token := int(logits.argmax())) != session.prompt.end:
        ids.append(token)
        started = time.perf_counter()
        logits = model.step(np.asarray([token], np.int32))[0]
        found.token.append(time.perf_counter() - started)
        rows.append(logits)
    if not ids:
        return
    single: Logits = np.stack(rows)
    found.tokens += len(ids)
    fed = np.asarray(ids, np.int32)
    for width in WIDTHS:
        model.rewind(start)
        wide = np.concatenate([model.step(fed[i : i + width]) for i in range(0, len(fed), width)])
        found.largest[width] = max(found.largest[width], float(np.abs(wide - single).max()))
        found.other_choice[width] += int((wide.argmax(-1) != single.argmax(-1)).sum())
