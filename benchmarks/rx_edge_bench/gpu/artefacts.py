"""A checkpoint of random weights, and GGUF files of it by our own exporter.

Speed does not depend on values: OpenLLaMA-7B's geometry with random float16 weights, labelled so.
It is written shard by shard, each tensor from its own seed, so that a run that was stopped goes on
and the bytes are the same.

Does not cover: what such a model would say.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rx_edge.atomic import replacing
from rx_edge.machine import physical_cores
from rx_edge_bench.export_memory import GEOMETRY, LAYERS, SHARD
from rx_edge_bench.gpu.plan import Job
from rx_edge_export.gguf_architectures import Architecture, Tensor, read

LABEL = "random weights, OpenLLaMA-7B geometry"
# rows of a multiple of 256, as k-quants want them
SMALL = {
    **GEOMETRY, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 512,
}  # fmt: skip
SMALL_LAYERS, SMALL_SHARD = 2, 1_000_000
DEVIATION = 0.02
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SENTENCES = (
    "The heart size is normal and the mediastinal contours are unremarkable.",
    "The lungs are clear without focal consolidation, effusion or pneumothorax.",
    "There is a moderate left pleural effusion with adjacent atelectasis.",
    "An endotracheal tube ends 4 cm above the carina.",
    "No acute osseous abnormality is identified.",
)


def model(job: Job) -> dict[str, Any]:
    """Write the checkpoint's shards that are not there yet."""
    base, started = checkpoint(job), time.perf_counter()
    base.mkdir(parents=True, exist_ok=True)
    _write_config(job, base)
    shape, weight_map = read(base / "config.json"), {}
    for number, tensors in enumerate(_shards(shape, SMALL_SHARD if job.small else SHARD)):
        file = base / f"shard-{number}.safetensors"
        weight_map.update({tensor.source: file.name for _, tensor in tensors})
        if not file.is_file():
            _write_shard(file, tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    files = {str(f.relative_to(job.out)): f.stat().st_size for f in sorted(base.iterdir())}
    weights = sum(int(np.prod(tensor.shape)) for tensor in shape.tensors)
    label = f"small, {LABEL} shrunk" if job.small else LABEL
    return {
        "label": label,
        "weights": weights,
        "bytes": sum(files.values()),
        "write_seconds": round(time.perf_counter() - started, 1),
        "files": files,
        "line": f"{weights / 1e9:.3f} billion weights ({label})",
    }


def export(job: Job, precision: str) -> dict[str, Any]:
    """Write one GGUF file as `rx-edge export` does.

    Raises:
        ExportError: the writer or llama.cpp refuses.
    """
    from rx_edge_export import gguf_quantize, llm_gguf

    out = gguf(job, precision)
    if precision == "F16":
        facts = llm_gguf.write(checkpoint(job), out, dtype="f16", name=LABEL)
    else:
        facts = gguf_quantize.quantize(
            gguf(job, "F16"), out, file_type=precision, threads=physical_cores()
        )
    return {
        **facts,
        "files": {str(out.relative_to(job.out)): out.stat().st_size},
        "line": f"{facts['bytes'] / 1e9:.3f} GB, {facts['tensor_types']}",
    }


def checkpoint(job: Job) -> Path:
    """The random model's directory."""
    return job.files / "base"


def gguf(job: Job, precision: str) -> Path:
    """The random model as a GGUF file."""
    return job.files / f"llm.{precision}.gguf"


def _shards(shape: Architecture, limit: int) -> Iterator[list[tuple[int, Tensor]]]:
    """The model's tensors with their numbers, in groups of about `limit` bytes of float16."""
    group: list[tuple[int, Tensor]] = []
    size = 0
    for number, tensor in enumerate(shape.tensors):
        group.append((number, tensor))
        size += 2 * int(np.prod(tensor.shape))
        if size > limit:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_shard(file: Path, tensors: list[tuple[int, Tensor]]) -> None:
    from safetensors.numpy import save_file

    with ThreadPoolExecutor(physical_cores()) as pool:  # numpy draws without the lock
        values = list(pool.map(lambda pair: _random(*pair), tensors))
    named = {tensor.source: value for (_, tensor), value in zip(tensors, values, strict=True)}
    with replacing(file) as part:
        save_file(named, part, metadata={"format": "pt"})


def _random(number: int, tensor: Tensor) -> Any:
    if len(tensor.shape) == 1:  # a norm's weights
        return np.ones(tensor.shape, np.float16)
    drawn = np.random.default_rng([0, number]).standard_normal(tensor.shape, np.float32)
    drawn *= DEVIATION
    return drawn.astype(np.float16)


def _write_config(job: Job, base: Path) -> None:
    tokenizer = _tokenizer()
    geometry = {**SMALL, "num_hidden_layers": SMALL_LAYERS} if job.small else {
        **GEOMETRY, "num_hidden_layers": LAYERS
    }  # fmt: skip
    roles = dict(zip(("pad", "bos", "eos"), SPECIAL, strict=True))
    ids = {f"{role}_token_id": tokenizer.token_to_id(text) for role, text in roles.items()}
    texts = {f"{role}_token": text for role, text in roles.items()}
    (base / "config.json").write_text(json.dumps({**geometry, **ids}), "utf-8")
    (base / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **texts}
    (base / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def _tokenizer() -> Any:
    """Byte-level BPE over a few sentences: nothing has to be carried for it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(SPECIAL), initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer
