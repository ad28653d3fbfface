"""Fold the adapter into float32 weights and prove that nothing was lost or added.

Merging happens in float32 and before any quantisation: an adapter merged into quantised weights
loses its small updates.

Does not cover: writing a deployed format.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from rx_edge.bundle import StageResult
from rx_edge.errors import ExportError
from rx_edge.model.language import merged
from rx_edge.model.report_model import ReportModel
from rx_edge_export import tolerances
from rx_edge_export.reference import Canary

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def merge(model: ReportModel, out: Path, canaries: Sequence[Canary]) -> list[StageResult]:
    """Merge, compare with the unmerged logits, and write a Hugging Face directory.

    `model.lm` is replaced by the merged LM: the adapter cannot be switched off any more.

    Returns:
        One "merge" result per canary; the caller decides on failures.

    Raises:
        ExportError: adapter tensors remain, or the tokenizer files cannot be copied.
    """
    model.lm = merged(model.lm)
    results = [_compare(model, canary) for canary in canaries]
    model.lm.save_pretrained(out)
    source = model.tokenizer_path.parent
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if not (out / "tokenizer.json").is_file():
        raise ExportError(f"{str(source)!r} has no tokenizer.json to ship")
    return results


@torch.inference_mode()
def _compare(model: ReportModel, canary: Canary) -> StageResult:
    found = model.teacher_forced(canary.soft_prompt, [])[0]
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
