"""A plain image becomes a `Radiograph`; a `Radiograph` becomes the encoder's input.

`read` takes PNG and JPEG. Such a file says nothing about polarity or windowing, so its grey
values are taken as displayed and the `Radiograph` carries a note that says so. `prepare` is the
one preprocessing that training, export, verification and serving share: it is the named recipe
`dicom-display-v1`, and changing a single step of it means a new name.

Does not cover: DICOM (`rx_edge.dicom`), and judging whether the picture shows a chest.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rx_edge.config import ImageRecipe
from rx_edge.errors import InputError
from rx_edge.types import FloatArray, ImageTensor, Radiograph

MAX_PIXELS = 64_000_000  # a 43 x 35 cm detector at 0.1 mm has 15 million
GREY_SPREAD = 16  # of 255: two channels closer than this are the same grey (JPEG chroma noise)
COLOUR_FRACTION = 0.01  # part of the pixels that may be coloured: a side marker, not a photograph

AS_DISPLAYED = "a plain image states no polarity or window: its grey values are taken as displayed"


def read(path: Path) -> Radiograph:
    """Read a grey PNG (8 or 16 bit) or JPEG, or a colour one whose channels are equal.

    Returns:
        A `Radiograph` with float32 (H, W) pixels in [0, 1], source_format "png" or "jpeg".

    Raises:
        InputError: unreadable, not a PNG or JPEG, truncated, too large, coloured or transparent.
    """
    image, source_format = _decode(path)
    provenance = {"mode": image.mode}
    pixels = _grey(image, path)
    return Radiograph(
        pixels=pixels,
        pixel_sha256=pixel_sha256(pixels),
        source_format=source_format,
        notes=(AS_DISPLAYED,),
        provenance=provenance,
    )


def pixel_sha256(pixels: FloatArray) -> str:
    """Hex sha256 over the shape (two little-endian uint64) and the little-endian float32 bytes."""
    digest = hashlib.sha256(np.asarray(pixels.shape, dtype="<u8").tobytes())
    digest.update(np.ascontiguousarray(pixels, dtype="<f4").data)
    return digest.hexdigest()


def prepare(radiograph: Radiograph, recipe: ImageRecipe) -> ImageTensor:
    """Turn a radiograph into one encoder input by the recipe `dicom-display-v1`.

    The long side becomes S = `recipe.size` by an antialiased bicubic resize in float32 (no 8-bit
    step on the way), the result is clipped to [0, 1] because bicubic overshoots, centred on black,
    repeated to three channels and normalised.

    Returns:
        float32 (1, 3, S, S), C-contiguous; equal input gives bit-equal output.
    """
    height, width = radiograph.pixels.shape
    long_side = max(height, width)
    new_height, new_width = (
        max(1, int(side * recipe.size / long_side + 0.5)) for side in (height, width)
    )
    resized = Image.fromarray(np.ascontiguousarray(radiograph.pixels, dtype=np.float32)).resize(
        (new_width, new_height), Image.Resampling.BICUBIC
    )  # mode "F": Pillow widens the kernel when it shrinks, which is the antialiasing
    square = np.zeros((recipe.size, recipe.size), dtype=np.float32)
    top, left = (recipe.size - new_height) // 2, (recipe.size - new_width) // 2
    square[top : top + new_height, left : left + new_width] = np.asarray(resized).clip(0.0, 1.0)
    mean = np.asarray(recipe.mean, dtype=np.float32)[:, None, None]  # (3, 1, 1)
    std = np.asarray(recipe.std, dtype=np.float32)[:, None, None]
    return np.ascontiguousarray(((square[None] - mean) / std)[None], dtype=np.float32)


def _decode(path: Path) -> tuple[Image.Image, str]:
    """Decode the whole file now, so that a truncated one fails here and nowhere else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow quotes file content; a bomb is still an error
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                source_format = "png" if image.format == "PNG" else "jpeg"
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(_too_large(path))
                return ImageOps.exif_transpose(image), source_format
    except InputError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(_too_large(path)) from error
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error...
        raise InputError(
            f"{str(path)!r} cannot be decoded as PNG or JPEG: it is truncated, damaged or of "
            "another format; export the image again"
        ) from error


def _too_large(path: Path) -> str:
    return f"{str(path)!r} has more than {MAX_PIXELS} pixels; a radiograph has fewer: scale it down"


def _grey(image: Image.Image, path: Path) -> FloatArray:
    """The image's grey values as float32 (H, W) in [0, 1]."""
    if image.mode.startswith("I"):  # 16-bit grey PNG: "I;16", in older Pillow "I"
        return np.asarray(image, dtype=np.float32) / np.float32(65535.0)
    if image.mode in ("CMYK", "YCCK"):
        raise InputError(f"{str(path)!r} is a {image.mode} print image; save it as grey")
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"), dtype=np.float32) / np.float32(255.0)
    channels = np.asarray(image.convert("RGBA"))  # (H, W, 4): palette, LA, RGB, RGBA
    if channels[..., 3].min() < 255:
        raise InputError(f"{str(path)!r} has transparent pixels; save it without an alpha channel")
    spread = np.ptp(channels[..., :3], axis=-1)  # (H, W) uint8
    if np.mean(spread > GREY_SPREAD) > COLOUR_FRACTION:
        raise InputError(f"{str(path)!r} is a colour image, not a radiograph; save it as grey")
    return np.asarray(image.convert("L"), dtype=np.float32) / np.float32(255.0)
