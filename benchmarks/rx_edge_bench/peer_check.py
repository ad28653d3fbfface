"""Do other engines say the same? Our GGUF, the same token ids, greedy, engine beside engine.

llama-cpp-python's own `Llama` class shares llama.cpp with us but none of our code above it;
OpenVINO GenAI reads the same GGUF with a reader and kernels of its own. A difference counts for
little where our two best tokens were nearly equal, so their distance in logits is told.

OpenVINO GenAI runs in an interpreter of its own (`peer_engines/openvino_lm.py`). What cannot run is
reported with the reason, never left out.

Does not cover: images and speed (`peers.py`), and other engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rx_edge.bundle import open_bundle
from rx_edge.config import PromptConfig
from rx_edge.errors import BackendError, UsageError
from rx_edge.optional import require
from rx_edge.prompting import encode
from rx_edge.runtime.session import Session, open_checked
from rx_edge_bench.environment import environment
from rx_edge_bench.peer_engines import openvino_lm

SCHEMA = "rx-edge-peers/1"
# `Llama` leaves flash attention off; we have it on, which rounds otherwise
LLAMA_CPP = {"llama-cpp-python": False, "llama-cpp-python flash_attn": True}
INSTRUCTIONS = (
    "The image shows a normal chest.",
    "The image shows a large left pleural effusion.",
    "The view is lateral. The heart is enlarged.",
    "There is a pneumothorax on the right; an endotracheal tube is in place.",
    "Name the lobes of the right lung.",
    "Explain in one sentence what cardiomegaly means.",
)
# as llama.cpp computes: KV cache in float16, no 8-bit activations, and no bfloat16 products, which
# OpenVINO takes on processors that have them; none of the three is the default there
_OPENVINO_SETTINGS = {
    "KV_CACHE_PRECISION": "f16",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "INFERENCE_PRECISION_HINT": "f32",
}


@dataclass(frozen=True)
class Said:
    """Greedy ids without the end token; the margin of each in logits, the end token's last."""

    ids: tuple[int, ...]
    margins: tuple[float, ...]


def check(
    bundle: Path,
    language: str,
    prompts: Sequence[str] = INSTRUCTIONS,
    *,
    max_new_tokens: int = 32,
    threads: int | None = None,
    allow_unverified: bool = False,
) -> dict[str, Any]:
    """Compare the greedy text of three engines on one GGUF.

    Args:
        language: a GGUF artefact of the bundle, e.g. "gguf:F16".
        prompts: texts that take the image's place in the bundle's own prompt template.
        allow_unverified: take a bundle without a passing verdict; the result says so.

    Returns:
        JSON-ready: per peer whether it ran and, per prompt, {"identical", "first_difference",
        "margin"}: the index of the first other token, and our top-1/top-2 distance there.

    Raises:
        UsageError: no prompt, or the artefact is no GGUF.
        BundleError, BackendError: our own engine refuses.
    """
    opened = open_bundle(bundle, allow_unverified=allow_unverified)
    artifact = opened.language(language)
    if artifact.format != "llm_gguf" or not prompts or max_new_tokens < 1:
        raise UsageError(
            f"peers need a GGUF artefact, a prompt and a token: got {artifact.name!r}, "
            f"{len(prompts)} prompts, max_new_tokens {max_new_tokens}"
        )
    with open_checked(opened, language=artifact, threads=threads) as session:
        texts = [wrapped(opened.manifest.prompt, prompt) for prompt in prompts]
        ids = [encode(session.tokenizer, text) for text in texts]
        ours = [_greedy(session, row, max_new_tokens) for row in ids]
        peers = _peers(session, opened.path(artifact.file), texts, ids, ours, max_new_tokens)
    return {
        "schema": SCHEMA,
        "bundle_sha256": opened.digest,
        "verified": opened.manifest.verification.passed,
        "model": opened.manifest.name,
        "artifact": artifact.name,
        "prompts": list(prompts),
        "prompt_tokens": [len(row) for row in ids],
        "new_tokens": [len(o.ids) for o in ours],
        "max_new_tokens": max_new_tokens,
        "peers": peers,
        "environment": environment(),
    }


