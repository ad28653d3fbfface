"""Where a step is computed: one process or several (accelerate), in how many passes.

A step's gradient is that of its whole batch, however it is split: every part contributes its sum
of nats over the number of report tokens of the *step*, so that parts and processes need not be
alike. All that follows from the step's reports (who computes what) is worked out by every process
for itself, without talking.

Does not cover: what is minimised (`objective.py`); launching processes (docs/guides/train.md).
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from rx_edge.config import EngineConfig
from rx_edge.errors import TrainingError, UsageError
from rx_edge.train.batching import Example
from rx_edge.train.objective import Objective
from rx_edge.train.packing import packs

# a pass of a process: its reports, and 0 where it only keeps the others company
Pass = tuple[list[Example], float]


class Engine:
    """One process of a training run.

    Attributes:
        main: whether this process writes files and shows progress.
        dtype: of the products, see `EngineConfig.precision`.
    """

    def __init__(self, config: EngineConfig) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        cpu = config.device == "cpu" or not torch.accelerator.is_available()
        self.config = config
        self._ddp = DistributedDataParallelKwargs()
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[self._ddp])
        self.main: bool = self.accelerator.is_main_process
        self.rank: int = self.accelerator.process_index
        self.processes: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.sharded: bool = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        if self.sharded and os.environ.get("FSDP_VERSION", "1") != "2":
            raise UsageError(
                "FSDP 1 is not supported: set fsdp_version: 2 in the accelerate config"
            )
        if self.sharded and config.load_in_4bit:
            raise UsageError("engine.load_in_4bit cannot be sharded: use DDP, or float weights")
        # else transformers leaves weights empty in all processes but one, for accelerate to fill
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        if self.processes != int(os.environ.get("WORLD_SIZE", "1")):
            raise UsageError(
                f"{os.environ['WORLD_SIZE']} processes were launched, but this one runs alone; "
                "launch them with accelerate or torchrun (docs/guides/train.md)"
            )
        wanted = config.precision
        if wanted == "auto":
            wanted = "float32" if self.device.type == "cpu" else "bfloat16"
        self.dtype: torch.dtype = getattr(torch, wanted)

    def wrap(self, objective: Objective, *, some_unused: bool) -> Any:
        """The objective on this process's device, exchanging gradients with the others.

        FSDP replaces the tensors of the model within: collect them for an optimiser afterwards.

        Args:
            some_unused: a trained tensor may get no gradient in a step.
        """
        if self.sharded:
            return self._shard(objective.to(self.device))
        self._ddp.find_unused_parameters = some_unused
        return self.accelerator.prepare(objective)

    def _shard(self, objective: Objective) -> Any:
        """FSDP2, layer by layer of the LM; accelerate's own leaves CPUs out."""
        from torch.distributed.fsdp import fully_shard

        lm = objective.model.lm.get_base_model()
        for module in list(lm.modules()):
            if type(module).__name__ in (lm._no_split_modules or ()):
                fully_shard(module)
        return fully_shard(objective)

    def release(self) -> None:
        """Forget what was wrapped."""
        self.accelerator.free_memory()

    def passes(self, items: Sequence[Example], length: Callable[[Example], int]) -> list[Pass]:
        """This process's passes over `items`, as many as every other process has."""
        shares = [
            self._share(items[rank :: self.processes], length) for rank in range(self.processes)
        ]
        mine = [(reports, 1.0) for reports in shares[self.rank]]
        # FSDP gathers weights in every pass: a process without reports must come along
        company = ([items[0]], 0.0)
        return mine + [company] * (max(map(len, shares)) - len(mine))

    def _share(
        self, items: Sequence[Example], length: Callable[[Example], int]
    ) -> list[list[Example]]:
        n, parts = len(items), self.config.accumulate
        cuts = [n * i // parts for i in range(parts + 1)]
        split = [list(items[a:b]) for a, b in itertools.pairwise(cuts) if b > a]
        if not self.config.packing:
            return split
        limit = self.config.pack_tokens
        return [row for part in split for row in packs(part, [length(e) for e in part], limit)]

    def gradients(self, objective: Any, passes: Sequence[Pass], tokens: int) -> float:
        """Backward through all passes; the step's loss in nats per token, of all processes.

        Args:
            tokens: report tokens of the whole step.
        """
        nats = torch.zeros((), dtype=torch.float64)
        for number, (items, weight) in enumerate(passes, 1):
            with self._exchanging(objective, now=number == len(passes)):
                found = objective(items) * weight
                # processes average their gradients, but this is a sum
                (found * (self.processes / tokens)).backward()
            nats += found.detach().double().cpu()
        return self.total(nats) / tokens

    @torch.no_grad()
    def loss(self, objective: Any, passes: Sequence[Sequence[Pass]], tokens: int) -> float:
        """Mean nats per token without gradients, of all processes."""
        nats = torch.zeros((), dtype=torch.float64)
        for items, weight in (one for step in passes for one in step):
            nats += weight * objective(items).double().cpu()
        return self.total(nats) / tokens

    def clip(self, parameters: Sequence[torch.nn.Parameter], limit: float) -> float:
        """Clip the gradient's norm over all parameters; the norm before."""
        return float(self.accelerator.clip_grad_norm_(parameters, limit))

    def total(self, value: torch.Tensor) -> float:
        """Sum of a scalar over processes."""
        if self.processes == 1:
            return float(value)
        return float(self.accelerator.reduce(value.to(self.device), "sum"))

    def gather(self, value: Any) -> list[Any]:
        """One picklable value of every process, by rank."""
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes through the body before the others."""
        with self.accelerator.main_process_first():
            yield

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _exchanging(self, objective: Any, now: bool) -> Iterator[None]:
        """Gradients are exchanged once per step, in its last pass."""
        if self.sharded:
            objective.set_requires_gradient_sync(now)
            yield
            return
        with contextlib.nullcontext() if now else self.accelerator.no_sync(objective):
            yield


def finite(loss: float, norm: float, stage: str, step: int, rate: float) -> None:
    """Refuse a step that would spoil the weights.

    Raises:
        TrainingError: the loss or the gradient's norm is not finite.
    """
    for what, value in (("loss", loss), ("gradient's norm", norm)):
        if not torch.isfinite(torch.tensor(value)):
            raise TrainingError(
                f"stage {stage!r}: the {what} is {value} at step {step}; lower learning_rate "
                f"(now {rate}) and start a new run; the weights were not changed by this step"
            )
