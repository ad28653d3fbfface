"""A training run: torch in float32, the adapter unmerged. The only module here that needs torch.

Does not cover: GPUs; a run is evaluated on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rx_edge import image as images
from rx_edge.evaluate.systems import Prompted, Settings
from rx_edge.guards import check_image
from rx_edge.model.digest import weights_digest
from rx_edge.model.report_model import greedy_batch, load_run
from rx_edge.optional import require
from rx_edge.prompting import fitted_indication
from rx_edge.radiograph import open_radiograph
from rx_edge.types import SoftPrompt, StudyInput

BATCH = 8  # drafts that grow together


class RunSystem:
    """See `rx_edge.evaluate.systems.System`."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._torch = require("torch", extra="train")
        if settings.threads:
            self._torch.set_num_threads(settings.threads)
        self._model = load_run(path)
        self._limit = settings.max_new_tokens
        self.prompt = self._model.recipe.prompt
        self.about: dict[str, Any] = {
            "kind": "run",
            "label": path.resolve().name,
            "model": self._model.recipe.name,
            "encoder_sha256": weights_digest(self._model.encoder),
            "language": "torch float32, adapter unmerged",
        }

    def encode(self, study: StudyInput) -> Prompted:
        """Its V images -> (V N, D_lm), with the indication fitted."""
        indication, _ = fitted_indication(self._model.tokenizer, study.indication)
        radiographs = [open_radiograph(path) for path in study.images]
        for radiograph in radiographs:
            check_image(radiograph)  # refuses what the bundle refuses
        recipe = self._model.recipe.image
        pixels = np.concatenate([images.prepare(one, recipe) for one in radiographs])
        with self._torch.inference_mode():
            encoded = self._model.encoder(self._torch.from_numpy(pixels))  # (V, N, D_lm)
        soft: SoftPrompt = encoded.flatten(0, 1).numpy()
        return Prompted(soft, indication)

    def write(self, prompts: Sequence[Prompted]) -> list[str]:
        """Greedy drafts, `BATCH` at a time."""
        texts: list[str] = []
        for start in range(0, len(prompts), BATCH):
            some = prompts[start : start + BATCH]
            soft = [self._torch.from_numpy(one.soft) for one in some]
            told = [one.indication for one in some]
            for ids, _ in greedy_batch(self._model, soft, self._limit, told):
                texts.append(self._model.tokenizer.decode(ids, skip_special_tokens=True).strip())
        return texts

    def __enter__(self) -> RunSystem:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """Nothing is held but memory."""
        del self._model
