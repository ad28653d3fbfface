"""Does stock llama.cpp see what the trained model sees? The mmproj GGUF through libmtmd.

Two things are compared. The *soft prompt*: libmtmd takes 8-bit RGB only, so the recipe's square is
rounded to 8 bits (at most 1/510 of the grey scale, where our own path keeps floats), and the
trained encoder is given exactly those rounded values: what is left is the conversion, and the
arithmetic of llama.cpp (tanh GELU from a float16 table). How far rounding and engine together are
from our own float path is measured as well, for information. The *prompt*: libmtmd's own
tokenisation of the template, wrapper and BOS included, must give our ids; a mismatch there is the
classic silent error.

llama.cpp's flash attention rounds keys and values to float16; `exact=True` switches it off, so
that a conversion fault stands out. Stock engines decide for themselves.

Needs no torch: the trained encoder comes in as a function, or as its verified ONNX.

Does not cover: writing (`mmproj_gguf.py`), the stock programs themselves (llama-server, Ollama,
LM Studio), and GPUs.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rx_edge import image
from rx_edge.backends.base import Closing
from rx_edge.backends.llm_gguf import engine, last_errors
from rx_edge.bundle import StageResult
from rx_edge.config import ImageRecipe, PromptConfig
from rx_edge.errors import BackendError, ExportError
from rx_edge.optional import require
from rx_edge.prompting import PromptIds
from rx_edge.types import FloatArray, ImageTensor, Radiograph, SoftPrompt

Bytes = NDArray[np.uint8]
Encode = Callable[[ImageTensor], FloatArray]  # (1, 3, S, S) -> (1, N, D): torch or ONNX

MARKER = "<__media__>"  # libmtmd's default placeholder of an image in a prompt
COSINE = 1e-4  # allowed 1 - cosine of the worst soft token
# allowed length of the difference / length of the soft prompt: a wrong scale escapes the cosine.
# The demo model measures 7e-7 and 5e-4.
DIFFERENCE = 2e-3


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        stages: per canary "1 - cosine" of the worst soft token, and the relative difference.
        from_float: canary -> relative difference of the stock soft prompt (8-bit image, stock
            settings) and ours (float image): what a user of a stock engine gets. Information.
    """

    stages: tuple[StageResult, ...]
    from_float: dict[str, float]


