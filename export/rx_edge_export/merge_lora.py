"""Fold the adapter into float32 weights, tensor by tensor; prove that nothing was lost or added.

Merging happens in float32 and before any quantisation: an adapter merged into quantised weights
loses its small updates. The base checkpoint is read one tensor at a time and the result written in
shards, so that memory does not grow with the model; a language model that was trained itself is
taken from memory instead, so that its base cannot be shipped by mistake. The arithmetic,
W + alpha / r * B A, is our own on purpose: the comparison with peft's unmerged forward pass is then
between two codes.

Does not cover: writing a deployed format.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rx_edge.bundle import StageResult
from rx_edge.config import LoraSettings
from rx_edge.errors import ExportError
from rx_edge.model.parts import trained_parts
from rx_edge.model.report_model import ReportModel, adapter_state, part_state
from rx_edge_export import tolerances
from rx_edge_export.llm_gguf import locate_tensors
from rx_edge_export.reference import Canary

SHARD = 1 << 30  # bytes of a shard of the merged weights
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def merge(model: ReportModel, out: Path, canaries: Sequence[Canary]) -> list[StageResult]:
    """Merge, compare with the unmerged logits, and leave a Hugging Face directory.

    The merged weights replace those of `model`, because a second model would not fit beside it.

    Returns:
        One "merge" result per canary; the caller decides on failures.

    Raises:
        ExportError: adapter and base do not fit, or tokenizer files cannot be copied.
    """
    base = model.tokenizer_path.parent
    out.mkdir(parents=True)
    lm = model.lm.get_base_model()
    lm.config.save_pretrained(out)
    for name in _TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    if not (out / "tokenizer.json").is_file():
        raise ExportError(f"{str(base)!r} has no tokenizer.json to ship")
    trained = None
    if "language" in trained_parts(model.recipe):
        trained = part_state(model, "language").items()
    write(base, adapter_state(model.lm), model.recipe.lora, out, trained)
    _load_into(lm, out)
    return [_compare(model, canary) for canary in canaries]


def write(
    base: Path,
    adapter: Mapping[str, torch.Tensor],
    settings: LoraSettings,
    out: Path,
    trained: Iterable[tuple[str, torch.Tensor]] | None = None,
) -> None:
    """Write the merged weights of `base` into the directory `out`, in float32 shards.

    Args:
        adapter: peft's tensors by the names that it saves them by.
        trained: names and float32 values of all weights, instead of those in `base`.

    Raises:
        ExportError: an adapter tensor belongs to no weight of the base, or does not fit it.
    """
    left = set(adapter)
    transposed = _family(base) == "gpt2"  # its Conv1D keeps (in, out)
    shards: list[dict[str, torch.Tensor]] = [{}]
    names: list[list[str]] = []
    size = total = 0
    for name, weight in _tensors(base) if trained is None else trained:
        weight = weight + _update(name, weight, adapter, settings, left, transposed)
        if size and size + weight.nbytes > SHARD:
            names.append(_save(shards.pop(), out, len(names)))
            shards.append({})
            size = 0
        shards[-1][name] = weight.contiguous()
        size += weight.nbytes
        total += weight.nbytes
    names.append(_save(shards.pop(), out, len(names)))
    if left:
        raise ExportError(
            f"adapter tensor {min(left)!r} (and {len(left) - 1} more) belongs to no weight of the "
            "base model; train and export with the same base"
        )
    _index(names, total, out)


def _tensors(base: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and float32 values of a checkpoint, one at a time."""
    where = locate_tensors(base)
    # the published GPT-2 checkpoints leave the prefix out
    prefix = _family(base) == "gpt2" and "wte.weight" in where
    for name, file in sorted(where.items()):
        with safe_open(file, "pt") as tensors:
            weight: torch.Tensor = tensors.get_tensor(name).float()
        yield (f"transformer.{name}" if prefix else name), weight


def _family(directory: Path) -> str:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return str(config.get("model_type"))


def _update(
    name: str,
    weight: torch.Tensor,
    adapter: Mapping[str, torch.Tensor],
    settings: LoraSettings,
    left: set[str],
    transposed: bool,
) -> torch.Tensor:
    """alpha / r * B A of one weight, or 0; takes what it uses out of `left`."""
    module = f"base_model.model.{name.removesuffix('.weight')}"
    keys = [f"{module}.lora_{part}.weight" for part in "BA"]
    if keys[0] not in adapter:
        return torch.zeros(())
    left.difference_update(keys)
    b, a = (adapter[key].float() for key in keys)  # (out, r), (r, in)
    update = (b @ a) * (settings.alpha / settings.r)
    if transposed:
        update = update.T
    if update.shape != weight.shape:
        raise ExportError(
            f"the adapter of {name} is {tuple(update.shape)}, the weight {tuple(weight.shape)}"
        )
    return update


def _save(shard: dict[str, torch.Tensor], out: Path, number: int) -> list[str]:
    save_file(shard, out / f"part-{number}.safetensors", metadata={"format": "pt"})
    return list(shard)


def _index(names: Sequence[Sequence[str]], total: int, out: Path) -> None:
    """Give the shards their usual names, now that their number is known."""
    if len(names) == 1:
        (out / "part-0.safetensors").rename(out / "model.safetensors")
        return
    weight_map = {}
    for number, keys in enumerate(names):
        file = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (out / f"part-{number}.safetensors").rename(out / file)
        weight_map.update(dict.fromkeys(keys, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")


@torch.no_grad()
def _load_into(lm: torch.nn.Module, merged_dir: Path) -> None:
    """Replace the weights of a peft-wrapped LM, in place, by the merged ones from disk."""
    parameters = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in lm.named_parameters()
        if ".lora_" not in name
    }
    for name, weight in _tensors(merged_dir):
        target = parameters.pop(name, None)
        if target is not None:  # a tied head is stored twice by some writers
            target.copy_(weight)
    if parameters:
        raise ExportError(f"merging lost {len(parameters)} tensor(s), e.g. {min(parameters)!r}")


@torch.inference_mode()
def _compare(model: ReportModel, canary: Canary) -> StageResult:
    with model.adapter_off():  # the base weights are the merged ones now
        found = model.teacher_forced(canary.soft_prompt, [], canary.indication)[0]
    error = float((found - canary.logits).abs().max() / canary.logits.abs().max())
    return StageResult(
        stage="merge",
        artifact="merged float32 weights",
        canary=canary.file,
        metric="max",
        value=error,
        tolerance=tolerances.MERGE,
        passed=bool(error <= tolerances.MERGE),
    )
