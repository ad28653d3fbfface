"""CheXbert, RadGraph, RadCliQ and GREEN through RadEval >= 2 (Xu et al. 2025), where it is at hand.

Their weights are gigabytes on model hubs; nothing is downloaded here: RadEval is opened with the
Hugging Face hub switched off, so that weights must be in its cache already.

Does not cover: intervals and p-values of these figures.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rx_edge.errors import ModelError, UsageError
from rx_edge.optional import require

KEYS = {"chexbert": "f1chexbert", "radgraph": "radgraph", "radcliq": "radcliq", "green": "green"}
INSTRUCTION = (
    'pip install "rx-edge[radeval]", and run RadEval once on two sentences where there is a '
    "network, so that the weights lie in the Hugging Face cache"
)


def check(names: Sequence[str]) -> None:
    """Refuse unknown names.

    Raises:
        UsageError: one is not in `KEYS`.
    """
    for name in names:
        if name not in KEYS:
            raise UsageError(f"--radeval is {name!r}; valid: {', '.join(KEYS)}")


def missing(name: str, asked: bool) -> str | None:
    """Why metric `name` will not be there, in one sentence; None when it can be tried."""
    if not asked:
        return f"not asked for: --radeval {name}"
    if importlib.util.find_spec("radeval") is None:
        return f"RadEval is not installed: {INSTRUCTION}"
    return None


def score(name: str, references: Sequence[str], drafts: Sequence[str]) -> dict[str, float]:
    """RadEval's own figures of one metric, by its names.

    Raises:
        MissingExtraError: RadEval is not installed.
        ModelError: it does not open, mostly because its weights are absent.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
    package = require("radeval", extra="radeval")
    try:
        found = package.RadEval(metrics=[KEYS[name]])(refs=list(references), hyps=list(drafts))
    except Exception as error:  # whatever its dependencies raise, the other metrics go on
        kind = type(error).__name__  # its message may quote a report
        raise ModelError(f"RadEval cannot compute {name} ({kind}): {INSTRUCTION}") from error
    return dict(_numbers(found, ""))


def _numbers(found: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in found.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)
