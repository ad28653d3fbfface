"""The steps of an export: each makes one part of the bundle, from parts made before it.

Every function takes the `Workshop` and goes through its `Steps`, so that a finished part is kept
when the export is killed. The trained model is loaded only when a step really needs it.

Does not cover: order and publication (`export.py`), formats (one module each), verification.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from rx_edge.backends.llm_onnx import sidecars
from rx_edge.bundle import (
    DRAFTS,
    Artifact,
    StageResult,
    describe,
    image_hash,
    pairing_hash,
    prompt_hash,
)
from rx_edge.config import ExportConfig
from rx_edge.model.digest import weights_digest
from rx_edge.model.report_model import ReportModel, load_run
from rx_edge.prompting import encode
from rx_edge.runtime.self_check import LIMITS
from rx_edge.types import FloatArray
from rx_edge_export import (
    gguf_quantize,
    imatrix,
    llm_gguf,
    llm_onnx,
    llm_optimum,
    tolerances,
    vision_onnx,
    vision_quantize,
    vision_tensorrt,
)
from rx_edge_export.calibration import Calibration
from rx_edge_export.draft_corpus import DraftCorpus
from rx_edge_export.drafts import write as write_drafts
from rx_edge_export.golden import Drafts
from rx_edge_export.merge_lora import merge
from rx_edge_export.reference import draft, read_canaries, write_canaries
from rx_edge_export.steps import Steps
from rx_edge_export.targets import Target

FIT_TEXTS = 32  # calibration studies drafted for the importance matrix where nobody wrote a report
_FLOATS: dict[str, Any] = {"F32": "f32", "F16": "f16"}


@dataclass
class Workshop:
    """What the steps share. `bundle` is the staged bundle, beside the intermediate files."""

    run: Path
    config: ExportConfig
    steps: Steps
    canaries: Sequence[Path]
    calibration: Calibration
    corpus: DraftCorpus
    _model: ReportModel | None = None

    @property
    def bundle(self) -> Path:
        """Directory of everything that will be shipped."""
        path = self.steps.work / "bundle"
        path.mkdir(exist_ok=True)
        return path

    @property
    def merged(self) -> Path:
        """Directory of the merged language model."""
        return self.steps.work / "merged"

    @property
    def model(self) -> ReportModel:
        """The trained model, adapter unmerged; loaded on first use."""
        if self._model is None:
            self.steps.detail("loading the trained model")
            self._model = load_run(self.run)
        return self._model

    def release(self) -> None:
        """Forget the trained model: merging uses it up, and memory is needed."""
        self._model = None


@dataclass(frozen=True)
class Merged:
    """What merging decided."""

    parts: dict[str, str]
    stages: tuple[StageResult, ...]
    soft_tokens: int  # N
    width: int  # D_lm

    @property
    def pairing(self) -> str:
        """One hash over `parts`."""
        return pairing_hash(self.parts)


def golden(shop: Workshop) -> tuple[str, ...]:
    """Canary studies and their golden vectors; returns the files of the studies."""
    directory = shop.bundle / "golden"

    def make() -> dict[str, Any]:
        shutil.rmtree(directory, ignore_errors=True)
        return {"files": write_canaries(shop.model, shop.bundle, shop.canaries)}

    result = shop.steps.run("golden vectors of the trained model", lambda: [directory], make)
    return tuple(result["files"])


def drafts(shop: Workshop) -> Drafts:
    """The trained model's drafts of the studies that whole drafts are compared on."""
    studies = shop.calibration.check
    file = shop.steps.work / "drafts.safetensors"

    def make() -> dict[str, Any]:
        said = draft(
            shop.model, studies, lambda n: shop.steps.detail(f"draft {n} of {len(studies)}")
        )
        save_file({str(n): soft for n, soft in enumerate(said.soft_prompts)}, file)
        return {"tokens": said.tokens, "margins": said.margins}

    result = shop.steps.run("drafts of the trained model", lambda: [file], make)
    soft = load_file(file)
    return Drafts(
        names=tuple(s.name for s in studies),
        pixels=tuple(s.pixels for s in studies),
        soft_prompts=tuple(soft[str(n)] for n in range(len(studies))),
        tokens=tuple(tuple(ids) for ids in result["tokens"]),
        margins=tuple(tuple(row) for row in result["margins"]),
        indications=tuple(s.indication for s in studies),
    )


