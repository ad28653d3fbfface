"""A GGUF language model on the CPU or a GPU, through llama.cpp's low-level API.

The high-level `Llama` class cannot take embeddings, so this drives `llama_decode` itself. A batch
holds token ids or embeddings, so text next to a soft prompt is looked up on the host
(`gguf_rows.py`) and both go in as one batch. Every limit that llama.cpp enforces by aborting the
process, or not at all, is checked here first: batch size, room in the KV cache, ids outside the
vocabulary, NaN.

`exact=True` computes attention plainly with a float32 KV cache: parity with torch is then
about 1e-5 and a real conversion fault stands out. Production uses a float16 KV cache.

On a GPU every layer is there; the embedding table is still read on the host, so that a soft prompt
and the text after it go over in one copy.

Does not cover: several sequences (`llm_gguf_parallel.py`), several GPUs, sampling.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from rx_edge.backends import gguf_batch, gguf_engine, gguf_gpu
from rx_edge.backends.base import (
    PAIRING_KEY,
    KnownStart,
    Segment,
    checked_ids,
    checked_segment,
)
from rx_edge.backends.gguf_batch import Batch, read_logits
from rx_edge.backends.gguf_rows import EmbeddingRows
from rx_edge.backends.llm_gguf_parallel import GgufParallel
from rx_edge.closing import Closing
from rx_edge.errors import BackendError, MissingExtraError
from rx_edge.machine import physical_cores
from rx_edge.types import FloatArray, IntArray, Logits

REQUIRES = ("llama_cpp",)
SHARES_WEIGHTS = True  # the file is memory-mapped: opened again, it takes no more memory

BATCH = gguf_batch.SIZE

_NO_ROOM = 1  # llama_decode: no KV slot was found


def is_available() -> str | None:
    """None, or why this backend cannot be used here."""
    try:
        gguf_engine.engine()
    except MissingExtraError as error:
        return str(error)
    except (OSError, RuntimeError) as error:  # the shared library does not load
        return f"llama-cpp-python is installed but does not load: {error}"
    return None


def devices() -> tuple[str, ...]:
    """What this build of llama.cpp can run on here, best first.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
    """
    return ("cuda", "cpu") if gguf_gpu.gpus(gguf_engine.engine()) else ("cpu",)


def open(
    path: Path,
    *,
    n_ctx: int,
    threads: int,
    exact: bool = False,
    fused: bool = True,
    flash_attention: bool = gguf_engine.FLASH_ATTENTION,
    device: str = "cpu",
) -> GgufLanguage:
    """Load a GGUF file (memory-mapped).

    Args:
        n_ctx: length of the KV cache in tokens.
        threads: CPU threads; 0 = one per physical core this process may use.
        exact: float32 KV cache and no flash attention, for parity checks; slower.
        fused: prefill soft prompt and text as one batch; False = one batch for each.
        flash_attention: the fused attention kernel; `exact` never uses it.
        device: "cpu" or "cuda".

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        DeviceMemoryError: the GPU has too little memory for weights or KV cache.
        BackendError: no such file, not a GGUF, refused by llama.cpp (its reason is in the
            message), or `n_ctx` is longer than the model was trained for.
    """
    gguf_engine.check_file(path)
    if n_ctx < 1 or threads < 0:
        raise BackendError(
            f"n_ctx is {n_ctx} and threads is {threads}; use n_ctx >= 1, threads >= 0"
        )
    if device not in ("cpu", "cuda"):
        raise BackendError(f"device is {device!r}; valid: 'cpu', 'cuda'")
    api = gguf_engine.engine()
    gpu = gguf_gpu.first(api) if device == "cuda" else None
    model = gguf_engine.load_model(api, path, gpu)
    try:
        trained = int(api.llama_model_n_ctx_train(model))
        if n_ctx > trained:
            raise BackendError(
                f"{str(path)!r}: n_ctx is {n_ctx} but the model was trained for {trained}; "
                "ask for less"
            )
        threads = threads or physical_cores()
        if gpu:
            gpu = gguf_gpu.first(api)  # free memory as it is beside the weights
        context = gguf_engine.new_context(
            api, model, path, n_ctx, threads, exact, flash_attention, gpu=gpu
        )
    except BaseException:
        api.llama_model_free(model)
        raise
    language = GgufLanguage(api, model, context, path, n_ctx, threads, gpu)
    if fused:
        try:
            language.fuse()
        except BaseException:
            language.close()
            raise
    return language


class GgufLanguage(Closing):
    """A `LanguageBackend` (see `base.py` for the contract of every method)."""

    def __init__(
        self,
        api: Any,
        model: Any,
        context: Any,
        path: Path,
        n_ctx: int,
        threads: int,
        gpu: gguf_gpu.Gpu | None,
    ) -> None:
        self._api, self._model, self._path, self._threads = api, model, path, threads
        self._gpu = gpu
        self.device = f"cuda ({gpu.name})" if gpu else "cpu"
        self._context: Any = context
        self._vocab = api.llama_model_get_vocab(model)
        self._memory = api.llama_get_memory(context)
        self._n_ctx = n_ctx
        self._position = 0
        self._start = KnownStart()
        self._rows: EmbeddingRows | None = None
        self.n_vocab = int(api.llama_vocab_n_tokens(self._vocab))
        self.n_embd = int(api.llama_model_n_embd(model))
        self.pairing = gguf_engine.metadata(api, model, PAIRING_KEY)
        self.sequence_bytes = n_ctx * gguf_engine.cache_bytes_per_token(api, model)
        self._batch = Batch(api)
        # also runs when the object is dropped without close(); calling it twice does nothing
        self._release = weakref.finalize(self, gguf_engine.free, api, context, model)

    @property
    def version(self) -> str:
        """The engine and its version."""
        return f"llama-cpp-python {metadata.version('llama-cpp-python')}"

    @property
    def position(self) -> int:
        """Tokens and embeddings in the KV cache."""
        return self._position

    def fuse(self) -> None:
        """From now on, prefill text next to a soft prompt in its batch."""
        self._rows = EmbeddingRows(self._api._lib, self._path, self.n_vocab, self.n_embd)

    def set_threads(self, threads: int) -> None:
        """Use this many CPU threads from the next call on."""
        self._check_open()
        self._threads = threads
        self._api.llama_set_n_threads(self._context, threads, threads)

    def reuse(self, ids: IntArray) -> int:
        """Keep `ids` where the KV cache is known to start with them, else nothing."""
        kept = len(ids) if self._start.holds(ids) else 0
        self.rewind(kept)
        return kept

    def prefill(self, segments: Sequence[Segment]) -> FloatArray:
        """Append segments; float32 (V,) logits after the last position."""
        checked = [
            s for s in (checked_segment(s, self.n_vocab, self.n_embd) for s in segments) if len(s)
        ]
        self._check_room(sum(map(len, checked)))
        if self._rows and len(checked) > 1 and any(s.ndim == 2 for s in checked):
            checked = [np.concatenate([self._rows.rows(s) for s in checked])]
        start = self._position
        try:
            for segment in checked[:-1]:
                self._append(segment, "none")
            logits: FloatArray = self._append(checked[-1], "last")[0]
            return logits
        except BaseException:  # Ctrl-C as well: the cache and `position` must agree
            self.rewind(start)
            raise

    def step(self, ids: IntArray) -> Logits:
        """Append ids (T,); float32 (T, V) logits after every one."""
        ids = checked_ids(np.asarray(ids), self.n_vocab)
        self._check_room(len(ids))
        start = self._position
        try:
            return self._append(ids, "all")
        except BaseException:  # Ctrl-C as well: the cache and `position` must agree
            self.rewind(start)
            raise

    def rewind(self, position: int) -> None:
        """Keep the first `position` tokens."""
        self._check_open()
        if not 0 <= position <= self._position:
            raise BackendError(f"rewind to {position}: the KV cache holds {self._position} tokens")
        # A failed batch can leave cells beyond `position`, so this runs even where it looks idle.
        if not self._api.llama_memory_seq_rm(self._memory, 0, position, -1):
            self._fail(f"the KV cache cannot be cut at token {position}")
        self._position = position
        self._start.cut(position)

    def parallel(self, slots: int) -> GgufParallel:
        """A second context over the same weights, in which `slots` sequences decode together.

        Raises:
            BackendError: llama.cpp cannot make it, or closed. It must be closed before this model.
        """
        self._check_open()
        rows = self._rows or EmbeddingRows(self._api._lib, self._path, self.n_vocab, self.n_embd)
        context = gguf_engine.new_context(
            self._api, self._model, self._path, self._n_ctx, self._threads, slots=slots,
            gpu=self._gpu and gguf_gpu.first(self._api),
        )  # fmt: skip
        sizes = self.n_vocab, self.n_embd
        return GgufParallel(self._api, context, rows, slots=slots, n_ctx=self._n_ctx, sizes=sizes)

    def tokenize(self, text: str) -> list[int]:
        """Ids by the tokenizer inside the GGUF, for comparison with the trained one."""
        self._check_open()
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 1))()  # no tokenizer makes more ids than bytes
        n = self._api.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), False, True)
        if n < 0:
            self._fail(f"a text of {len(raw)} bytes cannot be tokenised")
        return [int(i) for i in ids[:n]]

    def close(self) -> None:
        """Free context and model; idempotent."""
        self._release()
        self._context = None

    def _append(self, segment: Segment, outputs: Literal["none", "last", "all"]) -> Logits:
        """Decode one checked segment in chunks.

        Returns:
            float32 (rows, V): rows is 0, 1 or len(segment) for outputs "none", "last", "all".
        """
        size = gguf_engine.OUTPUTS if outputs == "all" else BATCH
        rows = {"none": 0, "last": 1, "all": len(segment)}[outputs]
        logits = np.empty((rows, self.n_vocab), np.float32)
        filled = 0
        for first in range(0, len(segment), size):
            chunk = segment[first : first + size]
            wanted = np.full(len(chunk), outputs == "all", np.int8)
            if outputs == "last" and first + len(chunk) == len(segment):
                wanted[-1] = 1
            self._decode(chunk, wanted)
            got = int(wanted.sum())
            if got:
                logits[filled : filled + got] = self._read_logits(got)
                filled += got
        return logits

    def _decode(self, chunk: Segment, wanted: Any) -> None:
        n, start = len(chunk), self._position
        positions = np.arange(start, start + n, dtype=np.int32)
        gguf_engine.last_errors()
        code = self._batch.decode(self._context, chunk, positions, 0, wanted)
        if code == _NO_ROOM:
            self._fail(f"no room for {n} tokens after {start}")
        if code != 0:
            self._fail(f"llama_decode returned {code} for {n} tokens at {start}")
        self._start.append(chunk, start)
        self._position += n

    def _read_logits(self, rows: int) -> Logits:
        """The last call's logits, still in llama.cpp's memory: copy before the next call."""
        logits = read_logits(self._api, self._context, rows, self.n_vocab)
        if logits is None:
            self._fail("llama.cpp computed no logits")
        check_finite(logits, self._position)
        return logits

    def _check_room(self, n: int) -> None:
        self._check_open()
        if n == 0:
            raise BackendError("nothing to decode: no token ids and no embeddings were given")
        if self._position + n > self._n_ctx:
            raise BackendError(
                f"context is full: {self._position} tokens + {n} more exceed n_ctx "
                f"{self._n_ctx}; raise generate.n_ctx or shorten the prompt"
            )

    def _check_open(self) -> None:
        if self._context is None:
            raise BackendError("this language model is closed; open the file again")

    def _fail(self, what: str) -> NoReturn:
        raise BackendError(what + gguf_engine.reason())


def check_finite(logits: Logits, position: int) -> None:
    """Refuse NaN and infinity: nothing may be drafted from nonsense.

    Raises:
        BackendError: some number is not finite.
    """
    if not np.isfinite(logits).all():
        raise BackendError(
            f"the language model returned NaN or infinite logits before token {position};"
            " the file or this build of llama.cpp is broken"
        )
