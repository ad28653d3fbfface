"""libmtmd, llama.cpp's multimodal library, as stock engines drive it: a text with one image.

The check of an mmproj (`mmproj_check.py`) and the benchmark beside stock llama.cpp share this.

Does not cover: llama.cpp without images (`rx_edge.backends.llm_gguf`), GPUs, audio, video.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rx_edge.backends.gguf_engine import (
    check_file,
    engine,
    last_errors,
    load_model,
    reason,
)
from rx_edge.closing import Closing
from rx_edge.errors import BackendError
from rx_edge.optional import require
from rx_edge.types import SoftPrompt

Bytes = NDArray[np.uint8]

MARKER = "<__media__>"  # libmtmd's default placeholder of an image in a prompt


class Stock(Closing):
    """An mmproj and a language model opened by libmtmd, as stock engines do.

    Attributes:
        api, mtmd: the two ctypes layers.
        model, context: the language model, and libmtmd's context over both files; None = closed.
        width: D, the width of an embedding.
    """

    def __init__(self, mmproj: Path, llm: Path, *, exact: bool = True, threads: int = 1) -> None:
        """Open both files.

        Raises:
            MissingExtraError: llama-cpp-python is not installed.
            BackendError: libmtmd is not built in, or refuses a file (its reason is given).
        """
        self.api, self.mtmd = engine(), library()
        self._mmproj = mmproj
        check_file(llm)
        self.model = load_model(self.api, llm)
        self.context: Any = None
        try:
            self.context = self._open_projector(mmproj, exact, threads)
        except BaseException:
            self.api.llama_model_free(self.model)
            raise
        self.width = int(self.api.llama_model_n_embd(self.model))
        self._release = weakref.finalize(self, _free, self.api, self.mtmd, self.model, self.context)

    def soft_prompt(self, pixels: Bytes) -> SoftPrompt:
        """Encode one image, uint8 (S, S, 3) RGB -> float32 (N, D).

        Raises:
            BackendError: wrong shape or dtype, libmtmd failed or returned NaN.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise BackendError(f"pixels are {pixels.dtype} {pixels.shape}; uint8 (S, S, 3) needed")
        found: list[SoftPrompt] = []

        def encode(chunk: Any, kind: int) -> None:
            if kind != self.mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                return
            if self.mtmd.mtmd_decode_use_non_causal(self.context, chunk):
                raise BackendError("libmtmd would let soft tokens see later ones; training did not")
            last_errors()
            code = self.mtmd.mtmd_encode_chunk(self.context, chunk)
            if code != 0:
                raise BackendError(f"libmtmd cannot encode the image (code {code}){reason()}")
            tokens = int(self.mtmd.mtmd_input_chunk_get_n_tokens(chunk))
            raw = self.mtmd.mtmd_get_output_embd(self.context)
            found.append(np.ctypeslib.as_array(raw, (tokens, self.width)).astype(np.float32))

        self._each_chunk(MARKER, pixels, encode)
        if len(found) != 1:
            raise BackendError(f"libmtmd cut the image into {len(found)} pieces; 1 is expected")
        if not np.isfinite(found[0]).all():
            raise BackendError(f"{str(self._mmproj)!r} gives NaN or infinity; export it again")
        return found[0]

    def prompt(self, template: str, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """libmtmd's token ids before and after the image of a template with one {image}.

        Special tokens in the text count, and BOS is added where the language file asks for it:
        the settings of llama-server.
        """
        sides: tuple[list[int], list[int]] = ([], [])
        images = 0

        def collect(chunk: Any, kind: int) -> None:
            nonlocal images
            if kind != self.mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                images += 1
                return
            n = ctypes.c_size_t()
            ids = self.mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
            sides[min(images, 1)].extend(int(ids[i]) for i in range(n.value))

        blank: Bytes = np.zeros((size, size, 3), np.uint8)
        self._each_chunk(template.replace("{image}", MARKER), blank, collect)
        if images != 1:
            raise BackendError(f"libmtmd made {images} image chunks of the prompt; 1 is expected")
        return tuple(sides[0]), tuple(sides[1])

    def chat_template(self) -> str:
        """The chat template inside the language file; "" if it has none."""
        raw = self.api.llama_model_chat_template(self.model, None)
        return raw.decode(errors="replace") if raw else ""

    def close(self) -> None:
        """Free both models; idempotent."""
        self._release()
        self.context = None

    def _open_projector(self, mmproj: Path, exact: bool, threads: int) -> Any:
        params = self.mtmd.mtmd_context_params_default()
        params.use_gpu = params.print_timings = params.warmup = False
        params.n_threads = threads
        if exact:
            params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        last_errors()
        context = self.mtmd.mtmd_init_from_file(os.fsencode(mmproj), self.model, params)
        if not context:
            raise BackendError(f"libmtmd cannot load {str(mmproj)!r}{reason()}")
        return context

    @contextmanager
    def chunks(self, text: str, image: Path | Bytes) -> Iterator[Any]:
        """libmtmd's chunks of a text with one `MARKER`; freed at the end of the block.

        Args:
            image: a PNG or JPEG file, which libmtmd reads itself, or uint8 (S, S, 3) RGB.

        Raises:
            BackendError: libmtmd cannot read the file or the text, or closed.
        """
        if self.context is None:
            raise BackendError("this mmproj is closed; open the file again")
        mtmd, raw = self.mtmd, text.encode()
        last_errors()
        bitmap = self._bitmap(image)
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            given = mtmd.mtmd_input_text(raw, len(raw), True, True)
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
            code = mtmd.mtmd_tokenize(self.context, chunks, ctypes.byref(given), bitmaps, 1)
            if code != 0:
                raise BackendError(f"libmtmd cannot read the prompt (code {code}){reason()}")
            yield chunks
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def _bitmap(self, image: Path | Bytes) -> Any:
        if isinstance(image, Path):
            found = self.mtmd.mtmd_helper_bitmap_init_from_file(
                self.context, os.fsencode(image), False
            )
            if not found:
                raise BackendError(f"libmtmd cannot read the image{reason()}; it takes PNG or JPEG")
            return found
        data = np.ascontiguousarray(image)
        height, width = data.shape[:2]
        return self.mtmd.mtmd_bitmap_init(  # it copies the pixels
            width, height, data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        )

    def _each_chunk(self, text: str, pixels: Bytes, visit: Callable[[Any, int], None]) -> None:
        """Tokenise `text` with its one image and visit the chunks in order."""
        with self.chunks(text, pixels) as chunks:
            for i in range(int(self.mtmd.mtmd_input_chunks_size(chunks))):
                chunk = self.mtmd.mtmd_input_chunks_get(chunks, i)
                visit(chunk, int(self.mtmd.mtmd_input_chunk_get_type(chunk)))


def library() -> Any:
    """libmtmd's ctypes layer, its log kept instead of printed.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        BackendError: it was built without libmtmd.
    """
    try:
        mtmd = require("llama_cpp.mtmd_cpp", extra="cpu")
    except (OSError, RuntimeError) as error:  # the shared library is absent
        raise BackendError(
            f"this llama-cpp-python was built without libmtmd ({error}); "
            "build it again with -DLLAVA_BUILD=ON, or export without the mmproj"
        ) from error
    log, nothing = engine().rx_edge_log, ctypes.c_void_p(0)
    mtmd.mtmd_log_set(log, nothing)
    mtmd.mtmd_helper_log_set(log, nothing)
    return mtmd


def _free(api: Any, mtmd: Any, model: Any, context: Any) -> None:
    mtmd.mtmd_free(context)
    api.llama_model_free(model)