def draft_index(shop: Workshop) -> None:
    """`drafts.bin`, where there are reports to make it from."""
    corpus, out = shop.corpus, shop.bundle / DRAFTS
    if corpus.reports:
        shop.steps.run(
            "draft index of the training reports",
            lambda: [out],
            lambda: write_drafts(out, corpus.reports, corpus.tokenizer_sha256),
        )


def merged(shop: Workshop, canaries: Sequence[str]) -> Merged:
    """Fold the adapter in, compare, and hash what must stay together."""

    def make() -> dict[str, Any]:
        model = shop.model
        encoder = weights_digest(model.encoder)  # before merging: the run may be read again
        shutil.rmtree(shop.merged, ignore_errors=True)
        known = read_canaries(shop.bundle, canaries)
        stages = merge(model, shop.merged, known)
        shutil.copyfile(model.tokenizer_path, shop.bundle / "tokenizer.json")
        result = {
            "parts": _parts(model, encoder, shop.merged),
            "stages": [dataclasses.asdict(s) for s in stages],
            "soft_prompt": [model.projector.tokens, known[0].soft_prompt.shape[1]],
        }
        shop.release()
        return result

    files = [shop.merged, shop.bundle / "tokenizer.json"]
    result = shop.steps.run("merging LoRA in float32", lambda: files, make)
    stages = tuple(StageResult(**s) for s in result["stages"])
    return Merged(result["parts"], stages, *result["soft_prompt"])


def vision(shop: Workshop, targets: Sequence[Target], pairing: str) -> tuple[Artifact, ...]:
    """fp32 ONNX always; everything else is made from it."""
    keep = any(t.file == "vision.onnx" for t in targets)
    source = (shop.bundle if keep else shop.steps.work) / "vision.onnx"

    def make_source() -> dict[str, Any]:
        size = shop.model.recipe.image.size
        return vision_onnx.write(
            shop.model.merged_encoder, source, image_size=size, pairing=pairing
        )

    files = {"vision.onnx": shop.steps.run("vision to onnx:fp32", lambda: [source], make_source)}
    made = []
    for target in targets:
        if target.file not in files:
            files[target.file] = _from_fp32(shop, target, source)
        details = files[target.file]
        if target.format == "vision_tensorrt":
            built = shop.steps.run(
                f"TensorRT takes {target.name}",
                list,
                partial(vision_tensorrt.check, shop.bundle / target.file),
            )
            limits = [
                tolerances.limit(table, target.precision)
                for table in (tolerances.SOFT_PROMPT, tolerances.SOFT_PROMPT_SCALE)
            ]
            details = {**details, "tensorrt": built, LIMITS: limits}
        made.append(Artifact(target.file, target.format, target.precision, details))
    return tuple(made)


def _from_fp32(shop: Workshop, target: Target, source: Path) -> dict[str, Any]:
    out = shop.bundle / target.file
    images = [view[None] for study in shop.calibration.fit for view in study.pixels]
    choice: dict[str, bool | None] = {"auto": None, "yes": True, "no": False}

    def make() -> dict[str, Any]:
        if target.precision == "fp16":
            return vision_quantize.to_fp16(source, out, images=images[:4])
        if target.precision == "fp8":
            return vision_quantize.to_fp8(source, out, images=images)
        symmetric = target.format == "vision_tensorrt"  # TensorRT needs zero points of 0
        reduce_range = False if symmetric else choice[shop.config.reduce_range]
        return vision_quantize.to_int8(
            source, out, images=images, symmetric=symmetric, reduce_range=reduce_range
        )

    return shop.steps.run(f"vision to {target.name}", lambda: [out], make)


def language(
    shop: Workshop, targets: Sequence[Target], name: str, pairing: str
) -> tuple[Artifact, ...]:
    """One file per precision; quantised ones are made from float32, never from float16."""
    made = []
    for target in targets:
        write = _gguf if target.format == "llm_gguf" else _onnx
        details = write(shop, target, name, pairing)
        made.append(Artifact(target.file, target.format, target.precision, details))
    return tuple(made)


