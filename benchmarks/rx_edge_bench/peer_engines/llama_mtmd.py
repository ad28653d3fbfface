"""Stock llama.cpp with an image: libmtmd, `mtmd_helper_eval_chunks`, its greedy sampler.

It is what `llama-mtmd-cli` does for one question, loop and all, over the bundle's mmproj.gguf and
the same GGUF language model. It cannot read DICOM and would cut and scale a film otherwise than
training did: it gets the prepared PNG, and neither decoding nor preparing the film costs it time.

Does not cover: llama-server, which keeps the prompt's constant start in its KV cache.
"""

from __future__ import annotations

import codecs
import ctypes
import time
from typing import Any

from rx_edge.backends import llm_gguf
from rx_edge.backends.gguf_engine import reason
from rx_edge.closing import Closing
from rx_edge.errors import BackendError
from rx_edge_bench.peer_engines.base import Answer, Job, Picture
from rx_edge_bench.peer_engines.llama_common import Context
from rx_edge_export import stock_files
from rx_edge_export.libmtmd import Stock, library

PIECE = 256  # bytes of one token's text: more than any has


def is_available(job: Job) -> str | None:
    """None, or why it cannot run here."""
    missing = llm_gguf.is_available()
    if missing:
        return missing
    try:
        library()
    except BackendError as error:
        return str(error)
    if not job.bundle.manifest.stock:
        return "the bundle has no mmproj.gguf: export it with --set stock=true"
    return None


class LlamaMtmd(Closing):
    """llama.cpp's multimodal path."""

    def __init__(self, job: Job) -> None:
        """Open both files.

        Raises:
            BackendError: libmtmd or llama.cpp refuses one.
        """
        manifest = job.bundle.manifest
        self._end, self._limit = job.end, job.limit
        self._text = stock_files.literal(manifest.prompt)
        self._stock = Stock(
            job.bundle.path(manifest.stock[0].file), job.llm, exact=False, threads=job.threads
        )
        try:
            self._context = Context(
                self._stock.api, self._stock.model, n_ctx=job.n_ctx, threads=job.threads
            )
        except BaseException:
            self._stock.close()
            raise
        self.weights = job.artifact.name
        self.settings: dict[str, Any] = {
            "vision": manifest.stock[0].file,
            "flash_attn": "auto",
            "image": "the PNG of `rx-edge prepare`, made before and not timed",
        }

    def draft(self, picture: Picture) -> Answer:
        """The prepared square."""
        started = time.perf_counter()
        self._context.clear()
        with self._stock.chunks(self._text, picture.square) as chunks:
            self._read(chunks)
        ids: list[int] = []
        pieces = bytearray()
        while len(ids) < self._limit:
            token = self._context.sample()
            if picture.report is not None:
                token = (*picture.report, self._end)[len(ids)]
            if token == self._end or self._stock.api.llama_vocab_is_eog(self._context.vocab, token):
                break
            ids.append(token)
            pieces += self._piece(token)
            if len(ids) < self._limit:
                self._context.decode([token])
        # as ours: what is no UTF-8 is shown as such, a character that was cut is not shown
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(bytes(pieces)).strip()
        return Answer(tuple(ids), text, time.perf_counter() - started)

    def close(self) -> None:
        """Free context and models; idempotent."""
        self._context.close()
        self._stock.close()

    def _read(self, chunks: Any) -> None:
        """Encode the image and prefill."""
        past = ctypes.c_int32(0)
        code = self._stock.mtmd.mtmd_helper_eval_chunks(
            self._stock.context, self._context.context, chunks,
            0, 0, self._context.batch, True, ctypes.byref(past),
        )  # fmt: skip
        if code != 0:
            raise BackendError(f"libmtmd cannot read image and prompt (code {code}){reason()}")

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(PIECE)
        n = self._stock.api.llama_token_to_piece(
            self._context.vocab, token, buffer, PIECE, 0, False
        )
        return buffer.raw[: max(n, 0)]
