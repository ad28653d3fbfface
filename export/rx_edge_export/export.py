"""`rx-edge export`: a finished training run in, a verified bundle out.

Everything is made in a hidden work directory beside the target. Only when the bundle has been
verified against the trained model does it appear under its name, by one rename: there is no
half-written and no unverified bundle. A killed or interrupted export goes on where it was; one
that fails leaves nothing.

Does not cover: the parts (`artifacts.py`), planning (`plan.py`) and the comparison (`verify.py`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rx_edge.atomic import replacing
from rx_edge.bundle import (
    MANIFEST,
    Bundle,
    Manifest,
    StageResult,
    Verdict,
    describe,
)
from rx_edge.config import ExportConfig, TrainRecipe
from rx_edge.config_io import to_mapping
from rx_edge.errors import RxEdgeError, UsageError, VerificationError
from rx_edge_export import (
    artifacts,
    calibration,
    draft_corpus,
    plan,
    staged_manifest,
    stock,
    targets,
)
from rx_edge_export.artifacts import Workshop
from rx_edge_export.calibration import Calibration
from rx_edge_export.draft_corpus import DraftCorpus
from rx_edge_export.golden import Drafts
from rx_edge_export.steps import Progress, Steps
from rx_edge_export.verify import verify


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
        UsageError: `out` exists, an unknown target, no reports where `drafts_from` says, or the
            plan does not fit this machine.
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
    recipe = plan.recipe_of(run)
    if config.stock:
        stock.refuse_two_views(recipe.prompt)
    corpus = draft_corpus.load(run, recipe, config.drafts_from)
    plan.refuse_unfit(plan.make(run, config, out.parent, corpus), config.memory_gb)
    source = Path(config.calibration) if config.calibration else None
    studies = calibration.load(source, canaries, recipe.image, config.studies, recipe.prompt)
    key = _key(run, config, canaries, studies, corpus)
    total = plan.steps(eyes, mouths, config) + bool(corpus.reports)
    with Steps(out.parent / f".{out.name}.partial", key, total, progress) as steps:
        shop = Workshop(run, config, steps, canaries, studies, corpus)
        try:
            manifest = _fill(shop, eyes, mouths, recipe)
        except RxEdgeError:
            steps.discard()  # what was wrong once is not worth keeping
            raise
        _publish(shop.bundle, out, steps.work)
        steps.discard()
    return manifest


def _key(
    run: Path,
    config: ExportConfig,
    canaries: Sequence[Path],
    studies: Calibration,
    corpus: DraftCorpus,
) -> str:
    parts = [
        staged_manifest.export_digest(run),
        json.dumps(to_mapping(config), sort_keys=True),
        studies.sha256,
        corpus.sha256,
    ]
    parts += [f"{path.name} {describe(path).sha256}" for path in canaries]
    parts += [f"{k} {v}" for k, v in staged_manifest.versions().items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _fill(
    shop: Workshop,
    eyes: Sequence[targets.Target],
    mouths: Sequence[targets.Target],
    recipe: TrainRecipe,
) -> Manifest:
    canaries = artifacts.golden(shop)
    drafts = artifacts.drafts(shop)
    artifacts.draft_index(shop)
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
    manifest = staged_manifest.compose(shop, recipe, canaries, merged, parts)
    return _verified(shop, manifest, stages, drafts)


def _verified(
    shop: Workshop, manifest: Manifest, stages: Sequence[StageResult], drafts: Drafts
) -> Manifest:
    """Verify the staged bundle and write its manifest, or refuse."""
    found = verify(Bundle(shop.bundle, manifest, ""), shop.steps.detail, drafts)
    verdict = Verdict.of([*stages, *found.stages], found.notes)
    if not verdict.passed and shop.config.on_refusal == "drop":
        manifest, verdict = staged_manifest.without_refused(shop.bundle, manifest, verdict)
    if not verdict.passed:
        raise VerificationError(explain(verdict))
    manifest = replace(manifest, verification=verdict)
    with replacing(shop.bundle / MANIFEST) as part:
        part.write_text(json.dumps(to_mapping(manifest), indent=1) + "\n", encoding="utf-8")
    return manifest


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
