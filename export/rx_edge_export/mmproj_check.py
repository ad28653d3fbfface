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

Does not cover: driving libmtmd (`libmtmd.py`), writing (`mmproj_gguf.py`), the stock programs
themselves (llama-server, Ollama, LM Studio), and GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rx_edge import image
from rx_edge.atomic import replacing
from rx_edge.bundle import StageResult
from rx_edge.config import ImageRecipe, PromptConfig
from rx_edge.errors import ExportError
from rx_edge.prompting import PromptIds, filled
from rx_edge.radiograph import open_radiograph
from rx_edge.types import FloatArray, ImageTensor, Radiograph, SoftPrompt
from rx_edge_export.libmtmd import Bytes, Stock

Encode = Callable[[ImageTensor], FloatArray]  # (1, 3, S, S) -> (1, N, D): torch or ONNX

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


def soft_prompt(mmproj: Path, llm: Path, pixels: Bytes, *, exact: bool = True) -> SoftPrompt:
    """The soft prompt (N, D) that stock llama.cpp computes of uint8 (S, S, 3) RGB pixels."""
    with Stock(mmproj, llm, exact=exact) as stock:
        return stock.soft_prompt(pixels)


def square_uint8(radiograph: Radiograph, recipe: ImageRecipe) -> Bytes:
    """The recipe's padded square as 8-bit grey (S, S): the picture to give a stock engine.

    Grey levels are rounded to 1/255; the float path keeps what lies between them.
    """
    return rounded(image.prepare(radiograph, recipe), recipe)


def write_square(study: Path, recipe: ImageRecipe, out: Path) -> None:
    """Write the square of an image file as a PNG, whole or not at all.

    Raises:
        UsageError, InputError: the file cannot be read.
    """
    square = square_uint8(open_radiograph(study), recipe)
    with replacing(out) as part:
        Image.fromarray(square).save(part, format="PNG")


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
        wanted: the trained ids of a study without an indication.
        size: side of the encoder's image in pixels.

    Raises:
        ExportError: the first difference, with ids.
    """
    with Stock(mmproj, llm) as stock:
        found = stock.prompt(filled(prompt), size)
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
