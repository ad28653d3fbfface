"""What planted faults share: a fault in the code, small exports, and a manifest made to agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rx_edge.bundle import MANIFEST, describe, image_hash, pairing_hash, prompt_hash
from rx_edge.config import ExportConfig, ImageRecipe, PromptConfig
from rx_edge.config_io import from_mapping

Plant = Callable[[pytest.MonkeyPatch], None]

LEAN = ExportConfig(vision=("onnx:fp32",), language=("gguf:F16",))
SMALL = ExportConfig(vision=("onnx:fp32", "onnx:int8"), language=("gguf:F16", "gguf:Q8_0"))


def agree(root: Path, **changes: Any) -> None:
    """Make the manifest agree with the files, its parts and its pairing included."""
    manifest = json.loads((root / MANIFEST).read_text("utf-8"))
    for key, value in changes.items():
        manifest[key] |= value
    for name in manifest["files"]:
        entry = describe(root / name)
        manifest["files"][name] = {"sha256": entry.sha256, "bytes": entry.bytes}
    manifest["parts"] |= {
        "prompt": prompt_hash(from_mapping(PromptConfig, manifest["prompt"], where="")),
        "image": image_hash(from_mapping(ImageRecipe, manifest["image"], where="")),
        "tokenizer": manifest["files"]["tokenizer.json"]["sha256"],
    }
    old, manifest["pairing"] = manifest["pairing"], pairing_hash(manifest["parts"])
    for name in manifest["files"]:  # the hash inside each artefact: as long as the new one
        if name.endswith((".gguf", ".onnx")):
            content = (root / name).read_bytes()
            (root / name).write_bytes(content.replace(old.encode(), manifest["pairing"].encode()))
            entry = describe(root / name)
            manifest["files"][name] = {"sha256": entry.sha256, "bytes": entry.bytes}
    (root / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
