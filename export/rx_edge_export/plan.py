"""`rx-edge export --dry-run`: what would be made, how large, and does it fit?

Sizes follow from the shapes in the checkpoint, tensor by tensor, with llama.cpp's own fallbacks
for rows that fit no block. Memory at run time is weights + KV cache + working buffers for the
planned context. Nothing is loaded but headers.

Does not cover: the export itself. Times are rough (`SECONDS_PER_GB`), sizes are not.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rx_edge.bundle import DRAFTS
from rx_edge.config import ExportConfig, GenerateConfig, TrainRecipe
from rx_edge.config_io import load_toml
from rx_edge.errors import ModelError, UsageError
from rx_edge.machine import memory_free
from rx_edge.model.catalogue import locate
from rx_edge.model.language import tokenizer_file
from rx_edge.model.parts import PARTS, trained_parts
from rx_edge.model.projector import soft_tokens
from rx_edge.model.vision import grid_of
from rx_edge.prompting import (
    MAX_INDICATION_TOKENS,
    load_tokenizer,
    prompt_ids,
    takes_indication,
)
from rx_edge_export import draft_corpus, gguf_architectures, targets
from rx_edge_export.draft_corpus import DraftCorpus
from rx_edge_export.gguf_architectures import Architecture, Tensor
from rx_edge_export.targets import Target

GB = 1e9
# bytes per weight: a block's bytes / its weights (ggml)
_BITS = {
    "F32": 32.0, "F16": 16.0, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q5_0": 5.5,
    "Q4_K": 4.5, "IQ4_NL": 4.5,
}  # fmt: skip
_FALLBACK = {
    "Q4_K": "Q5_0",
    "Q5_K": "Q8_0",
    "Q6_K": "Q8_0",
}  # rows not a multiple of 256; gguf_quantize.py
_MAIN = {"Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K", "IQ4_NL": "IQ4_NL"}
# weight-only ONNX: bits and a float16/32 scale per block of 32, embedding table in float16
_ONNX_BITS = {"fp32": 32.0, "fp16": 16.0, "int8": 9.0, "int4": 5.9}
_VISION_BITS = {"fp32": 32.0, "fp16": 16.0, "int8": 8.3, "fp8": 32.0}  # fp8: Q/DQ around fp32
# one two-core machine: torch fp32 passes over 60 studies, conversion, verification; per GB of
# float32 weights. A promise of magnitude only.
SECONDS_PER_GB = 90.0
SECONDS_FIXED = 20.0
WORKING = 0.35 * GB  # libraries and buffers of the exporting process


@dataclass(frozen=True)
class Row:
    """One artefact: bytes on disk, and memory while it runs."""

    name: str
    file: str
    disk: int
    memory: int


@dataclass(frozen=True)
class Plan:
    """What an export would need. Bytes and seconds.

    Attributes:
        context: tokens of the longest prompt and draft; n_ctx must hold them.
        run_memory: of the bundle's default pair: weights + KV cache + buffers + vision.
        export_disk: at the peak: artefacts and intermediate files.
        export_memory: of the exporting process at its peak.
    """

    rows: tuple[Row, ...]
    context: int
    n_ctx: int
    kv_cache: int
    run_memory: int
    export_disk: int
    export_memory: int
    export_seconds: float
    disk_free: int
    memory_free: int
    notes: tuple[str, ...] = ()

    def problems(self, memory_gb: float) -> list[str]:
        """Why this cannot work, in words for the user."""
        found = []
        if self.context > self.n_ctx:
            found.append(
                f"the longest prompt and a whole draft have {self.context} tokens and n_ctx is "
                f"{self.n_ctx}; add --set n_ctx={-(-self.context // 512) * 512}"
            )
        if self.export_disk > self.disk_free:
            found.append(
                f"the export needs {self.export_disk / GB:.1f} GB of disk and "
                f"{self.disk_free / GB:.1f} GB are free; choose another --out or fewer formats"
            )
        if self.memory_free and self.export_memory > self.memory_free:
            found.append(
                f"the export needs {self.export_memory / GB:.1f} GB of memory and "
                f"{self.memory_free / GB:.1f} GB are free; use a larger machine for the export"
            )
        if memory_gb and self.run_memory > memory_gb * GB:
            found.append(
                f"the default pair needs {self.run_memory / GB:.1f} GB at run time and the recipe "
                f"allows {memory_gb:g} GB; choose a smaller first --llm or a shorter n_ctx"
            )
        return found


def make(run: Path, config: ExportConfig, where: Path, corpus: DraftCorpus | None = None) -> Plan:
    """Plan the export of `run` into a directory below `where`.

    Args:
        corpus: what `config.drafts_from` names, where it was read already.

    Raises:
        UsageError: unknown targets, or no reports where `drafts_from` says.
        ModelError, ConfigError: the run or its base models are not here.
    """
    eyes = targets.chosen(config.vision, targets.VISION, "--vision")
    mouths = targets.chosen(config.language, targets.LANGUAGE, "--llm")
    recipe = recipe_of(run)
    language = Path(locate(recipe.model.language))
    architecture = gguf_architectures.read(language / "config.json")
    seen, notes = _vision_weights(run, recipe)
    spoken = sum(_count(t) for t in architecture.tensors)
    kv = kv_cache(architecture, config.n_ctx)
    rows = [*_vision_rows(eyes, seen), *_language_rows(mouths, architecture, spoken, kv)]
    if config.stock:
        rows.append(Row("stock mmproj", "mmproj.gguf", 4 * seen, int(4 * seen + 0.2 * GB)))
    corpus = corpus or draft_corpus.load(run, recipe, config.drafts_from)
    if corpus.reports:  # mapped, and all of it may be read
        rows.append(Row("report drafts", DRAFTS, corpus.size, corpus.size))
    notes += [f"{DRAFTS} is made without {reason}" for reason in corpus.left_out]
    files = {row.file: row.disk for row in rows}
    between = 4 * (2 * spoken + seen)  # merged weights, float32 GGUF, float32 ONNX
    floats = 4 * (spoken + seen)
    return Plan(
        rows=tuple(rows),
        context=context(recipe),
        n_ctx=config.n_ctx,
        kv_cache=kv,
        run_memory=_first(rows, "vision") + _first(rows, "llm"),
        export_disk=sum(files.values()) + between,
        export_memory=int(2.2 * floats + WORKING),  # the model, and what a conversion adds
        export_seconds=SECONDS_FIXED + SECONDS_PER_GB * floats / GB * (1 + len(files) / 4),
        disk_free=shutil.disk_usage(_existing(where)).free,
        memory_free=memory_free(),
        notes=tuple(notes),
    )


def context(recipe: TrainRecipe) -> int:
    """Tokens of the longest prompt (all views, the longest indication) and the longest draft."""
    prompt = recipe.prompt
    ids = prompt_ids(prompt, load_tokenizer(tokenizer_file(recipe.model.language)))
    each = soft_tokens(recipe.model, grid_of(recipe.model.vision, recipe.image.size))
    views = 1 if prompt.views == "one" else 2
    indication = MAX_INDICATION_TOKENS if takes_indication(prompt) else 0
    draft = GenerateConfig().max_new_tokens - 1  # its last token is never fed back
    return len(ids.before) + views * each + len(ids.after) + indication + draft


def recipe_of(run: Path) -> TrainRecipe:
    """The recipe of a finished training run.

    Raises:
        ModelError: `run` is not finished.
        ConfigError: its recipe.toml is wrong.
    """
    for needed in ("recipe.toml", "final/projector.safetensors", "metrics.json"):  # the last file
        _require(run, needed)
    recipe = load_toml(run / "recipe.toml", TrainRecipe)
    for part in trained_parts(recipe):
        _require(run, f"final/{PARTS[part]}")
    return recipe


def _require(run: Path, file: str) -> None:
    if not (run / file).is_file():
        raise ModelError(
            f"{str(run)!r} is not a finished training run: {file} is missing; "
            "wait for it, or go on with rx-edge train RECIPE --out RUN --resume"
        )


def refuse_unfit(plan: Plan, memory_gb: float = 0.0) -> None:
    """Stop before anything is made.

    Raises:
        UsageError: something does not fit; every reason is given.
    """
    problems = plan.problems(memory_gb)
    if problems:
        raise UsageError("; ".join(problems))


def steps(eyes: Sequence[Target], mouths: Sequence[Target], config: ExportConfig) -> int:
    """How many steps the export will take, for the progress display."""
    quantised = [t for t in mouths if t.format == "llm_gguf" and t.precision in _MAIN]
    matrix = any(t.precision != "Q8_0" for t in quantised) and config.imatrix != "none"
    from_fp32 = {t.file for t in eyes} - {"vision.onnx"}
    engines = sum(t.format == "vision_tensorrt" for t in eyes)
    traced = any(t.format == "llm_onnx" and t.precision != "fp16" for t in mouths)
    traced = traced and config.llm_exporter == "rx-edge"
    base = 4 + config.stock  # golden vectors, drafts, merging, vision fp32, mmproj
    return base + len(from_fp32) + engines + bool(quantised) + matrix + traced + len(mouths)


def as_json(plan: Plan) -> dict[str, Any]:
    """JSON-ready."""
    return dataclasses.asdict(plan)


def _count(tensor: Tensor) -> int:
    n = 1
    for side in tensor.shape:
        n *= side
    return n


def _vision_rows(eyes: Sequence[Target], weights: int) -> Iterator[Row]:
    for target in eyes:
        disk = int(weights * _VISION_BITS[target.precision] / 8 * 1.01)
        # ONNX Runtime keeps one copy of the weights and the activations of one image
        yield Row(f"vision {target.name}", target.file, disk, int(disk * 1.6 + 0.1 * GB))


def _language_rows(
    mouths: Sequence[Target], architecture: Architecture, weights: int, kv: int
) -> Iterator[Row]:
    buffers = int(32 * architecture.vocab * 4 + 512 * 4 * 6 * architecture.numbers[
        "embedding_length"])  # fmt: skip
    for target in mouths:
        if target.format == "llm_gguf":
            disk = language_bytes(architecture, target.precision)
            memory = disk + kv + buffers
        else:
            table = architecture.vocab * architecture.numbers["embedding_length"]
            head = table if architecture.tied else 0  # a tied head is stored apart
            matrices = weights - table + head
            disk = int(matrices * _ONNX_BITS[target.precision] / 8)
            disk += int(table * (4 if target.precision == "fp32" else 2))
            memory = int(disk * 1.3) + 2 * kv + buffers
        yield Row(f"llm {target.name}", target.file, int(disk), int(memory))


def language_bytes(architecture: Architecture, precision: str) -> int:
    """Predicted size of a GGUF file."""
    weights = sum(_gguf_bytes(t, precision, architecture) for t in architecture.tensors)
    return int(weights) + 40 * architecture.vocab  # tokenizer and names


def _gguf_bytes(tensor: Tensor, precision: str, architecture: Architecture) -> float:
    weights = _count(tensor)
    if len(tensor.shape) == 1 or tensor.wide:
        return 4.0 * weights
    if precision not in _MAIN:
        return weights * _BITS[precision] / 8
    kind = _MAIN[precision]
    if tensor.target in ("token_embd.weight", "output.weight"):
        head = architecture.tied or tensor.target == "output.weight"
        kind = "Q6_K" if head and kind != "Q8_0" else kind  # llama.cpp keeps the head better
    elif precision.endswith("_M") and (
        ".ffn_down." in tensor.target or ".attn_v." in tensor.target
    ):
        # half of these are Q6_K in the _M mixes
        return weights * (_bits(kind, tensor) + _bits("Q6_K", tensor)) / 16
    return weights * _bits(kind, tensor) / 8


def _bits(kind: str, tensor: Tensor) -> float:
    columns = tensor.shape[1]
    if kind in _FALLBACK and columns % 256:
        kind = _FALLBACK[kind]
    return _BITS[kind if columns % 32 == 0 else "F16"]


def kv_cache(architecture: Architecture, n_ctx: int) -> int:
    """float16 keys and values of `n_ctx` tokens."""
    numbers = architecture.numbers
    if architecture.name == "gpt2":
        width = int(numbers["embedding_length"])
    else:
        width = int(numbers["head_count_kv"] * numbers["key_length"])
    return 2 * 2 * int(numbers["block_count"]) * width * n_ctx


def _vision_weights(run: Path, recipe: TrainRecipe) -> tuple[int, list[str]]:
    """Number of weights of tower and projector, and what could not be counted."""
    projector = run / "final" / PARTS["projector"]
    total, notes = sum(_weights_in([projector]).values()), []
    tower = Path(locate(recipe.model.vision))
    files = sorted(tower.glob("*.safetensors"))
    if "vision" in trained_parts(recipe):
        files = [run / "final" / PARTS["vision"]]
    if not files:
        notes.append(f"the size of the vision tower {recipe.model.vision!r} is not known here")
    weights = _weights_in(files)
    # of CLIP and SigLIP with both towers only one is used
    seen = {k: n for k, n in weights.items() if k.startswith("vision_model.")} or weights
    return total + sum(seen.values()), notes


def _weights_in(files: Sequence[Path]) -> dict[str, int]:
    """Number of weights of every tensor."""
    found = {}
    for file in files:
        with safe_open(file, "np") as tensors:
            names = tensors.keys()  # a list: the handle is no mapping
            for name in names:
                found[name] = math.prod(tensors.get_slice(name).get_shape())
    return found


def _first(rows: Sequence[Row], half: str) -> int:
    return next(row.memory for row in rows if row.name.startswith(half))


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
