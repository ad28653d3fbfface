"""Peak memory of merging, converting and quantising a 7B-geometry model, layer by layer.

Random float16 weights of OpenLLaMA-7B's geometry with fewer layers, in shards, with a LoRA
adapter on every linear layer. Each step runs in a process of its own, whose peak resident memory
the kernel reports; pages of a mapped file count in it although they can be dropped. The claim to
test: the peak does not grow with the number of layers.

Does not cover: the reference model in torch, which a full export loads whole in float32 (the
plan of `rx-edge export --dry-run` says how much), and time.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rx_edge.config import LoraSettings
from rx_edge_bench.environment import environment

SCHEMA = "rx-edge-export-memory/1"
GEOMETRY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
LAYERS = 32  # of the real model
COUNTS = (2, 4)  # layers of the models that are measured
SHARD = 2_000_000_000  # bytes of a shard of the base checkpoint


def measure(
    work: Path,
    tokenizer: Path,
    *,
    layers: Sequence[int] = COUNTS,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure for each number of layers.

    Args:
        work: an empty directory with room for about 10 GB.
        tokenizer: a directory with tokenizer.json and tokenizer_config.json, at most 32,000 ids.

    Returns:
        JSON-ready: bytes of the model and of its largest shard, peak bytes and seconds per step,
        and the peak extrapolated to 32 layers by a straight line.
    """
    runs = []
    for count in layers:
        progress(f"{count} layers: writing a random checkpoint")
        base = work / f"base-{count}"
        largest = _in_process(_checkpoint, base, tokenizer, count)["result"]
        steps = {}
        for name, step in (("merge", _merge), ("gguf_f32", _convert), ("q4_k_m", _quantise)):
            progress(f"{count} layers: {name}")
            steps[name] = _in_process(step, base, work)
        total = sum(f.stat().st_size for f in base.glob("*.safetensors"))
        runs.append(
            {"layers": count, "bytes": total, "largest_shard_bytes": largest, "steps": steps}
        )
        for file in work.rglob("*.*"):
            if file.is_file():
                file.unlink()
    peaks = {n: [r["steps"][n]["peak_bytes"] for r in runs] for n in runs[0]["steps"]}
    return {
        "schema": SCHEMA,
        "geometry": GEOMETRY,
        "runs": runs,
        "peak_bytes_at_32_layers": {n: _line(layers, p) for n, p in peaks.items()},
        "environment": environment(),
    }


def _line(layers: Sequence[int], peaks: Sequence[int]) -> int:
    """Through the first and the last point, at `LAYERS`."""
    slope = (peaks[-1] - peaks[0]) / (layers[-1] - layers[0])
    return int(peaks[-1] + slope * (LAYERS - layers[-1]))


def _in_process(step: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Run in a fresh process: its peak memory belongs to this step alone."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, step, arguments))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    finally:
        process.join()
    return found


def _child(sender: Any, step: Callable[..., Any], arguments: Any) -> None:
    started = time.perf_counter()
    result = step(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    seconds = round(time.perf_counter() - started, 1)
    sender.send({"result": result, "peak_bytes": peak, "seconds": seconds})


def _checkpoint(base: Path, tokenizer: Path, layers: int) -> int:
    """Write the base model and an adapter; returns the bytes of the largest shard."""
    import torch
    from safetensors.torch import save_file

    from rx_edge_export import gguf_architectures

    base.mkdir(parents=True)
    config = {**GEOMETRY, "num_hidden_layers": layers}
    (base / "config.json").write_text(json.dumps(config), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((tokenizer / name).read_bytes())
    torch.manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map, size, number, largest = {}, 0, 0, 0
    tensors = gguf_architectures.read(base / "config.json").tensors
    for last, tensor in enumerate(tensors, 1):
        shard[tensor.source] = torch.randn(tensor.shape).mul_(0.02).half()
        weight_map[tensor.source] = f"shard-{number}.safetensors"
        size += shard[tensor.source].nbytes
        if size > SHARD or last == len(tensors):
            save_file(shard, base / f"shard-{number}.safetensors")
            largest, shard, size, number = max(largest, size), {}, 0, number + 1
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return largest


def _merge(base: Path, work: Path) -> None:
    import torch

    from rx_edge_export import gguf_architectures, merge_lora

    settings = LoraSettings()
    adapter = {}
    for tensor in gguf_architectures.read(base / "config.json").tensors:
        module = tensor.source.removesuffix(".weight")
        if module.rpartition(".")[2] in settings.targets:
            rows, columns = tensor.shape
            key = f"base_model.model.{module}.lora_"
            adapter[f"{key}A.weight"] = torch.randn(settings.r, columns)
            adapter[f"{key}B.weight"] = torch.randn(rows, settings.r)
    out = work / "merged"
    out.mkdir(exist_ok=True)
    merge_lora.write(base, adapter, settings, out)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((base / name).read_bytes())


def _convert(_: Path, work: Path) -> None:
    from rx_edge_export import llm_gguf

    llm_gguf.write(work / "merged", work / "llm.F32.gguf", dtype="f32", name="random 7B geometry")


def _quantise(_: Path, work: Path) -> None:
    from rx_edge_export import gguf_quantize

    gguf_quantize.quantize(
        work / "llm.F32.gguf", work / "llm.Q4_K_M.gguf", file_type="Q4_K_M", threads=0
    )
