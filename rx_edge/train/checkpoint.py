"""Save and load what training needs: safetensors and JSON only, never pickle.

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
from safetensors.torch import load_file, save_file

from rx_edge.errors import TrainingError
from rx_edge.model.report_model import ReportModel, adapter_state


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
    """Write projector and adapter (peft's format) to `directory`, replacing it whole."""
    temporary = directory.with_name(directory.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "adapter").mkdir(parents=True)
    save_file(_cast(model.projector.state_dict(), dtype), temporary / "projector.safetensors")
    save_file(
        _cast(adapter_state(model.lm), dtype),
        temporary / "adapter" / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    for file in temporary.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes files private; a run is meant to be exported
    config = model.lm.peft_config["default"].to_dict()
    # the machine's cache path is nobody's business, and would differ between machines
    config["base_model_name_or_path"] = model.recipe.model.language
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    plain["inference_mode"] = True
    write_json(temporary / "adapter" / "adapter_config.json", plain)
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)


def save_progress(
    directory: Path, model: ReportModel, optimiser: torch.optim.Optimizer, step: int
) -> None:
    """A resumable point: trained tensors, optimiser moments, random state, step."""
    state = {f"projector/{k}": v for k, v in model.projector.state_dict().items()}
    state |= {f"adapter/{k}": v for k, v in adapter_state(model.lm).items()}
    for index, moments in optimiser.state_dict()["state"].items():
        state |= {f"optimiser/{index}/{k}": torch.as_tensor(v) for k, v in moments.items()}
    state["random"] = torch.get_rng_state()
    temporary = directory / "progress.part"
    save_file(
        {k: v.detach().clone().contiguous() for k, v in state.items()},
        temporary,
        metadata={"step": str(step)},
    )
    temporary.replace(directory / "progress.safetensors")


def load_progress(directory: Path, model: ReportModel, optimiser: torch.optim.Optimizer) -> int:
    """Restore the last resumable point; 0 when there is none.

    Raises:
        TrainingError: the checkpoint does not fit this recipe.
    """
    from safetensors import safe_open

    path = directory / "progress.safetensors"
    if not path.is_file():
        return 0
    state = load_file(path)
    with safe_open(path, "pt") as stream:
        step = int(stream.metadata()["step"])
    try:
        model.projector.load_state_dict(_below(state, "projector/"), strict=True)
        with torch.no_grad():
            for key, target in adapter_state(model.lm).items():
                target.copy_(state[f"adapter/{key}"])
    except (KeyError, RuntimeError) as error:
        raise TrainingError(
            f"{str(path)!r} does not fit the recipe; start the run in a new directory"
        ) from error
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in _below(state, "optimiser/").items():
        index, _, name = key.partition("/")
        moments.setdefault(int(index), {})[name] = value
    whole = optimiser.state_dict()
    whole["state"] = moments
    optimiser.load_state_dict(whole)
    torch.set_rng_state(state["random"])
    return step


def _below(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def _cast(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {k: v.detach().to(dtype).contiguous() for k, v in state.items()}
