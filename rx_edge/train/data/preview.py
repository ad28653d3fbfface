"""One HTML page of samples: the text to learn, and the images exactly as the model sees them.

Nothing on the page is loaded from elsewhere and nothing runs in it: images are data: URLs.
**It may hold patient data**, and says so.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Mapping
from html import escape

import numpy as np
from PIL import Image

from rx_edge.config import ImageRecipe
from rx_edge.errors import InputError
from rx_edge.image import prepare
from rx_edge.train.data import Corpus, Sample
from rx_edge.train.data.images import open_images
from rx_edge.types import ImageTensor, Radiograph

NOTICE = (
    "This page may hold patient data (images and report text). It was written because it was asked "
    "for; keep it where such data may be kept."
)
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>rx-edge data preview</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body { font: 15px/1.45 sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; }
.notice { border: 2px solid #a00; padding: .6em 1em; }
article { display: flex; gap: 1.2em; border-top: 1px solid #999; padding: 1em 0; }
img { width: 224px; height: 224px; background: #000; image-rendering: pixelated; }
img { display: block; margin-bottom: .4em; }
dt { color: #555; } dd { margin: 0 0 .6em; } p { margin-top: 0; }
</style></head><body><h1>Samples</h1>
"""


def page(corpora: Mapping[str, Corpus], recipe: ImageRecipe, *, count: int, seed: int) -> str:
    """The page with up to `count` samples, drawn from all splits of all corpora by `seed`."""
    known = [
        (name, sample)
        for name, corpus in corpora.items()
        for sample in sorted(corpus.samples, key=lambda s: (s.split, s.id))
    ]
    drawn = random.Random(seed).sample(known, min(count, len(known)))
    seen = (
        f"<p>{len(drawn)} of {len(known)} samples, seed {seed}. Images are the model's input, "
        f"{recipe.size} x {recipe.size}, recipe {escape(recipe.name)}, with the normalisation "
        "undone.</p>\n"
    )
    articles = "\n".join(_article(name, sample, recipe) for name, sample in drawn)
    notice = f'<p class="notice">{escape(NOTICE)}</p>\n'
    return f"{_HEAD}{notice}{seen}{articles}\n</body></html>\n"


def displayed(tensor: ImageTensor, recipe: ImageRecipe) -> Image.Image:
    """The RGB picture of a tensor (1, 3, S, S): its normalisation undone, as 8 bits."""
    mean = np.asarray(recipe.mean, dtype=np.float32)[:, None, None]
    std = np.asarray(recipe.std, dtype=np.float32)[:, None, None]
    pixels = (tensor[0] * std + mean).clip(0.0, 1.0) * 255.0
    return Image.fromarray(np.rint(pixels).astype(np.uint8).transpose(1, 2, 0))


def _article(name: str, sample: Sample, recipe: ImageRecipe) -> str:
    facts = {
        "corpus": name,
        "study": sample.id,
        "split": sample.split,
        "view": sample.view or "not stated",
        "end of the report is learned": "yes" if sample.complete else "no",
        "indication": sample.indication or "not stated",
    }
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return (
        f"<article><div>{_pictures(sample, recipe)}</div>"
        f"<div><p>{escape(sample.target)}</p><dl>{items}</dl></div></article>"
    )


def _pictures(sample: Sample, recipe: ImageRecipe) -> str:
    shown = [] if sample.images else ["<p>text only</p>"]
    try:
        shown += [_picture(radiograph, recipe) for radiograph in open_images(sample)]
    except InputError as error:
        shown.append(f"<p>{escape(str(error))}</p>")
    return "".join(shown)


def _picture(radiograph: Radiograph, recipe: ImageRecipe) -> str:
    file = io.BytesIO()
    displayed(prepare(radiograph, recipe), recipe).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img alt="model input" src="data:image/png;base64,{data}">'
