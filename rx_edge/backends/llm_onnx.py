"""A language model as an ONNX graph with explicit key/value tensors, through ONNX Runtime.

The graph takes embeddings, so text and soft prompt go in as one batch; the embedding table lies
beside it (`sidecars`) and is looked up here, memory-mapped. The KV cache is a set of tensors
that every run returns one step longer; they stay on the device.

Rewinding copies nothing: the dropped slots stay in the tensors, hidden by the attention mask,
until enough of them are worth one copy. A run that fails leaves the older tensors in use.

Does not cover: tokenising for the model (the runtime passes ids), several sequences, graphs of
other makers (no `position_ids`, another context key), sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from rx_edge.backends import onnx_engine
from rx_edge.backends.base import (
    PAIRING_KEY,
    KnownStart,
    Segment,
    checked_ids,
    checked_segment,
)
from rx_edge.closing import Closing
from rx_edge.errors import BackendError
from rx_edge.types import FloatArray, IntArray, Logits

REQUIRES = ("onnxruntime",)

EMBEDS, MASK, POSITIONS, LOGITS = "inputs_embeds", "attention_mask", "position_ids", "logits"
TABLE = "embeddings"  # the tensor's name in the side file, (V, D) float16 or float32
CONTEXT_KEY = "rx_edge.context_length"  # metadata: tokens the model was trained for
BATCH = 256  # tokens per run; the graph returns logits for each: 256 x 49k floats are 50 MB
STALE = 64  # hidden KV slots that are worth one copy of the cache

_KV_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def sidecars(path: Path) -> list[Path]:
    """The files that belong to the graph `path`: its weights and its embedding table."""
    return [
        path.with_name(f"{path.name}.data"),
        path.with_name(f"{path.stem}.embed.safetensors"),
    ]


def is_available() -> str | None:
    """None, or why this backend cannot be used here."""
    return onnx_engine.unavailable()


def devices() -> tuple[str, ...]:
    """What this build of ONNX Runtime can run on here, best first.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    return onnx_engine.devices()


def open(
    path: Path,
    *,
    n_ctx: int,
    threads: int,
    exact: bool = False,
    fused: bool = True,
    device: str = "cpu",
) -> OnnxLanguage:
    """Load an ONNX language model.

    Args:
        n_ctx: tokens the KV cache may hold; it grows with use.
        threads: CPU threads; 0 = one per physical core (ONNX Runtime's own choice).
        exact: for parity checks. The file fixes the arithmetic on a CPU, so this changes
            nothing there; on CUDA it forbids TF32.
        fused: changes nothing: the graph takes embeddings, so all segments go in together.
        device: "cpu" or "cuda".

    Raises:
        MissingExtraError: onnxruntime is not installed.
        BackendError: a file is missing, not of the documented signature or of another model,
            the device cannot be used, or `n_ctx` is longer than the model was trained for.
    """
    if n_ctx < 1:
        raise BackendError(f"n_ctx is {n_ctx}; use n_ctx >= 1")
    for file in (path, *sidecars(path)):
        if not file.is_file():
            raise BackendError(f"language model: {str(file)!r} does not exist; export it again")
    session = onnx_engine.session(
        path,
        threads=threads,
        device=device,
        provider_options=onnx_engine.NO_TF32 if exact else None,
    )
    model = OnnxLanguage(session, path, n_ctx, device)
    if n_ctx > model.context:
        raise BackendError(
            f"{str(path)!r}: n_ctx is {n_ctx} but the model was trained for {model.context}; "
            "ask for less"
        )
    return model


