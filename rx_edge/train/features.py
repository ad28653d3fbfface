"""Patch features of a frozen vision tower, computed once and kept.

The key is pixel hash + tower weights + image recipe: another image, another tower or another
preprocessing never finds an old entry. One .safetensors file per image, written by rename, so
an interrupted run keeps what it has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rx_edge import image
from rx_edge.config import ImageRecipe, to_mapping
from rx_edge.model.digest import weights_digest
from rx_edge.model.vision import VisionTower
from rx_edge.radiograph import open_radiograph


class FeatureCache:
    """Features (P, C) float32 by image path.

    Args:
        directory: where the files go; may be shared between runs.
    """

    def __init__(self, directory: Path, tower: VisionTower, recipe: ImageRecipe) -> None:
        self.directory = directory
        self.tower = tower
        self.recipe = recipe
        self.context = hashlib.sha256(
            (weights_digest(tower) + json.dumps(to_mapping(recipe), sort_keys=True)).encode()
        ).hexdigest()
        self._known: dict[Path, torch.Tensor] = {}
        directory.mkdir(parents=True, exist_ok=True)

    def fill(self, paths: list[Path], tick: Callable[[], None] = lambda: None) -> None:
        """Compute what is missing; `tick` is called once per image."""
        for path in paths:
            self[path]
            tick()

    def __getitem__(self, path: Path) -> torch.Tensor:
        if path not in self._known:
            self._known[path] = self._load(path)
        return self._known[path]

    @torch.inference_mode()
    def _load(self, path: Path) -> torch.Tensor:
        radiograph = open_radiograph(path)
        key = hashlib.sha256((radiograph.pixel_sha256 + self.context).encode()).hexdigest()
        file = self.directory / f"{key}.safetensors"
        if not file.is_file():
            pixels = torch.from_numpy(image.prepare(radiograph, self.recipe))
            temporary = file.with_suffix(".part")
            save_file({"features": self.tower(pixels)[0].contiguous()}, temporary)
            temporary.replace(file)
        features: torch.Tensor = load_file(file)["features"]
        return features
