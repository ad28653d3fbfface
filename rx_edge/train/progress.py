"""A resumable point in the middle of a stage: safetensors only, never pickle, replaced by rename.

It holds all that the rest of the stage depends on, so that a run that was killed ends with the
same bits: trained tensors, optimiser moments, the random state of every process, and `Point`.

Does not cover: the trained weights of a finished stage (`checkpoint.py`).
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from rx_edge.atomic import replacing
from rx_edge.errors import TrainingError
from rx_edge.train.engine import Engine

State = dict[str, torch.Tensor]
Trained = Mapping[str, torch.nn.Parameter]  # the stage's trained tensors, in the optimiser's order

_FILE = "progress.safetensors"


@dataclass
class Point:
    """Where a stage is.

    Attributes:
        step: optimiser steps done.
        best: lowest validation loss so far; None before the first.
        since_best: validations since then.
    """

    step: int = 0
    best: float | None = None
    since_best: int = 0


def save_progress(
    directory: Path, trained: Trained, optimiser: Any, point: Point, engine: Engine
) -> None:
    """Write the resumable point durably; every process must call it, the main one writes."""
    state = {f"trained/{name}": whole(p) for name, p in trained.items()}
    for index, moments in optimiser.state_dict()["state"].items():
        state |= {f"optimiser/{index}/{k}": whole(torch.as_tensor(v)) for k, v in moments.items()}
    for rank, found in enumerate(engine.gather(_random_state(engine))):
        state |= {f"random/{rank}/{name}": value for name, value in found.items()}
    if engine.main:
        metadata = {"point": json.dumps(dataclasses.asdict(point))}
        _write(directory / _FILE, state, metadata)


def load_progress(directory: Path, trained: Trained, optimiser: Any, engine: Engine) -> Point:
    """Restore the last resumable point, or start at step 0.

    Raises:
        TrainingError: the checkpoint does not fit this recipe or this number of processes.
    """
    path = directory / _FILE
    if not path.is_file():
        return Point()
    state = load_file(path)
    with safe_open(path, "pt") as stream:
        metadata = stream.metadata() or {}
    processes = len({key.split("/")[1] for key in state if key.startswith("random/")})
    if processes != engine.processes:
        raise TrainingError(
            f"{str(path)!r} was written by {processes} processes and would go on differently with "
            f"{engine.processes}; resume with {processes}"
        )
    try:
        _copy(trained, _below(state, "trained/"))
        point = Point(**json.loads(metadata["point"]))
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise TrainingError(
            f"{str(path)!r} does not fit the recipe; start the run in a new directory"
        ) from error
    _load_moments(optimiser, list(trained.values()), _below(state, "optimiser/"))
    _set_random_state(_below(state, f"random/{engine.rank}/"), engine)
    return point


def save_best(directory: Path, trained: Trained, engine: Engine) -> None:
    """Write the trained tensors alone; every process must call it."""
    state = {name: whole(p) for name, p in trained.items()}
    if engine.main:
        _write(directory / "best.safetensors", state, {})


def load_best(directory: Path, trained: Trained) -> None:
    """Load what `save_best` wrote last."""
    _copy(trained, load_file(directory / "best.safetensors"))


def clean(directory: Path) -> None:
    """Remove the points of a finished stage, and what a kill left half-written."""
    for file in (*directory.glob(".*.safetensors-*"), *directory.glob("*.safetensors")):
        file.unlink()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A detached copy in main memory, put together from all processes where it is sharded."""
    value = tensor.detach()
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.cpu().clone().contiguous()


def _write(path: Path, state: State, metadata: dict[str, str]) -> None:
    with replacing(path) as part:
        save_file(state, part, metadata=metadata)


@torch.no_grad()
def _copy(trained: Trained, state: State) -> None:
    if trained.keys() != state.keys():
        raise KeyError(*(trained.keys() ^ state.keys()))
    for name, parameter in trained.items():
        parameter.copy_(_like(parameter, state[name]))


def _load_moments(optimiser: Any, parameters: list[torch.nn.Parameter], state: State) -> None:
    moments: dict[int, State] = {}
    for key, value in state.items():
        index, _, name = key.partition("/")
        parameter = parameters[int(index)]
        moments.setdefault(int(index), {})[name] = (
            _like(parameter, value) if value.shape == parameter.shape else value
        )
    found = optimiser.state_dict()
    found["state"] = moments
    optimiser.load_state_dict(found)


def _like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` on the parameter's device, sharded as it is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def _random_state(engine: Engine) -> State:
    python = json.dumps(random.getstate()).encode()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.frombuffer(bytearray(python), dtype=torch.uint8),
    }
    if engine.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(engine.device)
    return state


def _set_random_state(state: State, engine: Engine) -> None:
    version, numbers, gauss = json.loads(bytes(state["python"].tolist()))
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and engine.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], engine.device)


def _below(state: State, prefix: str) -> State:
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