def _peers(
    session: Session,
    file: Path,
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    ours: Sequence[Said],
    limit: int,
) -> dict[str, Any]:
    peers = {
        name: _llama_cpp(session, file, texts, ids, limit, flash_attn=flash)
        for name, flash in LLAMA_CPP.items()
    }
    peers["openvino-genai"] = _openvino(session, file, ids, limit)
    decode = session.tokenizer.decode
    for peer in peers.values():
        said = peer.pop("said", None)  # None: it did not run
        if said is not None:
            verdicts = [judge(o, row, decode) for o, row in zip(ours, said, strict=True)]
            peer["identical"] = sum(v["identical"] for v in verdicts)
            peer["prompts"] = verdicts
    return peers


def wrapped(prompt: PromptConfig, instruction: str) -> str:
    """The bundle's prompt with `instruction` where the image would be."""
    return prompt.template.replace("{image}", instruction)


def judge(ours: Said, found: Sequence[int], decode: Any) -> dict[str, Any]:
    """Compare one answer with ours, as tokens and as text."""
    at = first_difference(ours.ids, found)
    same_text = decode(list(ours.ids)) == decode(list(found))
    return {
        "identical": at is None and same_text,
        "first_difference": at,
        "margin": None if at is None else round(ours.margins[at], 4),
    }


def first_difference(wanted: Sequence[int], found: Sequence[int]) -> int | None:
    """Index of the first token that differs, the end being a token too; None if there is none."""
    for index, (a, b) in enumerate(zip(wanted, found, strict=False)):
        if a != b:
            return index
    return None if len(wanted) == len(found) else min(len(wanted), len(found))


def _greedy(session: Session, ids: Sequence[int], limit: int) -> Said:
    """As production decodes: one token at a time."""
    language = session.language
    language.rewind(0)
    logits = language.prefill([np.asarray(ids, np.int32)])
    out: list[int] = []
    margins: list[float] = []
    while len(out) < limit:
        second, first = np.partition(logits, -2)[-2:]
        margins.append(float(first - second))
        token = int(logits.argmax())
        if token == session.prompt.end:
            break
        out.append(token)
        logits = language.step(np.asarray([token], np.int32))[-1]
    return Said(tuple(out), tuple(margins))


def _llama_cpp(
    session: Session,
    file: Path,
    texts: Sequence[str],
    prompts: Sequence[Sequence[int]],
    limit: int,
    *,
    flash_attn: bool,
) -> dict[str, Any]:
    """The high-level class with its defaults: float16 KV cache, its own batching and sampler."""
    api = require("llama_cpp", extra="cpu")
    generate = session.generate
    peer = api.Llama(
        model_path=str(file),
        n_ctx=generate.n_ctx,
        n_threads=generate.threads or None,
        n_threads_batch=generate.threads or None,
        flash_attn=flash_attn,
        verbose=False,
    )
    try:
        # its tokenizer is the engine's; ours is the trained one: they must agree on the prompt
        agree = [
            peer.tokenize(text.encode(), add_bos=False, special=True) == list(ids)
            for text, ids in zip(texts, prompts, strict=True)
        ]
        said = []
        for ids in prompts:
            answer: list[int] = []
            for token in peer.generate(list(ids), temp=0.0, repeat_penalty=1.0):
                if token == session.prompt.end or len(answer) == limit:
                    break
                answer.append(int(token))
            said.append(answer)
    finally:
        peer.close()
    return {
        "ran": True,
        "version": api.__version__,
        "settings": {"n_ctx": generate.n_ctx, "temperature": 0.0, "flash_attn": flash_attn},
        "same_prompt_ids": sum(agree),
        "said": said,
    }


def _openvino(
    session: Session, file: Path, prompts: Sequence[Sequence[int]], limit: int
) -> dict[str, Any]:
    reason = openvino_lm.is_available()
    if reason is not None:
        return {"ran": False, "reason": reason}
    end = session.prompt.end
    try:
        with openvino_lm.Worker(file, _OPENVINO_SETTINGS) as worker:
            version = worker.version
            rows = [worker.generate(ids, limit, end=end)[0] for ids in prompts]
    except BackendError as error:
        return {"ran": False, "reason": str(error)}
    said = [row[:-1] if row and row[-1] == end else row for row in rows]
    return {"ran": True, "version": version, "settings": _OPENVINO_SETTINGS, "said": said}
