"""Random vision towers with their projector, exported by our own writers, on every engine here.

    ViT-S/14 at 224 pixels   the demo's geometry, 2x2 pixel shuffle
    ViT-B/14 at 518 pixels   that of RAD-DINO; 37 x 37 patches, so a resampler of 64 queries

An engine that cannot run is in the result with its reason. Time includes the copies to the device
and back.

Does not cover: preparing pixels, and whether precisions agree (`rx-edge verify`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rx_edge.backends import registry
from rx_edge.config import ModelConfig
from rx_edge.errors import RxEdgeError
from rx_edge_bench.export_memory import GEOMETRY
from rx_edge_bench.gpu.artefacts import SMALL
from rx_edge_bench.gpu.plan import Job
from rx_edge_bench.latency import spread

ENGINES = (("vision_tensorrt", "cuda"), ("vision_onnx", "cuda"), ("vision_onnx", "cpu"))


@dataclass(frozen=True)
class Tower:
    """A DINOv2 by its numbers."""

    name: str
    width: int
    blocks: int
    heads: int
    size: int
    model: ModelConfig


RESAMPLER = ModelConfig(pooling="resampler", queries=64)
TOWERS = {
    "224": Tower("ViT-S/14 at 224 pixels", 384, 12, 6, 224, ModelConfig()),
    "518": Tower("ViT-B/14 at 518 pixels", 768, 12, 12, 518, RESAMPLER),
}
SMALL_TOWERS = {
    "224": Tower("tiny, at 56 pixels", 32, 2, 2, 56, ModelConfig()),
    "518": Tower("tiny, at 42 pixels", 32, 2, 2, 42, RESAMPLER),
}


def run(job: Job, name: str) -> dict[str, Any]:
    """Export a tower in fp32 and fp16, and time both files on every engine.

    Raises:
        ExportError: a writer refuses.
    """
    tower = (SMALL_TOWERS if job.small else TOWERS)[name]
    found = {
        f"{precision}, {engine} on {device}": timed(job, tower, file, engine, device)
        for precision, file in export(job, tower, job.files / f"vision-{name}").items()
        for engine, device in ENGINES
    }
    times = (
        f"{what} {1e3 * result['seconds']['median']:.1f} ms"
        for what, result in found.items()
        if "seconds" in result
    )
    line = f"{tower.name}: {'; '.join(times) or 'no engine runs here'}"
    return {"tower": tower.name, "engines": found, "line": line}


def export(job: Job, tower: Tower, folder: Path) -> dict[str, Path]:
    """The tower's files by precision; those that are there are kept."""
    from rx_edge_export import vision_onnx, vision_quantize

    folder.mkdir(exist_ok=True)
    files = {precision: folder / f"vision.{precision}.onnx" for precision in ("fp32", "fp16")}
    if not files["fp32"].is_file():
        vision_onnx.write(encoder(job, tower), files["fp32"], image_size=tower.size)
    if not files["fp16"].is_file():
        vision_quantize.to_fp16(files["fp32"], files["fp16"])
    return files


def encoder(job: Job, tower: Tower) -> Any:
    """Tower and projector with random weights, into the width of the job's language model."""
    import torch

    from rx_edge.model.projector import Projector
    from rx_edge.model.report_model import SoftPromptEncoder
    from rx_edge.model.vision import VisionTower

    torch.manual_seed(0)
    vision = VisionTower(dinov2(tower), tower.size)
    projector = Projector(
        tower.model, grid=vision.grid, width=vision.width,
        lm_width=int((SMALL if job.small else GEOMETRY)["hidden_size"]),  # type: ignore[call-overload]
    )  # fmt: skip
    return SoftPromptEncoder(vision, projector).eval()


def dinov2(tower: Tower) -> Any:
    """A transformers `Dinov2Model` with random weights."""
    from rx_edge.model.hub import transformers

    hf = transformers()
    config = hf.Dinov2Config(
        image_size=tower.size, patch_size=14, hidden_size=tower.width,
        num_hidden_layers=tower.blocks, num_attention_heads=tower.heads,
    )  # fmt: skip
    return hf.Dinov2Model(config).eval()


def timed(job: Job, tower: Tower, file: Path, engine: str, device: str) -> dict[str, Any]:
    """Seconds of one image, or why not."""
    image = np.random.default_rng(0).standard_normal((1, 3, tower.size, tower.size), np.float32)
    taken = []
    try:
        opening = time.perf_counter()
        with registry.load(engine).open(file, threads=0, device=device) as vision:
            open_seconds = time.perf_counter() - opening
            for _ in range(job.repeats + 2):
                started = time.perf_counter()
                vision.encode(image)
                taken.append(time.perf_counter() - started)
            where = vision.device
    except RxEdgeError as error:
        return {"unavailable": str(error)}
    return {"device": where, "open_seconds": open_seconds, "seconds": spread(taken[2:])}