class Stock(Closing):
    """An mmproj and a language model opened by libmtmd, as stock engines do."""

    def __init__(self, mmproj: Path, llm: Path, *, exact: bool = True, threads: int = 1) -> None:
        """Open both files.

        Raises:
            MissingExtraError: llama-cpp-python is not installed.
            BackendError: libmtmd is not built in, or refuses a file (its reason is given).
        """
        self._api, self._mtmd = engine(), _libmtmd()
        self._mmproj = mmproj
        self._model = _open_model(self._api, llm)
        self._context: Any = None
        try:
            self._context = self._open_projector(mmproj, exact, threads)
        except BaseException:
            self._api.llama_model_free(self._model)
            raise
        self.width = int(self._api.llama_model_n_embd(self._model))
        self._release = weakref.finalize(
            self, _free, self._api, self._mtmd, self._model, self._context
        )

    def soft_prompt(self, pixels: Bytes) -> SoftPrompt:
        """Encode one image, uint8 (S, S, 3) RGB -> float32 (N, D).

        Raises:
            BackendError: wrong shape or dtype, libmtmd failed or returned NaN.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise BackendError(f"pixels are {pixels.dtype} {pixels.shape}; uint8 (S, S, 3) needed")
        found: list[SoftPrompt] = []

        def encode(chunk: Any, kind: int) -> None:
            if kind != self._mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                return
            if self._mtmd.mtmd_decode_use_non_causal(self._context, chunk):
                raise BackendError("libmtmd would let soft tokens see later ones; training did not")
            last_errors()
            code = self._mtmd.mtmd_encode_chunk(self._context, chunk)
            if code != 0:
                raise BackendError(f"libmtmd cannot encode the image (code {code}){_reason()}")
            tokens = int(self._mtmd.mtmd_input_chunk_get_n_tokens(chunk))
            raw = self._mtmd.mtmd_get_output_embd(self._context)
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
            if kind != self._mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                images += 1
                return
            n = ctypes.c_size_t()
            ids = self._mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
            sides[min(images, 1)].extend(int(ids[i]) for i in range(n.value))

        blank: Bytes = np.zeros((size, size, 3), np.uint8)
        self._each_chunk(template.replace("{image}", MARKER), blank, collect)
        if images != 1:
            raise BackendError(f"libmtmd made {images} image chunks of the prompt; 1 is expected")
        return tuple(sides[0]), tuple(sides[1])

    def chat_template(self) -> str:
        """The chat template inside the language file; "" if it has none."""
        raw = self._api.llama_model_chat_template(self._model, None)
        return raw.decode(errors="replace") if raw else ""

    def close(self) -> None:
        """Free both models; idempotent."""
        self._release()
        self._context = None

    def _open_projector(self, mmproj: Path, exact: bool, threads: int) -> Any:
        params = self._mtmd.mtmd_context_params_default()
        params.use_gpu = params.print_timings = params.warmup = False
        params.n_threads = threads
        if exact:
            params.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        last_errors()
        context = self._mtmd.mtmd_init_from_file(os.fsencode(mmproj), self._model, params)
        if not context:
            raise BackendError(f"libmtmd cannot load {str(mmproj)!r}{_reason()}")
        return context

    def _each_chunk(self, text: str, pixels: Bytes, visit: Callable[[Any, int], None]) -> None:
        """Tokenise `text` with its one image and visit the chunks in order."""
        if self._context is None:
            raise BackendError("this mmproj is closed; open the file again")
        mtmd, data = self._mtmd, np.ascontiguousarray(pixels)
        height, width = data.shape[:2]
        raw = text.encode()
        bitmap = mtmd.mtmd_bitmap_init(
            width, height, data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        )
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            given = mtmd.mtmd_input_text(raw, len(raw), True, True)
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
            last_errors()
            code = mtmd.mtmd_tokenize(self._context, chunks, ctypes.byref(given), bitmaps, 1)
            if code != 0:
                raise BackendError(f"libmtmd cannot read the prompt (code {code}){_reason()}")
            for i in range(int(mtmd.mtmd_input_chunks_size(chunks))):
                chunk = mtmd.mtmd_input_chunks_get(chunks, i)
                visit(chunk, int(mtmd.mtmd_input_chunk_get_type(chunk)))
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)


def soft_prompt(mmproj: Path, llm: Path, pixels: Bytes, *, exact: bool = True) -> SoftPrompt:
    """The soft prompt (N, D) that stock llama.cpp computes of uint8 (S, S, 3) RGB pixels."""
    with Stock(mmproj, llm, exact=exact) as stock:
        return stock.soft_prompt(pixels)


def square_uint8(radiograph: Radiograph, recipe: ImageRecipe) -> Bytes:
    """The recipe's padded square as 8-bit grey (S, S): the picture to give a stock engine.

    Grey levels are rounded to 1/255; the float path keeps what lies between them.
    """
    return rounded(image.prepare(radiograph, recipe), recipe)


def rounded(pixels: ImageTensor, recipe: ImageRecipe) -> Bytes:
    """Undo the normalisation of a prepared image (1, 3, S, S) and round it to uint8 (S, S)."""
    grey = pixels[0, 0].astype(np.float64) * recipe.std[0] + recipe.mean[0]  # channels are equal
    square: Bytes = np.rint(grey.clip(0.0, 1.0) * 255.0).astype(np.uint8)
    return square


def rgb(square: Bytes) -> Bytes:
    """uint8 (S, S) grey -> uint8 (S, S, 3)."""
    return np.repeat(square[:, :, None], 3, axis=2)


def normalised(square: Bytes, recipe: ImageRecipe) -> ImageTensor:
    """The 8-bit square as the encoder's input, as stock engines normalise it: (1, 3, S, S)."""
    grey = square.astype(np.float32) / np.float32(255.0)
    mean = np.asarray(recipe.mean, np.float32)[:, None, None]
    std = np.asarray(recipe.std, np.float32)[:, None, None]
    return np.ascontiguousarray(((grey[None] - mean) / std)[None], dtype=np.float32)


