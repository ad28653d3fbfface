"""`rx-edge export`: a finished training run in, a verified bundle out.

Everything is written to a scratch directory beside the target. Only when the bundle has been
verified against the trained model does it appear under its name, by one rename: there is no
half-written and no unverified bundle.

Does not cover: the formats themselves (one module each) and the comparison (`verify.py`).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import rx_edge
from rx_edge.bundle import (
    MANIFEST,
    Artifact,
    Bundle,
    Manifest,
    StageResult,
    Verdict,
    describe,
    pairing_hash,
)
from rx_edge.config import to_mapping
from rx_edge.errors import UsageError, VerificationError
from rx_edge.model.digest import weights_digest
from rx_edge.model.report_model import ReportModel, load_run
from rx_edge_export import gguf_quantize, llm_gguf, tolerances, vision_onnx
from rx_edge_export.atomic import replacing
from rx_edge_export.merge_lora import merge
from rx_edge_export.reference import Canary, write_canaries
from rx_edge_export.verify import verify

DEFAULT_QUANT = ("Q8_0", "F16")  # the first one is the bundle's default
INTENDED_USE = (
    "Drafting of chest-radiograph reports for review by a radiologist. Not a medical device, not "
    "for diagnostic use."
)
_RUN_FILES = ("recipe.toml", "run.json", "metrics.json", "data_manifest.json", "MODEL_CARD.md")
Tick = Callable[[str], None]


def export(
    run: Path,
    out: Path,
    *,
    quant: Sequence[str] = DEFAULT_QUANT,
    canaries: Sequence[Path] = (),
    force: bool = False,
    tick: Tick = lambda _: None,
) -> Manifest:
    """Export `run` to the bundle directory `out`.

    Args:
        quant: precisions of the language model, default first.
        canaries: real studies to verify on, besides the synthetic ones. They are copied into
            the bundle, so they must be free of patient data and free to share.
        force: replace an existing bundle.
        tick: receives one line per step.

    Raises:
        UsageError: `out` exists, or an unknown precision.
        ModelError, ExportError: the run is unfinished or cannot be written faithfully.
        VerificationError: the result is not the trained model; nothing is left at `out`.
    """
    for precision in quant:
        tolerances.limit(tolerances.PREFILL_KL, precision)
    _check_target(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        staged = Path(scratch) / "bundle"
        staged.mkdir()
        manifest = _fill(run, staged, Path(scratch), quant, canaries, tick)
        _publish(staged, out, Path(scratch))
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


def _fill(
    run: Path, staged: Path, scratch: Path, quant: Sequence[str], extra: Sequence[Path], tick: Tick
) -> Manifest:
    tick("loading the trained model")
    model = load_run(run)
    tick("golden vectors of the trained model")
    canaries = write_canaries(model, staged, extra)
    tick("merging LoRA in float32")
    merged_dir = scratch / "merged"
    results = merge(model, merged_dir, canaries)
    shutil.copyfile(model.tokenizer_path, staged / "tokenizer.json")
    if (run / "MODEL_CARD.md").is_file():
        shutil.copyfile(run / "MODEL_CARD.md", staged / "MODEL_CARD.md")
    pairing = _pairing(model, merged_dir)
    tick("vision + projector to ONNX")
    size = model.recipe.image.size
    details = vision_onnx.write(
        model.encoder, staged / "vision.onnx", image_size=size, pairing=pairing
    )
    vision = Artifact("vision.onnx", "vision_onnx", "fp32", details)
    language = _language(merged_dir, staged, scratch, quant, model.recipe.name, pairing, tick)
    manifest = _manifest(run, model, staged, canaries, vision, language, pairing)
    return _verified(staged, manifest, results, tick)


def _language(
    merged_dir: Path,
    staged: Path,
    scratch: Path,
    quant: Sequence[str],
    name: str,
    pairing: str,
    tick: Tick,
) -> tuple[Artifact, ...]:
    """One GGUF per precision; quantised ones are made from float32, never from float16."""
    made = []
    full = scratch / "llm.F32.gguf"
    for precision in quant:
        tick(f"language model to GGUF {precision}")
        file = f"llm.{precision}.gguf"
        if precision in _DTYPE:
            details = llm_gguf.write(
                merged_dir, staged / file, dtype=_DTYPE[precision], name=name, pairing=pairing
            )
        else:
            if not full.exists():
                llm_gguf.write(merged_dir, full, dtype="f32", name=name, pairing=pairing)
            details = gguf_quantize.quantize(full, staged / file, file_type="Q8_0", threads=0)
        made.append(Artifact(file, "llm_gguf", precision, details))
    return tuple(made)


_DTYPE: dict[str, Any] = {"F16": "f16", "F32": "f32"}


def _verified(staged: Path, manifest: Manifest, results: list[StageResult], tick: Tick) -> Manifest:
    """Verify the staged bundle and write its manifest, or refuse."""
    verdict = Verdict.of(
        [
            *results,
            *verify(Bundle(staged, manifest, ""), lambda what: tick(f"verifying {what}")).stages,
        ]
    )
    if not verdict.passed:
        raise VerificationError(explain(verdict))
    manifest = replace(manifest, verification=verdict)
    with replacing(staged / MANIFEST) as part:
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


def _pairing(model: ReportModel, merged_dir: Path) -> str:
    """Hash over what must stay together; two runs, or two prompts, never share it."""
    weights = hashlib.sha256()
    for path in sorted(merged_dir.glob("*.safetensors")):
        weights.update(describe(path).sha256.encode())
    return pairing_hash(
        {
            "encoder": weights_digest(model.encoder),
            "language": weights.hexdigest(),
            "tokenizer": describe(model.tokenizer_path).sha256,
            "prompt": json.dumps(to_mapping(model.recipe.prompt), sort_keys=True),
            "image": json.dumps(to_mapping(model.recipe.image), sort_keys=True),
        }
    )


def _manifest(
    run: Path,
    model: ReportModel,
    staged: Path,
    canaries: Sequence[Canary],
    vision: Artifact,
    language: tuple[Artifact, ...],
    pairing: str,
) -> Manifest:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    files = {
        path.relative_to(staged).as_posix(): describe(path)
        for path in sorted(staged.rglob("*"))
        if path.is_file()
    }
    return Manifest(
        name=model.recipe.name,
        created=now,
        intended_use=INTENDED_USE,
        files=files,
        pairing=pairing,
        image=model.recipe.image,
        prompt=model.recipe.prompt,
        soft_tokens=model.projector.tokens,
        width=int(vision.details["width"]),
        vision=vision,
        language=language,
        canaries=tuple(c.file for c in canaries),
        lineage=_lineage(run, model),
    )


def _lineage(run: Path, model: ReportModel) -> dict[str, Any]:
    """Where the model came from; no path of the exporting machine is in it."""
    packages = ("torch", "transformers", "peft", "onnx", "onnxscript", "onnxruntime", "gguf",
                "llama-cpp-python")  # fmt: skip
    data_manifest = _read_json(run / "data_manifest.json")
    return {
        "export_sha256": export_digest(run),
        "recipe": to_mapping(model.recipe),
        "training": _read_json(run / "run.json"),
        "metrics": _read_json(run / "metrics.json"),
        "data_sha256": {name: entry.get("sha256") for name, entry in data_manifest.items()},
        "licences": {"code": "Apache-2.0", "weights": model.recipe.licence},
        "exporter": {
            "rx_edge": rx_edge.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
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


def _publish(staged: Path, out: Path, scratch: Path) -> None:
    if out.exists():
        out.rename(scratch / "replaced")  # removed with the scratch directory
    staged.rename(out)
