"""A LoRA step of the random language model: tokens per second, and model operations per second.

The product's own loop (`training_block.ours`) trains adapters and projector on random images,
whose features are computed before, and made-up reports, packed, activations computed twice.

MFU counts what the model needs and not what is computed again: per token two operations for each
weight that it is multiplied with in the forward pass, and two more for the gradients of
activations. Gradients of frozen weights are not needed; embedding, output head (report tokens
only), attention, adapters and the projector are left out, so it is a little too low.

Does not cover: several GPUs, reading images, what is learned.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from rx_edge import config
from rx_edge.config_io import to_mapping
from rx_edge.errors import BackendError
from rx_edge_bench.gpu.artefacts import SENTENCES, checkpoint
from rx_edge_bench.gpu.plan import Job, figure
from rx_edge_bench.gpu.vision import SMALL_TOWERS, TOWERS, dinov2
from rx_edge_export.gguf_architectures import read

STEPS, SMALL_STEPS = 6, 3  # the first warms up
BATCH, SMALL_BATCH = 16, 2
HELD_OUT = 2


def run(job: Job) -> dict[str, Any]:
    """Train a few steps.

    Raises:
        BackendError: torch cannot use the GPU.
        ModelError: the checkpoint is not there.
        TrainingError: the loss is not finite.
    """
    import torch

    from rx_edge_bench import training_block

    if job.gpu and not torch.cuda.is_available():
        raise BackendError(f"torch {torch.__version__} finds no GPU; install its CUDA build")
    work = job.files / "training"
    steps, batch = (SMALL_STEPS, SMALL_BATCH) if job.small else (STEPS, BATCH)
    prepare(job, work, reports=steps * batch)
    recipe = to_mapping(_recipe(job, work, batch))
    plain = {"recipe": recipe, "stage": "lora", "steps": steps, "seed": 0, "work": str(work)}
    shutil.rmtree(work / "ours-0", ignore_errors=True)  # of a run that was stopped
    task = training_block.read_task(plain)
    task.features.fill([path for item in task.items for path in item.sample.images])
    found = training_block.ours(task)
    operations = 4.0 * multiplied_weights(checkpoint(job) / "config.json")
    ceiling = figure(job, "ceilings", "operations_per_second")
    rate = found["tokens_per_second"]
    mfu = rate * operations / ceiling if ceiling else None
    return {
        "batch": batch, "timed_steps": steps - 1, "precision": str(task.engine.dtype),
        "device": task.engine.device.type, "trained": found, "peak_gpu_bytes": _peak_gpu_bytes(),
        "operations_per_token": operations, "mfu": mfu,
        "line": f"{rate:.0f} tokens/s, MFU {'unknown' if mfu is None else f'{100 * mfu:.1f} %'}",
    }  # fmt: skip


def _peak_gpu_bytes() -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def multiplied_weights(path: Path) -> int:
    """Weights of the linear layers inside the blocks."""
    return sum(
        int(np.prod(tensor.shape))
        for tensor in read(path).tensors
        if len(tensor.shape) == 2 and tensor.target.startswith("blk.")
    )


def prepare(job: Job, work: Path, *, reports: int) -> None:
    """A random tower, random grey images and reports of made-up sentences."""
    from PIL import Image

    tower = (SMALL_TOWERS if job.small else TOWERS)["224"]
    images = work / "images"
    images.mkdir(parents=True, exist_ok=True)
    if not (work / "vit" / "config.json").is_file():
        dinov2(tower).save_pretrained(work / "vit")
    drawn, noise, rows = random.Random(0), np.random.default_rng(0), []
    for number in range(reports + HELD_OUT):
        pixels = noise.integers(0, 255, (tower.size, tower.size), np.uint8)
        name = f"{number}.png"
        Image.fromarray(pixels).save(images / name)
        text = " ".join(drawn.choices(SENTENCES, k=drawn.randint(1, 4)))
        split = "train" if number < reports else "val"
        row = {"image": name, "report": text, "view": "PA", "patient": str(number), "split": split}
        rows.append(json.dumps(row) + "\n")
    (work / "pairs.jsonl").write_text("".join(rows), "utf-8")


def _recipe(job: Job, work: Path, batch: int) -> config.TrainRecipe:
    tower = (SMALL_TOWERS if job.small else TOWERS)["224"]
    return config.TrainRecipe(
        name="random",
        model=config.ModelConfig(vision=str(work / "vit"), language=str(checkpoint(job))),
        image=config.ImageRecipe(size=tower.size),
        engine=config.EngineConfig(
            gradient_checkpointing=True, device="auto" if job.gpu else "cpu"
        ),
        data={"random": config.CorpusConfig(reader="pairs-jsonl", path=str(work))},
        stages=(
            config.StageConfig(
                name="lora", data=("random",), trains=("projector", "lora"), batch_size=batch,
                learning_rate=1e-5,
            ),
        ),
    )  # fmt: skip