def compare(
    mmproj: Path,
    llm: Path,
    canaries: Mapping[str, ImageTensor],
    recipe: ImageRecipe,
    encode: Encode,
) -> Comparison:
    """Compare the mmproj with the trained encoder on prepared canary images.

    Args:
        llm: any GGUF of the bundle's language model; only its width and tokenizer matter here.
        canaries: name -> float32 (1, 3, S, S), e.g. the golden "pixels".
        encode: the trained encoder, or its verified ONNX.

    Raises:
        BackendError: libmtmd refuses a file.
    """
    stages: list[StageResult] = []
    from_float = {}
    squares = {name: rounded(pixels, recipe) for name, pixels in canaries.items()}
    with Stock(mmproj, llm, exact=True) as stock:
        for name, square in squares.items():
            wanted = encode(normalised(square, recipe))[0]
            found = stock.soft_prompt(rgb(square))
            for metric, value, limit in (
                ("1 - cosine", 1.0 - min_cosine(found, wanted), COSINE),
                ("relative difference", relative_difference(found, wanted), DIFFERENCE),
            ):
                stages.append(
                    StageResult(
                        "stock_soft_prompt", mmproj.name, name, metric, value, limit,
                        bool(value <= limit),  # NaN fails
                    )
                )  # fmt: skip
    with Stock(mmproj, llm, exact=False) as stock:
        for name, pixels in canaries.items():
            found = stock.soft_prompt(rgb(squares[name]))
            from_float[name] = relative_difference(found, encode(pixels)[0])
    return Comparison(tuple(stages), from_float)


def check_prompt(
    mmproj: Path, llm: Path, prompt: PromptConfig, wanted: PromptIds, *, size: int
) -> None:
    """Refuse a language file for which a stock engine would see other token ids than we do.

    Args:
        size: side of the encoder's image in pixels.

    Raises:
        ExportError: the first difference, with ids.
    """
    with Stock(mmproj, llm) as stock:
        found = stock.prompt(prompt.template, size)
    for side, ours, theirs in zip(
        ("before", "after"), (wanted.before, wanted.after), found, strict=True
    ):
        if ours != theirs:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)),
            )
            raise ExportError(
                f"{llm.name}: stock llama.cpp makes other tokens {side} the image: at {at} it has "
                f"{theirs[at : at + 4]}, the trained prompt {ours[at : at + 4]} ({len(theirs)} and "
                f"{len(ours)} in all); {_likely(ours, theirs)}"
            )


def _likely(ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    if theirs[1:] == ours:
        return "it adds BOS: train with prompt.add_bos = true, or export without the mmproj"
    if ours[1:] == theirs:
        return "it adds no BOS: train with prompt.add_bos = false, or export without the mmproj"
    return "the wrapper or the tokenizer differs: export without the mmproj"


def min_cosine(found: FloatArray, wanted: FloatArray) -> float:
    """Cosine of the worst of N soft tokens (N, D); -1 when the shapes differ."""
    if found.shape != wanted.shape:
        return -1.0
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    cosines = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    return float(cosines.min())


def relative_difference(found: FloatArray, wanted: FloatArray) -> float:
    """Length of the difference / length of `wanted`, over all N x D numbers."""
    if found.shape != wanted.shape:
        return float("inf")
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def _libmtmd() -> Any:
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


def _open_model(api: Any, path: Path) -> Any:
    if not path.is_file():
        raise BackendError(f"language model {str(path)!r} is absent; export it again")
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    params.load_mode = api.LLAMA_LOAD_MODE_MMAP
    last_errors()
    model = api.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise BackendError(f"llama.cpp cannot load {str(path)!r}{_reason()}")
    return model


def _free(api: Any, mtmd: Any, model: Any, context: Any) -> None:
    mtmd.mtmd_free(context)
    api.llama_model_free(model)


def _reason() -> str:
    lines = last_errors()
    return f": {lines}" if lines else ""
