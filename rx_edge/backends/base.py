"""What the runtime asks of an inference engine: two protocols and the checks they share.

Every artefact carries the pairing hash of the model it belongs to, under `PAIRING_KEY` in its own
metadata: a vision file and a language file of different models fit by shape and draft nonsense.

A backend module (see `registry.py`) holds `REQUIRES`, `is_available()` and `open(...)`, which
returns one of these. Both protocols are context managers whose exit is `close()`. Neither is
thread-safe: one object belongs to one thread at a time.

Does not cover: choosing a backend or a device (`registry.py` and the caller, explicitly),
sampling, drafting and stopping (`rx_edge.runtime`).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias, runtime_checkable

import numpy as np

from rx_edge.errors import BackendError
from rx_edge.types import FloatArray, IntArray, Logits, SoftPrompt

Segment: TypeAlias = IntArray | SoftPrompt  # token ids (T,) int32, or embeddings (N, D) float32

PAIRING_KEY = "rx_edge.pairing"


def checked_ids(ids: Any, n_vocab: int) -> IntArray:
    """Token ids (T,) as int32.

    Raises:
        BackendError: not integers (T,), or outside the vocabulary.
    """
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise BackendError(f"token ids are {ids.dtype} {ids.shape}; integers (T,) are expected")
    if len(ids) and not (ids.min() >= 0 and ids.max() < n_vocab):
        raise BackendError(
            f"token ids run from {ids.min()} to {ids.max()}; the vocabulary has 0 to {n_vocab - 1}"
        )
    return np.asarray(ids, np.int32)


def checked_embeddings(embeddings: Any, n_embd: int) -> SoftPrompt:
    """Embeddings (N, D) as C-contiguous float32.

    Raises:
        BackendError: another width or dtype, or numbers that are not finite.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] != n_embd:
        raise BackendError(
            f"embeddings have shape {embeddings.shape}; (N, {n_embd}) is expected: "
            "this soft prompt belongs to another language model"
        )
    if embeddings.dtype != np.float32:
        raise BackendError(f"embeddings are {embeddings.dtype}; float32 is expected")
    if not np.isfinite(embeddings).all():
        raise BackendError("the soft prompt holds NaN or infinite numbers")
    return np.ascontiguousarray(embeddings)


def checked_segment(segment: Segment, n_vocab: int, n_embd: int) -> Segment:
    """Ids or embeddings, told apart by their dimensions."""
    array = np.asarray(segment)
    if array.ndim == 1:
        return checked_ids(array, n_vocab)
    return checked_embeddings(array, n_embd)


class KnownStart:
    """Which token ids a KV cache starts with, up to the first embedding.

    A cached prefix is kept only where the cache is known to hold exactly its ids: whatever else
    was decoded meanwhile, a stale prefix cannot survive.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []

    def append(self, segment: Segment, position: int) -> None:
        """`segment` was decoded at `position`."""
        if segment.ndim == 1 and position == len(self._ids):
            self._ids += segment.tolist()

    def cut(self, position: int) -> None:
        """Only the first `position` tokens are left."""
        del self._ids[position:]

    def holds(self, ids: IntArray) -> bool:
        """Whether the cache starts with `ids`."""
        return bool(self._ids[: len(ids)] == ids.tolist())


class Managed(Protocol):
    """`with` closes it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class VisionBackend(Managed, Protocol):
    """Encoder, pooling and projector in one engine: pixels in, soft prompt out."""

    @property
    def device(self) -> str:
        """Where it runs, as reported by the engine after loading, not as asked for."""
        ...

    @property
    def pairing(self) -> str:
        """The pairing hash inside the file; "" when it has none."""
        ...

    def encode(self, images: FloatArray) -> FloatArray:
        """Encode a batch.

        Args:
            images: float32 (B, 3, S, S), normalised by the bundle's image recipe.

        Returns:
            float32 (B, N, D): N soft tokens of the language model's width D for each image;
            every number is finite.

        Raises:
            BackendError: wrong shape or dtype, non-finite pixels, non-finite output, or closed.
        """
        ...

    def close(self) -> None:
        """Free the engine. Calling it again does nothing."""
        ...


