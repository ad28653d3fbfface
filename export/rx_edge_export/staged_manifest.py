"""The manifest and SBOM of a staged bundle: what is in it, and where it came from.

Does not cover: making the parts (`artifacts.py`) and verifying them (`verify.py`).
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import rx_edge
from rx_edge.backends.llm_onnx import sidecars
from rx_edge.bundle import (
    MANIFEST,
    Artifact,
    FileEntry,
    Manifest,
    Verdict,
    describe,
    schema_for,
)
from rx_edge.config import GenerateConfig, TrainRecipe
from rx_edge.config_io import to_mapping
from rx_edge_export import draft_corpus, sbom
from rx_edge_export.artifacts import Merged, Workshop

INTENDED_USE = (
    "Drafting of chest-radiograph reports for review by a radiologist. Not a medical device, not "
    "for diagnostic use."
)
_RUN_FILES = ("recipe.toml", "run.json", "metrics.json", "data_manifest.json", "MODEL_CARD.md")


def compose(
    shop: Workshop,
    recipe: TrainRecipe,
    canaries: Sequence[str],
    merged: Merged,
    parts: dict[str, tuple[Artifact, ...]],
) -> Manifest:
    """The manifest of everything in the staged bundle, before its verification.

    Args:
        parts: artefacts by field: "vision", "language" and perhaps "stock".
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    files = _described(shop.bundle, recipe.name, merged.pairing, _licences(shop, recipe))
    return Manifest(
        schema=schema_for(recipe.prompt),
        name=recipe.name,
        created=now,
        intended_use=INTENDED_USE,
        files=files,
        pairing=merged.pairing,
        parts=merged.parts,
        image=recipe.image,
        prompt=recipe.prompt,
        generate=GenerateConfig(n_ctx=shop.config.n_ctx),
        soft_tokens=merged.soft_tokens,
        width=merged.width,
        vision=parts["vision"],
        language=parts["language"],
        stock=parts.get("stock", ()),
        canaries=tuple(canaries),
        lineage=_lineage(shop, recipe),
    )


def _described(
    bundle: Path, model: str, pairing: str, licences: dict[str, str]
) -> dict[str, FileEntry]:
    """Write the SBOM of all other files; every file but the manifest, with its hash."""
    names = sorted(p for p in bundle.rglob("*") if p.is_file() and p.name != MANIFEST)
    files = {p.relative_to(bundle).as_posix(): describe(p) for p in names if p.name != sbom.SBOM}
    sbom.write(bundle / sbom.SBOM, model=model, version=pairing, files=files, licences=licences)
    return files | {sbom.SBOM: describe(bundle / sbom.SBOM)}


def _licences(shop: Workshop, recipe: TrainRecipe) -> dict[str, str]:
    """Of the code, the weights, the data they were trained on, and the reports in drafts.bin."""
    return {
        "code": "Apache-2.0",
        "weights": recipe.licence or "not stated by the recipe",
        "data": f"as stated for the weights; corpora: {', '.join(sorted(recipe.data)) or 'none'}",
        **({"drafts": shop.corpus.licences} if shop.corpus.reports else {}),
    }


def without_refused(bundle: Path, manifest: Manifest, verdict: Verdict) -> tuple[Manifest, Verdict]:
    """Leave out what failed verification, and say so in manifest and verdict.

    Where a default artefact or a part that all share failed, nothing is left out: the verdict
    that comes back has not passed.
    """
    refused = {s.artifact for s in verdict.failures()}
    optional = {a.file for a in (*manifest.vision[1:], *manifest.language[1:], *manifest.stock)}
    if not refused <= optional - {manifest.vision[0].file, manifest.language[0].file}:
        return manifest, verdict
    for file in refused:
        for path in (bundle / file, *sidecars(bundle / file)):
            path.unlink(missing_ok=True)
    gone = {a.file: a.name for a in (*manifest.vision, *manifest.language) if a.file in refused}
    about_gone = [mark for file, name in gone.items() for mark in (f"{file}: ", f": {name} (")]
    licences = manifest.lineage["licences"]
    left_out = [dataclasses.asdict(s) for s in verdict.stages if s.artifact in refused]
    smaller = replace(
        manifest,
        files=_described(bundle, manifest.name, manifest.pairing, licences),
        lineage={**manifest.lineage, "refused": left_out},
        vision=tuple(a for a in manifest.vision if a.file not in refused),
        language=tuple(a for a in manifest.language if a.file not in refused),
        stock=tuple(a for a in manifest.stock if a.file not in refused),
    )
    notes = [n for n in verdict.notes if not any(mark in n for mark in about_gone)]
    notes += [
        f"refused and left out: {s.artifact} ({s.stage} {s.value:.3g}, {s.tolerance:.3g} allowed)"
        for s in verdict.failures()
    ]
    kept = [s for s in verdict.stages if s.artifact not in refused]
    return smaller, Verdict.of(kept, tuple(notes))


def _lineage(shop: Workshop, recipe: TrainRecipe) -> dict[str, Any]:
    """Where the model came from; no path of the exporting machine is in it."""
    data_manifest = _read_json(shop.run / "data_manifest.json")
    config = to_mapping(
        replace(shop.config, calibration="", drafts_from=draft_corpus.kind(shop.config.drafts_from))
    )
    return {
        "export_sha256": export_digest(shop.run),
        "export": config,
        "calibration": {
            "origin": shop.calibration.origin,
            "sha256": shop.calibration.sha256,
            "fit": len(shop.calibration.fit),
            "check": len(shop.calibration.check),
        },
        "drafts": draft_corpus.lineage(shop.corpus),
        "recipe": to_mapping(recipe),
        "training": _read_json(shop.run / "run.json"),
        "metrics": _read_json(shop.run / "metrics.json"),
        "data_sha256": {name: entry.get("sha256") for name, entry in data_manifest.items()},
        "licences": _licences(shop, recipe),
        "exporter": versions(),
    }


def versions() -> dict[str, str]:
    """Of all that decides the bytes of an export."""
    packages = ("torch", "transformers", "peft", "onnx", "onnxscript", "onnxruntime", "gguf",
                "llama-cpp-python")  # fmt: skip
    return {
        "rx_edge": rx_edge.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def export_digest(run: Path) -> str:
    """sha256 over all that decides an export: the run's files and the code of both packages.

    A bundle with another digest is stale, also where only the exporter changed.
    """
    code = [Path(rx_edge.__file__).parent, Path(__file__).parent]
    files = [path for root in code for path in root.rglob("*.py")]
    files += [run / name for name in _RUN_FILES] + list((run / "final").rglob("*"))
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.is_file():
            digest.update(f"{path.name} {describe(path).sha256}\n".encode())
    return digest.hexdigest()
