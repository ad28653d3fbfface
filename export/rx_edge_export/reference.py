"""Golden vectors: what the trained model (torch, fp32, adapter unmerged) says of canary studies.

Each canary is an image file plus `<name>.safetensors`: the image tensor, soft prompt, prefill
logits with and without the adapter, and the greedy tokens with the margin of each. `verify.py`
compares a bundle with them on any machine, without torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from rx_edge import image
from rx_edge.errors import UsageError
from rx_edge.model.report_model import ReportModel
from rx_edge.radiograph import open_radiograph
from rx_edge.types import ImageTensor, Radiograph
from rx_edge_export import phantom

GREEDY_TOKENS = 32
# both polarities, so that one of them exposes a reader that inverts never or always
_PHANTOMS: tuple[tuple[str, int, phantom.Photometric], ...] = (
    ("phantom-mono1", 1, "MONOCHROME1"),
    ("phantom-mono2", 2, "MONOCHROME2"),
)


@dataclass(frozen=True)
class Canary:
    """One golden study. `file` names the image, `golden` the vectors, both inside the bundle."""

    name: str
    file: str
    golden: str
    soft_prompt: torch.Tensor  # (N, D)
    logits: torch.Tensor  # (V,)


def write_canaries(model: ReportModel, root: Path, extra: Sequence[Path]) -> list[Canary]:
    """Write phantoms and `extra` studies with their golden vectors below `root`/golden.

    Raises:
        UsageError: two extra studies share a name.
        InputError: an extra study is no chest radiograph.
    """
    directory = root / "golden"
    directory.mkdir()
    canaries = []
    for name, seed, photometric in _PHANTOMS:
        file, pixels = directory / f"{name}.dcm", phantom.display(seed)
        phantom.write_dicom(file, pixels, photometric)
        # from the known display values, not through the DICOM reader that is to be tested
        known = Radiograph(pixels, image.pixel_sha256(pixels))
        canaries.append(_write(model, file, image.prepare(known, model.recipe.image)))
    for study in extra:
        file = directory / study.name
        if file.exists():
            raise UsageError(f"canary {study.name!r} is named twice")
        shutil.copyfile(study, file)
        radiograph = open_radiograph(file)
        canaries.append(_write(model, file, image.prepare(radiograph, model.recipe.image)))
    return canaries


@torch.inference_mode()
def _write(model: ReportModel, file: Path, pixels: ImageTensor) -> Canary:
    soft = model.encoder(torch.from_numpy(pixels))[0]
    tokens = model.greedy(soft, GREEDY_TOKENS)
    logits = model.teacher_forced(soft, tokens)  # (1 + T, V)
    with model.adapter_off():
        base = model.teacher_forced(soft, [])[0]
    # the last row predicts what comes after `tokens`: the end, or a token beyond the limit
    best = logits.topk(2, dim=-1)
    save_file(
        {
            "pixels": pixels,
            "soft_prompt": soft.numpy().copy(),
            "logits": logits[0].numpy().copy(),
            "logits_without_adapter": base.numpy().copy(),
            "tokens": np.asarray(tokens, np.int32),
            "best": best.indices[:, 0].numpy().astype(np.int32),
            "margins": (best.values[:, 0] - best.values[:, 1]).numpy().copy(),
        },
        file.with_suffix(".safetensors"),
    )
    file.with_suffix(".safetensors").chmod(0o644)  # safetensors makes files private
    return Canary(
        name=file.stem,
        file=f"golden/{file.name}",
        golden=f"golden/{file.stem}.safetensors",
        soft_prompt=soft,
        logits=logits[0],
    )
