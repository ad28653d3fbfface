"""The stock bundle as a part of an export: mmproj, scripts, and the checks through libmtmd.

Does not cover: the format (`mmproj_gguf.py`), the comparison (`mmproj_check.py`), the scripts'
text (`stock_files.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.numpy import load_file

from rx_edge.bundle import Artifact, StageResult
from rx_edge.config import GenerateConfig, PromptConfig
from rx_edge.errors import UsageError
from rx_edge.types import FloatArray, ImageTensor
from rx_edge_export import libmtmd, mmproj_check, mmproj_gguf, stock_files
from rx_edge_export.artifacts import Workshop
from rx_edge_export.golden import golden_file
from rx_edge_export.targets import Target

FILE = "mmproj.gguf"


def refuse_without_gguf(mouths: Sequence[Target]) -> None:
    """Stock llama.cpp needs a GGUF language model.

    Raises:
        UsageError: the export makes none.
    """
    if not any(t.format == "llm_gguf" for t in mouths):
        raise UsageError("stock = true needs a GGUF language model; add --llm gguf:Q8_0")


def refuse_two_views(prompt: PromptConfig) -> None:
    """Stock llama.cpp puts <img> and </img> around each image; two views share one pair of them.

    Raises:
        UsageError: the model reads two views.
    """
    if prompt.views != "one":
        raise UsageError(
            f"stock = true, but this model was trained with prompt.views = {prompt.views!r}: two "
            "images inside one <img></img>, and stock llama.cpp wraps each image in its own; "
            "export with stock = false, or train with prompt.views = 'one'"
        )


def mmproj(shop: Workshop, name: str, pairing: str) -> dict[str, Any]:
    """Write the vision half; early, because an encoder that does not fit is refused here."""
    out = shop.bundle / FILE

    def make() -> dict[str, Any]:
        recipe = shop.model.recipe
        return mmproj_gguf.write(
            shop.model.merged_encoder, recipe.image, recipe.prompt, out, name=name, pairing=pairing
        )

    return shop.steps.run("mmproj for stock llama.cpp", lambda: [out], make)


def finish(
    shop: Workshop,
    details: dict[str, Any],
    language: Sequence[Artifact],
    canaries: Sequence[str],
    name: str,
) -> tuple[Artifact, tuple[StageResult, ...]]:
    """Run both files through libmtmd and write the scripts.

    Raises:
        ExportError: the prompt that libmtmd builds is not the trained one.
    """
    llm = next(a for a in language if a.format == "llm_gguf")
    out, llm_file = shop.bundle / FILE, shop.bundle / llm.file
    recipe = shop.model.recipe
    shop.steps.detail("stock llama.cpp: prompt and soft prompts through libmtmd")
    mmproj_check.check_prompt(
        out, llm_file, recipe.prompt, shop.model.prompt, size=recipe.image.size
    )

    def encode(pixels: ImageTensor) -> FloatArray:
        with torch.inference_mode():
            encoded: FloatArray = shop.model.encoder(torch.from_numpy(pixels)).numpy()
        return encoded

    pixels = {name: load_file(shop.bundle / golden_file(name))["pixels"] for name in canaries}
    found = mmproj_check.compare(out, llm_file, pixels, recipe.image, encode)
    with libmtmd.Stock(out, llm_file) as engine:
        own = engine.chat_template()
    stock_files.write(
        shop.bundle,
        stock_files.Names(llm.file, out.name, name),
        recipe.prompt,
        recipe.image,
        GenerateConfig(n_ctx=shop.config.n_ctx),
        own_template=own,
    )
    artifact = Artifact(FILE, "mmproj_gguf", "F32", {**details, "from_float": found.from_float})
    return artifact, found.stages
