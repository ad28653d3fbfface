"""A llama.cpp context with llama.cpp's own defaults and its greedy sampler.

Does not cover: our settings (`rx_edge.backends.llm_gguf`).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

from rx_edge.backends.gguf_engine import reason
from rx_edge.closing import Closing
from rx_edge.errors import BackendError


class Context(Closing):
    """A context over an opened model: flash attention `auto`, batches of 2048 / 512 tokens."""

    def __init__(self, api: Any, model: Any, *, n_ctx: int, threads: int) -> None:
        """Make it; it must be closed before the model.

        Raises:
            BackendError: llama.cpp refuses.
        """
        params = api.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_threads = params.n_threads_batch = threads
        self.batch = int(params.n_batch)
        self.context = api.llama_init_from_model(model, params)
        if not self.context:
            raise BackendError(f"llama.cpp cannot make a context of {n_ctx} tokens{reason()}")
        self._api, self.vocab = api, api.llama_model_get_vocab(model)
        self._memory = api.llama_get_memory(self.context)
        sampler = api.llama_sampler_init_greedy()
        self._sampler = sampler
        self._release = weakref.finalize(self, _free, api, self.context, sampler)

    def clear(self) -> None:
        """Empty the KV cache."""
        self._api.llama_memory_clear(self._memory, True)

    def decode(self, ids: Sequence[int]) -> None:
        """Append ids, at most `batch`; logits of the last one.

        Raises:
            BackendError: llama.cpp's code.
        """
        array = (ctypes.c_int32 * len(ids))(*ids)
        code = self._api.llama_decode(self.context, self._api.llama_batch_get_one(array, len(ids)))
        if code != 0:
            raise BackendError(f"llama_decode returned {code} for {len(ids)} tokens{reason()}")

    def sample(self) -> int:
        """The most probable token after the last one."""
        return int(self._api.llama_sampler_sample(self._sampler, self.context, -1))

    def close(self) -> None:
        """Free it; idempotent."""
        self._release()


def _free(api: Any, context: Any, sampler: Any) -> None:
    api.llama_sampler_free(sampler)
    api.llama_free(context)