def encode_views(vision: VisionBackend, pixels: FloatArray) -> SoftPrompt:
    """The images of one study (V, 3, S, S) -> its soft prompt (V * N, D), in their order.

    One after the other: engines are tuned for one image.
    """
    parts = [vision.encode(pixels[view : view + 1])[0] for view in range(len(pixels))]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class LanguageBackend(Managed, Protocol):
    """A causal language model with one sequence in its KV cache.

    Promises of every implementation:
        - inputs of any length are split into batches that the engine can take;
        - numbers are finite: NaN or infinite embeddings are refused before they reach the
          engine, and non-finite logits are an error, never a result;
        - running out of context is a `BackendError` before anything is decoded;
        - a call that raises leaves `position` where it was.
    """

    @property
    def n_vocab(self) -> int:
        """V, the number of logits."""
        ...

    @property
    def n_embd(self) -> int:
        """D, the width of an embedding."""
        ...

    @property
    def position(self) -> int:
        """Tokens and embeddings in the KV cache."""
        ...

    @property
    def device(self) -> str:
        """Where it runs, as reported by the engine after loading, not as asked for."""
        ...

    @property
    def version(self) -> str:
        """The engine and its version, e.g. "onnxruntime 1.32.0"."""
        ...

    @property
    def pairing(self) -> str:
        """The pairing hash inside the file; "" when it has none."""
        ...

    def prefill(self, segments: Sequence[Segment]) -> FloatArray:
        """Append segments at `position`.

        Args:
            segments: token ids (T,) and embeddings (N, D) in order; empty ones are skipped.

        Returns:
            float32 (V,), the logits after the last position.

        Raises:
            BackendError: nothing to append, ids outside the vocabulary, embeddings of another
                width or not finite, no room, the engine failed, or closed.
        """
        ...

    def step(self, ids: IntArray) -> Logits:
        """Append token ids at `position` and return the logits after every one of them.

        Args:
            ids: int32 (T,), T >= 1. More than one id is a verify pass of a drafted text.

        Returns:
            float32 (T, V).

        Raises:
            BackendError: as for `prefill`.
        """
        ...

    def reuse(self, ids: IntArray) -> int:
        """Keep `ids` (T,) if the KV cache is known to start with exactly them; drop the rest.

        Returns:
            How many tokens were kept: T, or 0.
        """
        ...

    def rewind(self, position: int) -> None:
        """Keep the first `position` tokens of the KV cache and drop the rest.

        Raises:
            BackendError: `position` is negative or lies ahead, the engine failed, or closed.
        """
        ...

    def tokenize(self, text: str) -> list[int]:
        """Ids by the *engine's* tokenizer; special tokens in the text count, none are added.

        Only for checking that the exported tokenizer equals the trained one: the runtime
        always passes ids of the Hugging Face tokenizer file.
        """
        ...

    def close(self) -> None:
        """Free the engine. Calling it again does nothing."""
        ...


class Slots(Managed, Protocol):
    """Several sequences of one language model; a pass reads the weights once for all of them."""

    slots: int

    def begin(self, slot: int, start: IntArray, segments: Sequence[Segment]) -> FloatArray:
        """A new prompt in `slot`: `start` (T,), which all prompts share, then `segments`.

        Returns:
            float32 (V,), the logits after the last position.

        Raises:
            BackendError: as `LanguageBackend.prefill`.
        """
        ...

    def step(self, feeds: Sequence[tuple[int, IntArray]]) -> list[Logits | BackendError]:
        """Append ids (k,) to several slots in one pass.

        Args:
            feeds: in ascending order of slots; llama.cpp computes another order in several passes.

        Returns:
            For each, float32 (k, V); or an error that is that slot's alone.

        Raises:
            BackendError: as `LanguageBackend.step`.
        """
        ...


@runtime_checkable
class Parallel(Protocol):
    """A language model that can decode several sequences together."""

    @property
    def sequence_bytes(self) -> int:
        """Memory of one sequence's KV cache."""
        ...

    def parallel(self, slots: int) -> Slots:
        """Room for `slots` sequences over the same weights; to be closed before the model.

        Raises:
            BackendError: the engine cannot make it, or closed.
        """
        ...
