"""A resumable point in the middle of a stage: safetensors only, never pickle, replaced by rename.

Does not cover: the trained weights of a finished stage (`checkpoint.py`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rx_edge.errors import TrainingError
from rx_edge.model.report_model import ReportModel, adapter_state


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
