"""Patch features of a batch's images: of a frozen vision tower computed once and kept, or live.

The key is pixel hash + tower weights + image recipe: another image, another tower or another
preprocessing never finds an old entry. One .safetensors file per image, written by rename, so
an interrupted run keeps what it has. Only keys stay in memory; the system's page cache holds as
many files as there is room for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rx_edge import image
from rx_edge.config import ImageRecipe
from rx_edge.config_io import to_mapping
from rx_edge.model.digest import weights_digest
from rx_edge.model.vision import VisionTower
from rx_edge.radiograph import open_radiograph

Features = Callable[[Sequence[Path]], torch.Tensor]  # images -> (B, P, C) float32


class FeatureCache:
    """`Features` of a tower that does not change.

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
        self._files: dict[Path, Path] = {}  # reading an image again only to hash it is slow
        directory.mkdir(parents=True, exist_ok=True)

    def fill(self, paths: Sequence[Path]) -> None:
        """Compute what is missing."""
        for path in paths:
            self._file(path)

    def __call__(self, paths: Sequence[Path]) -> torch.Tensor:
        """Features (B, P, C) of the images."""
        return torch.stack([self[path] for path in paths])

    def __getitem__(self, path: Path) -> torch.Tensor:
        """Features (P, C) of one image."""
        features: torch.Tensor = load_file(self._file(path))["features"]
        return features

    @torch.inference_mode()
    def _file(self, path: Path) -> Path:
        if path not in self._files:
            radiograph = open_radiograph(path)
            key = hashlib.sha256((radiograph.pixel_sha256 + self.context).encode()).hexdigest()
            file = self.directory / f"{key}.safetensors"
            if not file.is_file():
                pixels = torch.from_numpy(image.prepare(radiograph, self.recipe))
                temporary = file.with_suffix(".part")
                device = next(self.tower.parameters()).device
                found = self.tower(pixels.to(device))[0].contiguous().cpu()
                save_file({"features": found}, temporary)
                temporary.replace(file)
            self._files[path] = file
        return self._files[path]


def live(tower: VisionTower, recipe: ImageRecipe) -> Features:
    """`Features` of a tower that a stage trains: through the tower every time, with gradients."""

    def features(paths: Sequence[Path]) -> torch.Tensor:
        pixels = [torch.from_numpy(image.prepare(open_radiograph(p), recipe)) for p in paths]
        out: torch.Tensor = tower(torch.cat(pixels).to(next(tower.parameters()).device))
        return out

    return features
