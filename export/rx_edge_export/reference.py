"""What the trained model (torch, fp32, adapter unmerged) says: golden vectors and drafts.

Each canary is an image file plus `<name>.safetensors`: the image tensor, soft prompt, prefill
logits with and without what training changed in the language model, and the greedy tokens with the
margin of each. `verify.py` compares a bundle with them on any machine, without torch; `golden.py`
says what a canary study is. Drafts of calibration studies stay on the exporting machine: their
images may not be passed on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from rx_edge import image
from rx_edge.bundle import SCHEMA, schema_for
from rx_edge.errors import UsageError
from rx_edge.model.language import load_language
from rx_edge.model.parts import trained_parts
from rx_edge.model.report_model import ReportModel, greedy_batch
from rx_edge.prompting import takes_indication
from rx_edge.radiograph import open_radiograph
from rx_edge.runtime.self_check import INDICATION, golden_indication
from rx_edge.types import FloatArray, ImageTensor, Radiograph
from rx_edge_export import golden, phantom
from rx_edge_export.calibration import Study
from rx_edge_export.golden import DRAFT_TOKENS, GREEDY_TOKENS, Drafts, golden_file

BATCH = 8  # calibration studies at once
# both polarities, so that one of them exposes a reader that inverts never or always
_PHANTOMS: tuple[tuple[str, int, phantom.Photometric], ...] = (
    ("phantom-mono1", 1, "MONOCHROME1"),
    ("phantom-mono2", 2, "MONOCHROME2"),
)


@dataclass(frozen=True)
class Canary:
    """One golden study: its image file inside the bundle, and what merging is compared with."""

    file: str
    soft_prompt: torch.Tensor  # (V * N, D)
    logits: torch.Tensor  # (V,)
    indication: str


def read_canaries(root: Path, files: Sequence[str]) -> list[Canary]:
    """Read back what `write_canaries` wrote."""
    found = []
    for file in files:
        vectors = load_file(root / golden_file(file))
        soft, logits = (torch.from_numpy(vectors[k]) for k in ("soft_prompt", "logits"))
        found.append(Canary(file, soft, logits, golden_indication(vectors)))
    return found


def write_canaries(model: ReportModel, root: Path, extra: Sequence[Path]) -> list[str]:
    """Write phantoms and `extra` studies with their golden vectors below `root`/golden.

    Returns:
        The image files, relative to `root`.

    Raises:
        UsageError: two extra studies share a name.
        InputError: an extra study is no chest radiograph.
    """
    directory, recipe = root / "golden", model.recipe.image
    directory.mkdir()
    pixels: dict[str, ImageTensor] = {}
    for name, seed, photometric in _PHANTOMS:
        file, display = directory / f"{name}.dcm", phantom.display(seed)
        phantom.write_dicom(file, display, photometric)
        # from the known display values, not through the DICOM reader that is to be tested
        known = Radiograph(display, image.pixel_sha256(display))
        pixels[f"golden/{file.name}"] = image.prepare(known, recipe)
    for study in extra:
        file = directory / study.name
        if file.exists():
            raise UsageError(f"canary {study.name!r} is named twice")
        shutil.copyfile(study, file)
        pixels[f"golden/{file.name}"] = image.prepare(open_radiograph(file), recipe)
    canaries, untrained = list(pixels), _untrained(model)
    for canary in canaries:
        seen = [pixels[name] for name in golden.views(model.recipe.prompt, canaries, canary)]
        _write(model, untrained, root / golden_file(canary), np.concatenate(seen))
    return canaries


Untrained: TypeAlias = Callable[[torch.Tensor, str], torch.Tensor]


def _untrained(model: ReportModel) -> Untrained:
    """Soft prompt (N, D) and indication -> the logits (V,) that the base language model gives."""
    if "language" not in trained_parts(model.recipe):

        def adapter_off(soft: torch.Tensor, indication: str) -> torch.Tensor:
            with model.adapter_off():
                return model.teacher_forced(soft, [], indication)[0]

        return adapter_off
    base = load_language(model.recipe.model.language)  # `model` holds the trained weights only

    def from_disk(soft: torch.Tensor, indication: str) -> torch.Tensor:
        prompt = model.prompt_for(indication)
        before, after = (
            base.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
            for ids in (prompt.before, prompt.after)
        )
        embeds = torch.cat([before, soft, after])[None]
        logits: torch.Tensor = base(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits
        return logits[0, -1]

    return from_disk


@torch.inference_mode()
def _write(model: ReportModel, untrained: Untrained, out: Path, pixels: FloatArray) -> None:
    """The vectors of one canary study, of its images (V, 3, S, S)."""
    prompt, one_by_one = model.recipe.prompt, model.encoder(torch.from_numpy(pixels))
    asked = golden.ASKED if takes_indication(prompt) else ""
    soft = one_by_one.flatten(0, 1)
    tokens = model.greedy(soft, GREEDY_TOKENS, asked)
    logits = model.teacher_forced(soft, tokens, asked)  # (1 + T, V)
    # the last row predicts what comes after `tokens`: the end, or a token beyond the limit
    best = logits.topk(2, dim=-1)
    vectors = {
        "pixels": pixels,
        "soft_prompt": soft.numpy().copy(),
        "logits": logits[0].numpy().copy(),
        "logits_without_adapter": untrained(soft, asked).numpy().copy(),
        "tokens": np.asarray(tokens, np.int32),
        "best": best.indices[:, 0].numpy().astype(np.int32),
        "margins": (best.values[:, 0] - best.values[:, 1]).numpy().copy(),
    }
    if asked:
        vectors[INDICATION] = golden.as_vector(asked)
    if schema_for(prompt) > SCHEMA:
        vectors[golden.PLAIN] = model.teacher_forced(one_by_one[0], [])[0].numpy().copy()
    save_file(vectors, out)
    out.chmod(0o644)  # safetensors makes files private


def draft(
    model: ReportModel, studies: Sequence[Study], tick: Callable[[int], None] = lambda _: None
) -> Drafts:
    """Draft every study, several at a time."""
    soft: list[torch.Tensor] = []
    said: list[tuple[list[int], list[float]]] = []
    for first in range(0, len(studies), BATCH):
        some = studies[first : first + BATCH]
        pixels = np.concatenate([s.pixels for s in some])
        with torch.inference_mode():
            encoded = model.encoder(torch.from_numpy(pixels)).split([len(s.pixels) for s in some])
        soft += [views.flatten(0, 1) for views in encoded]
        asked = [s.indication for s in some]
        said += greedy_batch(model, soft[first:], DRAFT_TOKENS, asked)
        tick(len(said))
    return Drafts(
        names=tuple(s.name for s in studies),
        pixels=tuple(s.pixels for s in studies),
        soft_prompts=tuple(one.numpy() for one in soft),
        tokens=tuple(tuple(ids) for ids, _ in said),
        margins=tuple(tuple(margins) for _, margins in said),
        indications=tuple(s.indication for s in studies),
    )