def _gguf(shop: Workshop, target: Target, name: str, pairing: str) -> dict[str, Any]:
    out = shop.bundle / target.file
    if target.precision in _FLOATS:
        dtype = _FLOATS[target.precision]
        return shop.steps.run(
            f"language model to {target.name}",
            lambda: [out],
            lambda: llm_gguf.write(shop.merged, out, dtype=dtype, name=name, pairing=pairing),
        )
    full = shop.steps.work / "llm.F32.gguf"
    tokenizer = shop.steps.run(
        "language model to float32",
        lambda: [full],
        lambda: llm_gguf.write(shop.merged, full, dtype="f32", name=name, pairing=pairing),
    )["tokenizer_pre"]
    # llama.cpp rounds Q8_0 without looking at an importance matrix
    matrix = {} if target.precision == "Q8_0" else _imatrix(shop)

    def make() -> dict[str, Any]:
        details = gguf_quantize.quantize(
            full, out, file_type=target.precision, threads=0, imatrix=matrix
        )
        used = shop.config.imatrix if matrix else "none"
        return {**details, "tokenizer_pre": tokenizer, "imatrix": used}

    return shop.steps.run(f"language model to {target.name}", lambda: [out], make)


def _onnx(shop: Workshop, target: Target, name: str, pairing: str) -> dict[str, Any]:
    out = shop.bundle / target.file

    def make() -> dict[str, Any]:
        if shop.config.llm_exporter == "optimum":
            return llm_optimum.write(shop.merged, out, pairing=pairing, python=None)
        precision: Any = target.precision
        return llm_onnx.write(
            shop.merged, out, precision=precision, pairing=pairing, name=name, traced=traced
        )

    traced = None
    if target.precision != "fp16" and shop.config.llm_exporter == "rx-edge":
        traced = shop.steps.work / "traced.onnx"
        shop.steps.run(
            "tracing the language model",
            lambda: [traced, traced.with_name("traced.onnx.data")],
            lambda: llm_onnx.save_trace(shop.merged, traced),
        )

    return shop.steps.run(f"language model to {target.name}", lambda: [out, *sidecars(out)], make)


def _imatrix(shop: Workshop) -> dict[str, FloatArray]:
    if shop.config.imatrix == "none":
        return {}
    file = shop.steps.work / "imatrix.safetensors"

    def make() -> dict[str, Any]:
        streams = _streams(shop)
        shop.release()
        matrix = imatrix.collect(
            shop.merged,
            streams,
            lambda n: shop.steps.detail(f"importance matrix: study {n} of {len(streams)}"),
        )
        save_file(matrix, file)
        return {"studies": len(streams), "tensors": len(matrix)}

    shop.steps.run(f"importance matrix ({shop.config.imatrix})", lambda: [file], make)
    loaded: dict[str, FloatArray] = load_file(file)
    return loaded


def _streams(shop: Workshop) -> list[imatrix.Stream]:
    """What the model sees: soft prompts with the reports that were written, or with its own."""
    studies = shop.calibration.fit
    written = [s for s in studies if s.report]
    studies, model = tuple(written) or studies[:FIT_TEXTS], shop.model
    said = draft(model, studies)
    if written:
        texts = [encode(model.tokenizer, s.report) for s in written]
    else:
        texts = [list(ids) for ids in said.tokens]
    multimodal = shop.config.imatrix == "multimodal"
    return [
        imatrix.Stream(model.prompt_for(study.indication), soft if multimodal else None, ids)
        for study, soft, ids in zip(studies, said.soft_prompts, texts, strict=True)
    ]


def _parts(model: ReportModel, encoder: str, merged_dir: Path) -> dict[str, str]:
    """Hashes of what must stay together; two runs, or two prompts, never share all of them."""
    weights = hashlib.sha256()
    for path in sorted(merged_dir.glob("*.safetensors")):
        weights.update(describe(path).sha256.encode())
    return {
        "encoder": encoder,
        "language": weights.hexdigest(),
        "tokenizer": describe(model.tokenizer_path).sha256,
        "prompt": prompt_hash(model.recipe.prompt),
        "image": image_hash(model.recipe.image),
    }