class OnnxLanguage(Closing):
    """A `LanguageBackend` (see `base.py` for the contract of every method)."""

    def __init__(self, session: Any, path: Path, n_ctx: int, device: str) -> None:
        self._session: Any = session
        self._ort_value: Any = onnx_engine.engine().OrtValue
        self._path = path
        self._n_ctx = n_ctx
        self._past = _check_signature(session, path)
        outputs = {node.name: node for node in session.get_outputs()}
        inputs = {node.name: node for node in session.get_inputs()}
        self.n_vocab = int(outputs[LOGITS].shape[2])
        self.n_embd = int(inputs[EMBEDS].shape[2])
        metadata = session.get_modelmeta().custom_metadata_map
        self.pairing = str(metadata.get(PAIRING_KEY, ""))
        self.context = _context_length(metadata, path)
        self.device = device
        self._table = _Table(sidecars(path)[1], self.n_vocab, self.n_embd, self.pairing)
        self._cache: dict[str, Any] = {}
        self._position, self._visible = 0, np.zeros(0, np.int64)
        self._start = KnownStart()
        self._clear()

    @property
    def version(self) -> str:
        """The engine and its version."""
        return f"onnxruntime {onnx_engine.engine().__version__}"

    @property
    def position(self) -> int:
        """Tokens and embeddings in the KV cache."""
        return self._position

    def prefill(self, segments: Sequence[Segment]) -> FloatArray:
        """Append segments; float32 (V,) logits after the last position."""
        checked = [
            s for s in (checked_segment(s, self.n_vocab, self.n_embd) for s in segments) if len(s)
        ]
        self._check_room(sum(map(len, checked)))
        rows = [self._table.rows(s) if s.ndim == 1 else s for s in checked]
        position = self._position
        logits: FloatArray = self._append(np.concatenate(rows), last=True)[0]
        for segment in checked:
            self._start.append(segment, position)
            position += len(segment)
        return logits

    def step(self, ids: IntArray) -> Logits:
        """Append ids (T,); float32 (T, V) logits after every one."""
        ids = checked_ids(np.asarray(ids), self.n_vocab)
        self._check_room(len(ids))
        position = self._position
        logits = self._append(self._table.rows(ids), last=False)
        self._start.append(ids, position)
        return logits

    def reuse(self, ids: IntArray) -> int:
        """Keep `ids` where the KV cache is known to start with them, else nothing."""
        kept = len(ids) if self._start.holds(ids) else 0
        self.rewind(kept)
        return kept

    def rewind(self, position: int) -> None:
        """Keep the first `position` tokens."""
        self._check_open()
        if not 0 <= position <= self._position:
            raise BackendError(f"rewind to {position}: the KV cache holds {self._position} tokens")
        self._start.cut(position)
        if position == 0:
            self._clear()
        elif position < self._position:
            used = np.flatnonzero(self._visible)
            visible = self._visible.copy()
            visible[used[position:]] = 0
            self._visible, self._position = visible, position
            if len(visible) - position > STALE:
                self._compact(used[:position])

    def tokenize(self, text: str) -> list[int]:
        """Ids by the tokenizer.json beside the graph; an ONNX file holds no tokenizer."""
        self._check_open()
        file = self._path.with_name("tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise BackendError(f"tokenizer {str(file)!r} cannot be read: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return [int(i) for i in tokenizer.encode(text, add_special_tokens=False).ids]

    def close(self) -> None:
        """Free the session and the cache; idempotent."""
        self._session = None
        self._cache = {}

    def _clear(self) -> None:
        """An empty cache: tensors (1, heads, 0, head_dim)."""
        self._position = 0
        self._visible = np.zeros(0, np.int64)  # (slots,): 1 = in the sequence, 0 = rewound
        self._cache = {name: self._on_device(np.zeros(*spec)) for name, spec in self._past.items()}

    def _compact(self, slots: Any) -> None:
        """Copy the visible slots; ONNX Runtime hands tensors over through the host."""
        self._cache = {
            name: self._on_device(np.ascontiguousarray(value.numpy()[:, :, slots]))
            for name, value in self._cache.items()
        }
        self._visible = np.ones(len(slots), np.int64)

    def _on_device(self, array: Any) -> Any:
        return self._ort_value.ortvalue_from_numpy(array, self.device, 0)

    def _append(self, rows: FloatArray, *, last: bool) -> Logits:
        """Run float32 (T, D) in chunks; logits of the last row (1, V) or of all (T, V)."""
        before = self._cache, self._visible, self._position
        try:
            kept = []
            for first in range(0, len(rows), BATCH):
                logits = self._run(rows[first : first + BATCH])
                if not last:
                    kept.append(logits)
            result: Logits = logits[-1:].copy() if last else np.concatenate(kept)
            if not np.isfinite(result).all():
                raise BackendError(
                    "the language model returned NaN or infinite logits before token "
                    f"{self._position}; the file or this build of onnxruntime is broken"
                )
            return result
        except BaseException:  # Ctrl-C as well: the cache and `position` must agree
            self._cache, self._visible, self._position = before
            raise

    def _run(self, rows: FloatArray) -> Logits:
        """One run: rows float32 (T, D) -> logits float32 (T, V), and a cache T slots longer."""
        n = len(rows)
        visible = np.concatenate([self._visible, np.ones(n, np.int64)])
        feeds = {
            EMBEDS: np.ascontiguousarray(rows[None]),
            MASK: visible[None],
            POSITIONS: np.arange(self._position, self._position + n, dtype=np.int64)[None],
        }
        logits = np.empty((1, n, self.n_vocab), np.float32)  # filled in place
        try:
            binding = self._session.io_binding()
            for name, array in feeds.items():
                binding.bind_cpu_input(name, array)
            for name, value in self._cache.items():
                binding.bind_ortvalue_input(name, value)
            for name in self._past:
                binding.bind_output(_present(name), self.device)
            binding.bind_output(LOGITS, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
            self._session.run_with_iobinding(binding)
            cache = dict(zip(self._past, binding.get_outputs(), strict=False))
        except Exception as error:  # onnxruntime's exceptions share no other base
            raise BackendError(
                f"onnxruntime failed on {n} tokens at {self._position}: {error}"
            ) from error
        self._cache, self._visible, self._position = cache, visible, self._position + n
        filled: Logits = logits[0]
        return filled

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
        if self._session is None:
            raise BackendError("this language model is closed; open the file again")


class _Table:
    """The embedding table (V, D), read row by row from its memory-mapped file."""

    def __init__(self, path: Path, vocab: int, width: int, pairing: str) -> None:
        try:
            # a context manager only in form: the mapping lives as long as this object
            file: Any = safe_open(path, "np")
            metadata = file.metadata() or {}
            self._rows = file.get_slice(TABLE)
        except (OSError, SafetensorError) as error:
            raise BackendError(
                f"embedding table {str(path)!r} cannot be read: {error}; export it again"
            ) from error
        found = self._rows.get_shape(), self._rows.get_dtype()
        if found[0] != [vocab, width] or found[1] not in ("F16", "F32"):
            raise BackendError(
                f"embedding table {str(path)!r} holds {found[1]} {found[0]}; the graph needs "
                f"F16 or F32 {[vocab, width]}: they belong to different models"
            )
        if metadata.get(PAIRING_KEY, "") != pairing:
            raise BackendError(
                f"embedding table {str(path)!r} has pairing {metadata.get(PAIRING_KEY, '')!r}, "
                f"its graph {pairing!r}: they belong to different models; export again"
            )

    def rows(self, ids: Any) -> FloatArray:
        """ids (T,) -> float32 (T, D)."""
        rows = np.concatenate([self._rows[i : i + 1] for i in map(int, ids)])
        return np.asarray(rows, np.float32)


def _present(past: str) -> str:
    return past.replace("past_key_values", "present", 1)


def _context_length(metadata: dict[str, str], path: Path) -> int:
    text = metadata.get(CONTEXT_KEY, "")
    if not text.isdecimal():
        raise BackendError(
            f"{str(path)!r} does not say how many tokens it was trained for "
            f"({CONTEXT_KEY} is {text!r}); export it again"
        )
    return int(text)


def _check_signature(session: Any, path: Path) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Refuse any other graph; shape of an empty cache tensor and dtype per KV input."""
    inputs = {node.name: node for node in session.get_inputs()}
    outputs = {node.name: node for node in session.get_outputs()}
    layers = (len(inputs) - 3) // 2
    past = [f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")]
    wanted_in = {EMBEDS: "tensor(float)", MASK: "tensor(int64)", POSITIONS: "tensor(int64)"}
    fits = (
        layers > 0
        and set(inputs) == {*wanted_in, *past}
        and set(outputs) == {LOGITS, *map(_present, past)}
        and all(inputs[name].type == kind for name, kind in wanted_in.items())
        and outputs[LOGITS].type == "tensor(float)"
        and _dynamic(inputs[EMBEDS].shape, "bs.")
        and _dynamic(outputs[LOGITS].shape, "bs.")
        and all(_dynamic(inputs[name].shape, "b.p.") for name in past)
        and all(inputs[name].type in _KV_TYPES for name in past)
        and all(inputs[name].type == outputs[_present(name)].type for name in past)
    )
    if not fits:
        raise BackendError(
            f"{str(path)!r} maps {sorted(inputs)} to {sorted(outputs)}, or fixes their sizes; "
            f"expected {EMBEDS}, {MASK}, {POSITIONS}, past_key_values.N.key/value to {LOGITS}, "
            "present.N.key/value with any batch and length: export it again"
        )
    return {
        name: (
            (1, inputs[name].shape[1], 0, inputs[name].shape[3]),
            _KV_TYPES[inputs[name].type],
        )
        for name in past
    }


def _dynamic(shape: Sequence[int | str | None], pattern: str) -> bool:
    """Whether `shape` has a number exactly where `pattern` has a dot."""
    return len(shape) == len(pattern) and all(
        isinstance(size, int) == (mark == ".") for size, mark in zip(shape, pattern, strict=True)
    )
