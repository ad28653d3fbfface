"""Do other engines say the same? Our GGUF, the same token ids, greedy, engine beside engine.

llama-cpp-python's own `Llama` class shares llama.cpp with us but none of our code above it;
OpenVINO GenAI reads the same GGUF with a reader and kernels of its own. A difference counts for
little where our two best tokens were nearly equal, so their distance in logits is told.

OpenVINO GenAI may need other packages than rx-edge: it runs in an interpreter of its own, named
by RX_EDGE_OPENVINO_PYTHON. What cannot run is reported with the reason, never left out.

Does not cover: images (engines differ in how they take them), speed, and other engines.
"""

from __future__ import annotations

import json
import os
import subprocess
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

SCHEMA = "rx-edge-peers/1"
VARIABLE = "RX_EDGE_OPENVINO_PYTHON"
# `Llama` leaves flash attention off; we have it on, which rounds otherwise
LLAMA_CPP = {"llama-cpp-python": False, "llama-cpp-python flash_attn": True}
TIMEOUT = 1800  # seconds for the other interpreter: it converts the GGUF when it loads it
INSTRUCTIONS = (
    "The image shows a normal chest.",
    "The image shows a large left pleural effusion.",
    "The view is lateral. The heart is enlarged.",
    "There is a pneumothorax on the right; an endotracheal tube is in place.",
    "Name the lobes of the right lung.",
    "Explain in one sentence what cardiomegaly means.",
)
# KV cache in float16 as llama.cpp's, and no 8-bit activations; both are off by default there
_OPENVINO_SETTINGS = {"KV_CACHE_PRECISION": "f16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
_OPENVINO = """
import json, sys
asked = json.load(sys.stdin)
import numpy, openvino, openvino_genai
pipe = openvino_genai.LLMPipeline(asked["file"], "CPU", **asked["settings"])
config = openvino_genai.GenerationConfig()
config.max_new_tokens = asked["max_new_tokens"]
config.do_sample = False
config.stop_token_ids = {asked["end"]}
config.eos_token_id = asked["end"]
config.apply_chat_template = False
said = []
for ids in asked["prompts"]:
    tensor = openvino.Tensor(numpy.asarray([ids], numpy.int64))
    said.append([int(t) for t in pipe.generate(tensor, config).tokens[0]])
sys.stdout.write("\\n" + json.dumps({"version": openvino_genai.__version__, "said": said}) + "\\n")
"""


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
    python = os.environ.get(VARIABLE)
    if not python:
        return {
            "ran": False,
            "reason": f"{VARIABLE} is not set: name the python of an environment with "
            "openvino-genai and openvino-tokenizers",
        }
    asked = {
        "file": str(file.resolve()),
        "settings": _OPENVINO_SETTINGS,
        "prompts": [list(ids) for ids in prompts],
        "max_new_tokens": limit,
        "end": session.prompt.end,
    }
    try:
        answer = _other_interpreter(python, asked)
    except BackendError as error:
        return {"ran": False, "reason": str(error)}
    end = session.prompt.end
    said = [row[:-1] if row and row[-1] == end else row for row in answer["said"]]
    return {
        "ran": True,
        "version": answer["version"],
        "settings": _OPENVINO_SETTINGS,
        "said": said,
    }


def _other_interpreter(python: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Run `_OPENVINO` there; its last line of output is the answer.

    Raises:
        BackendError: it did not answer; the last line of its errors, without paths, says why.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    try:
        done = subprocess.run(
            [python, "-c", _OPENVINO],
            env={**environment, "DO_NOT_TRACK": "1"},
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        kind = type(error).__name__  # its text names the file
        raise BackendError(f"the interpreter of {VARIABLE} gave no answer: {kind}") from error
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        reason = lines[-1].replace(asked["file"], Path(asked["file"]).name)
        raise BackendError(f"OpenVINO GenAI ended with code {done.returncode}: {reason}") from None
    return answer
