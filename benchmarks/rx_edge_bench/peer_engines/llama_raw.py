"""What `llama-bench` times: prefill in one call, then one token at a time, nothing else.

The greedy sampler runs, and what it says is not fed back: the tokens are random, as llama-bench's.
Whatever our own language half takes beyond this is overhead of ours.

Also llama-cpp-python's high-level class, which adds its own Python around the same loop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

from rx_edge.backends import gguf_engine, llm_gguf
from rx_edge.closing import Closing
from rx_edge.optional import require
from rx_edge_bench.peer_engines.base import Job, random_ids
from rx_edge_bench.peer_engines.llama_common import Context


def is_available() -> str | None:
    """None, or why it cannot run here."""
    return llm_gguf.is_available()


class LlamaRaw(Closing):
    """llama.cpp's low-level calls with llama.cpp's defaults."""

    def __init__(self, job: Job) -> None:
        """Open the language model.

        Raises:
            BackendError: llama.cpp refuses it.
        """
        self._api = gguf_engine.engine()
        self._model = gguf_engine.load_model(self._api, job.llm)
        try:
            self._context = Context(self._api, self._model, n_ctx=job.n_ctx, threads=job.threads)
        except BaseException:
            self._api.llama_model_free(self._model)
            raise
        self._vocab = int(self._api.llama_vocab_n_tokens(self._context.vocab))
        self.weights = job.artifact.name
        self.settings: dict[str, Any] = {"flash_attn": "auto"}

    def write(self, prompt: Sequence[int], tokens: int) -> float:
        """Seconds for a text of exactly `tokens` tokens; `prompt` fits one batch."""
        script, context = random_ids(tokens, self._vocab, tokens), self._context
        started = time.perf_counter()
        context.clear()
        context.decode(prompt)
        context.sample()
        for token in script[:-1]:
            context.decode([token])
            context.sample()
        return time.perf_counter() - started

    def close(self) -> None:
        """Free context and model; idempotent."""
        self._context.close()
        if self._model is not None:
            self._api.llama_model_free(self._model)
            self._model = None


class LlamaHighLevel(Closing):
    """llama-cpp-python's `Llama` with its defaults, where flash attention is off."""

    def __init__(self, job: Job, *, flash_attn: bool = False) -> None:
        """Open the language model.

        Raises:
            MissingExtraError: llama-cpp-python is not installed.
        """
        self._llama = require("llama_cpp", extra="cpu").Llama(
            model_path=str(job.llm),
            n_ctx=job.n_ctx,
            n_threads=job.threads,
            n_threads_batch=job.threads,
            flash_attn=flash_attn,
            verbose=False,
        )
        self.weights = job.artifact.name
        self.settings: dict[str, Any] = {"flash_attn": flash_attn, "temperature": 0.0}

    def write(self, prompt: Sequence[int], tokens: int) -> float:
        """Seconds for its own greedy text of `tokens` tokens."""
        started = time.perf_counter()
        self._llama.reset()
        stream = self._llama.generate(list(prompt), temp=0.0, repeat_penalty=1.0)
        written = sum(1 for _ in islice(stream, tokens))
        seconds = time.perf_counter() - started
        stream.close()
        assert written == tokens
        return seconds

    def close(self) -> None:
        """Free it."""
        self._llama.close()
