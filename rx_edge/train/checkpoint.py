"""Save what was trained: safetensors and JSON only, never pickle.

Every write goes to a temporary path and is renamed, so a kill at any moment leaves the last
complete checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rx_edge.atomic import fsync
from rx_edge.model.parts import PARTS, trained_parts
from rx_edge.model.report_model import ReportModel, part_state


def write_json(path: Path, value: Any) -> None:
    """Write JSON durably: temporary file, fsync, rename."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, sort_keys=True)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def save_trained(model: ReportModel, directory: Path, dtype: torch.dtype) -> None:
    """Write what the recipe trains to `directory`, replacing it whole; the adapter is peft's."""
    temporary = directory.with_name(directory.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "adapter").mkdir(parents=True)
    for part in trained_parts(model.recipe):
        metadata = {"format": "pt"} if part == "adapter" else None  # as peft does
        save_file(_cast(part_state(model, part), dtype), temporary / PARTS[part], metadata)
    for file in temporary.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes files private; a run is meant to be exported
        fsync(file)
    config = model.lm.peft_config["default"].to_dict()
    # the machine's cache path is nobody's business, and would differ between machines
    config["base_model_name_or_path"] = model.recipe.model.language
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    plain["inference_mode"] = True
    write_json(temporary / "adapter" / "adapter_config.json", plain)
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
    fsync(directory.parent)


def _cast(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        k: (v.detach().to(dtype) if v.is_floating_point() else v.detach()).contiguous()
        for k, v in state.items()
    }
