"""Write a tiny model as GGUF, and compare its logits with torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rx_edge.backends import llm_gguf as reader
from rx_edge_export import llm_gguf as writer

IDS = np.arange(3, 60, dtype=np.int32)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text("utf-8"))
    change(data)
    path.write_text(json.dumps(data), "utf-8")


def export(directory: Path, out: Path, dtype: Any = "f32") -> dict[str, Any]:
    return writer.write(directory, out, dtype=dtype, name="tiny")


def gguf_logits(path: Path) -> Any:
    with reader.open(path, n_ctx=128, threads=1, exact=True) as backend:
        return backend.step(IDS)


def torch_logits(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()[None]).logits[0].numpy()


def distance(a: Any, b: Any) -> float:
    return float(np.abs(a - b).max())
