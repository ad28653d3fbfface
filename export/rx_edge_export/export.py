"""`rx-edge export`: a finished training run in, a verified bundle out.

Everything is made in a hidden work directory beside the target. Only when the bundle has been
verified against the trained model does it appear under its name, by one rename: there is no
half-written and no unverified bundle. A killed or interrupted export goes on where it was; one
that fails leaves nothing.

Does not cover: the parts (`artifacts.py`), planning (`plan.py`) and the comparison (`verify.py`).
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import platform
import shutil
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
    Bundle,
    FileEntry,
    Manifest,
    StageResult,
    Verdict,
    describe,
)
from rx_edge.config import ExportConfig, GenerateConfig, TrainRecipe, load_toml, to_mapping
from rx_edge.errors import RxEdgeError, UsageError, VerificationError
from rx_edge_export import artifacts, calibration, plan, sbom, stock, targets
from rx_edge_export.artifacts import Merged, Workshop
from rx_edge_export.atomic import replacing
from rx_edge_export.calibration import Calibration
from rx_edge_export.golden import Drafts
from rx_edge_export.steps import Progress, Steps
from rx_edge_export.verify import verify

INTENDED_USE = (
    "Drafting of chest-radiograph reports for review by a radiologist. Not a medical device, not "
    "for diagnostic use."
)
_RUN_FILES = ("recipe.toml", "run.json", "metrics.json", "data_manifest.json", "MODEL_CARD.md")


def silent(what: str, done: int, of: int, detail: str) -> None:
    """A progress display that shows nothing."""


def export(
    run: Path,
    out: Path,
    *,
    config: ExportConfig | None = None,
    canaries: Sequence[Path] = (),
    force: bool = False,
    progress: Progress = silent,
) -> Manifest:
    """Export `run` to the bundle directory `out`.

    Args:
        config: what to make; None = the defaults of `ExportConfig`.
        canaries: real studies to verify on, besides the synthetic ones. They are copied into
            the bundle, so they must be free of patient data and free to share.
        force: replace an existing bundle.

    Raises:
        UsageError: `out` exists, an unknown target, or the plan does not fit this machine.
        ModelError, ExportError: the run is unfinished or cannot be written faithfully.
        VerificationError: the result is not the trained model; nothing is left at `out`.
    """
    config = config or ExportConfig()
    eyes = targets.chosen(config.vision, targets.VISION, "--vision")
    mouths = targets.chosen(config.language, targets.LANGUAGE, "--llm")
    if config.stock:
        stock.refuse_without_gguf(mouths)
    if config.llm_exporter == "optimum" and any(
        t.format == "llm_onnx" and t.precision != "fp32" for t in mouths
    ):
        raise UsageError("llm_exporter 'optimum' makes onnx:fp32 only; leave other --llm onnx out")
    _check_target(out, force)
    plan.refuse_unfit(plan.make(run, config, out.parent), config.memory_gb)
    recipe = load_toml(run / "recipe.toml", TrainRecipe)
    source = Path(config.calibration) if config.calibration else None
    studies = calibration.load(source, canaries, recipe.image, config.studies)
    key = _key(run, config, canaries, studies)
    total = plan.steps(eyes, mouths, config)
    with Steps(out.parent / f".{out.name}.partial", key, total, progress) as steps:
        shop = Workshop(run, config, steps, canaries, studies)
        try:
            manifest = _fill(shop, eyes, mouths, recipe)
        except RxEdgeError:
            steps.discard()  # what was wrong once is not worth keeping
            raise
        _publish(shop.bundle, out, steps.work)
        steps.discard()
    return manifest


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


def _key(run: Path, config: ExportConfig, canaries: Sequence[Path], studies: Calibration) -> str:
    parts = [export_digest(run), json.dumps(to_mapping(config), sort_keys=True), studies.sha256]
    parts += [f"{path.name} {describe(path).sha256}" for path in canaries]
    parts += [f"{k} {v}" for k, v in _versions().items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _fill(
    shop: Workshop,
    eyes: Sequence[targets.Target],
    mouths: Sequence[targets.Target],
    recipe: TrainRecipe,
) -> Manifest:
    canaries = artifacts.golden(shop)
    drafts = artifacts.drafts(shop)
    merged = artifacts.merged(shop, canaries)
    if (shop.run / "MODEL_CARD.md").is_file():
        shutil.copyfile(shop.run / "MODEL_CARD.md", shop.bundle / "MODEL_CARD.md")
    vision = artifacts.vision(shop, eyes, merged.pairing)
    details = stock.mmproj(shop, recipe.name, merged.pairing) if shop.config.stock else {}
    language = artifacts.language(shop, mouths, recipe.name, merged.pairing)
    parts = {"vision": vision, "language": language}
    stages = merged.stages
    if shop.config.stock:
        artifact, more = stock.finish(shop, details, language, canaries, recipe.name)
        parts["stock"], stages = (artifact,), (*stages, *more)
    shop.release()
    manifest = _manifest(shop, recipe, canaries, merged, parts)
    return _verified(shop, manifest, stages, drafts)


def _verified(
    shop: Workshop, manifest: Manifest, stages: Sequence[StageResult], drafts: Drafts
) -> Manifest:
    """Verify the staged bundle and write its manifest, or refuse."""
    found = verify(Bundle(shop.bundle, manifest, ""), shop.steps.detail, drafts)
    verdict = Verdict.of([*stages, *found.stages], found.notes)
    if not verdict.passed and shop.config.on_refusal == "drop":
        manifest, verdict = _without_refused(shop.bundle, manifest, verdict)
    if not verdict.passed:
        raise VerificationError(explain(verdict))
    manifest = replace(manifest, verification=verdict)
    with replacing(shop.bundle / MANIFEST) as part:
        part.write_text(json.dumps(to_mapping(manifest), indent=1) + "\n", encoding="utf-8")
    return manifest


def _without_refused(
    bundle: Path, manifest: Manifest, verdict: Verdict
) -> tuple[Manifest, Verdict]:
    """Leave out what failed, and say so; a default artefact cannot be left out."""
    refused = {s.artifact for s in verdict.failures()}
    optional = {a.file for a in (*manifest.vision[1:], *manifest.language[1:], *manifest.stock)}
    if not refused <= optional - {manifest.vision[0].file, manifest.language[0].file}:
        return manifest, verdict
    gone = [name for file in refused for name in (file, *map(_name, sidecars(bundle / file)))]
    for name in gone:
        (bundle / name).unlink(missing_ok=True)
    keep = {
        half: tuple(a for a in getattr(manifest, half) if a.file not in refused)
        for half in ("vision", "language", "stock")
    }
    left_out = [s for s in verdict.stages if s.artifact in refused]
    notes = [
        f"refused and left out: {s.artifact} ({s.stage} {s.value:.3g}, {s.tolerance:.3g} allowed)"
        for s in verdict.failures()
    ]
    lineage = {**manifest.lineage, "refused": [dataclasses.asdict(s) for s in left_out]}
    sbom.write(
        bundle / sbom.SBOM,
        model=manifest.name,
        version=manifest.pairing,
        files=_files(bundle),
        licences=manifest.lineage["licences"],
    )
    smaller = replace(
        manifest,
        files=_files(bundle, sbom.SBOM),
        lineage=lineage,
        vision=keep["vision"],
        language=keep["language"],
        stock=keep["stock"],
    )
    names = tuple(f"{a.name}: " for half in keep.values() for a in half)
    about_others = tuple(n for n in verdict.notes if ": " not in n or n.startswith(names)
                         or n.startswith("not run"))  # fmt: skip
    kept = [s for s in verdict.stages if s.artifact not in refused]
    return smaller, Verdict.of(kept, (*about_others, *notes))


def _name(path: Path) -> str:
    return path.name


def explain(verdict: Verdict) -> str:
    """One line that names the first failing stage."""
    if not verdict.stages:
        return "nothing was compared with the trained model"
    failures = verdict.failures()
    first = failures[0]
    return (
        f"not the trained model: stage {first.stage} of {first.artifact} on "
        f"{first.canary or 'texts'} has {first.metric} {first.value:.3g}, "
        f"{first.tolerance:.3g} is allowed ({len(failures)} of {len(verdict.stages)} checks fail)"
    )


def _manifest(
    shop: Workshop,
    recipe: TrainRecipe,
    canaries: Sequence[str],
    merged: Merged,
    parts: dict[str, tuple[Artifact, ...]],
) -> Manifest:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    sbom.write(
        shop.bundle / sbom.SBOM,
        model=recipe.name,
        version=merged.pairing,
        files=_files(shop.bundle),
        licences=_licences(recipe),
    )
    return Manifest(
        name=recipe.name,
        created=now,
        intended_use=INTENDED_USE,
        files=_files(shop.bundle, sbom.SBOM),
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


def _files(bundle: Path, *more: str) -> dict[str, FileEntry]:
    """Every file but the manifest and, unless asked for, the SBOM."""
    return {
        path.relative_to(bundle).as_posix(): describe(path)
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and (path.name not in (MANIFEST, sbom.SBOM) or path.name in more)
    }


def _licences(recipe: TrainRecipe) -> dict[str, str]:
    """Of the code, the weights and the data they were trained on."""
    return {
        "code": "Apache-2.0",
        "weights": recipe.licence or "not stated by the recipe",
        "data": f"as stated for the weights; corpora: {', '.join(sorted(recipe.data)) or 'none'}",
    }


def _lineage(shop: Workshop, recipe: TrainRecipe) -> dict[str, Any]:
    """Where the model came from; no path of the exporting machine is in it."""
    data_manifest = _read_json(shop.run / "data_manifest.json")
    config = to_mapping(replace(shop.config, calibration=""))
    return {
        "export_sha256": export_digest(shop.run),
        "export": config,
        "calibration": {
            "origin": shop.calibration.origin,
            "sha256": shop.calibration.sha256,
            "fit": len(shop.calibration.fit),
            "check": len(shop.calibration.check),
        },
        "recipe": to_mapping(recipe),
        "training": _read_json(shop.run / "run.json"),
        "metrics": _read_json(shop.run / "metrics.json"),
        "data_sha256": {name: entry.get("sha256") for name, entry in data_manifest.items()},
        "licences": _licences(recipe),
        "exporter": _versions(),
    }


def _versions() -> dict[str, str]:
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


def _check_target(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not (out / MANIFEST).is_file():
        raise UsageError(f"{str(out)!r} exists and is not a bundle; choose another --out")
    if not force:
        raise UsageError(f"{str(out)!r} exists; add --force to replace it, or choose another --out")


def _publish(staged: Path, out: Path, work: Path) -> None:
    if out.exists():
        shutil.rmtree(work / "replaced", ignore_errors=True)
        out.rename(work / "replaced")  # removed with the work directory
    staged.rename(out)
