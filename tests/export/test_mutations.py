"""The mutation suite: faults that ship wrong models elsewhere, planted one by one.

Every fault must be refused by a stage that names it, none by the accident of a crash. The table
of fault and stage is published in `export/README.md`; a test keeps the two equal.

Three ways to plant: into the exporter's code while it exports, into a finished bundle whose
manifest is made to agree (what a careless hand does), and into the runtime's code. Faults of two
views and of the indication are in `test_two_views.py`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from rx_edge import grayscale, image, prompting
from rx_edge.bundle import MANIFEST, StageResult, describe, open_bundle
from rx_edge.config import ExportConfig
from rx_edge.errors import BackendError, BundleError, VerificationError
from rx_edge.runtime import session as session_module
from rx_edge.runtime.session import open_session
from rx_edge_export import (
    artifacts,
    gguf_architectures,
    gguf_quantize,
    llm_gguf,
    merge_lora,
    vision_onnx,
)
from rx_edge_export.export import export
from rx_edge_export.verify import verify
from tests.export import test_two_views
from tests.export.planting import Plant, agree

README = Path(__file__).resolve().parents[2] / "export" / "README.md"
LEAN = ExportConfig(vision=("onnx:fp32",), language=("gguf:F16",))
SMALL = ExportConfig(vision=("onnx:fp32", "onnx:int8"), language=("gguf:F16", "gguf:Q8_0"))


# ---- planted into the exporter ------------------------------------------------------------


def update_scaled(factor: float) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        faithful = merge_lora._update
        patch.setattr(merge_lora, "_update", lambda *a: factor * faithful(*a))

    return plant


def adapter_lost_after_merging(patch: pytest.MonkeyPatch) -> None:
    """As if the base's directory had been converted in place of the merged one."""
    update_scaled(0.0)(patch)
    patch.setattr(merge_lora, "_compare", lambda *_: StageResult("merge", passed=True))


def q_and_k_not_permuted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(llm_gguf, "_permuted", lambda weight, heads: weight)


def numbers_changed(**changes: float) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        faithful = gguf_architectures.read

        def read(path: Path) -> Any:
            found = faithful(path)
            return replace(found, numbers={**found.numbers, **changes})

        patch.setattr(gguf_architectures, "read", read)

    return plant


def weights_changed(target: str, change: Callable[[Any], Any]) -> Plant:
    """Change one tensor of the GGUF between reading and writing."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        faithful = llm_gguf._load

        def load(tensor: Any, file: Path, kind: Any) -> Any:
            array = faithful(tensor, file, kind)
            return np.ascontiguousarray(change(array)) if tensor.target == target else array

        patch.setattr(llm_gguf, "_load", load)

    return plant


def tensors_swapped(patch: pytest.MonkeyPatch) -> None:
    """gate and up have the same shape."""
    faithful = gguf_architectures.read

    def read(path: Path) -> Any:
        found = faithful(path)
        names = {"ffn_gate": "ffn_up", "ffn_up": "ffn_gate"}
        swapped = [
            replace(t, target=re.sub(r"ffn_gate|ffn_up", lambda m: names[m.group()], t.target))
            for t in found.tensors
        ]
        return replace(found, tensors=tuple(swapped))

    patch.setattr(gguf_architectures, "read", read)


def vision_wrapped(wrap: Callable[[Any], Any]) -> Plant:
    """Export another module than the trained encoder; the writer's own check sees no difference."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        faithful = vision_onnx.write

        def write(module: Any, *rest: Any, **named: Any) -> Any:
            return faithful(wrap(module), *rest, **named)

        patch.setattr(vision_onnx, "write", write)

    return plant


class Rolled(torch.nn.Module):
    """The soft prompt, off by one token."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: Any) -> Any:
        return self.inner(pixel_values).roll(1, dims=1)


def norm_skipped(module: Any) -> Any:
    module.projector.net[0] = torch.nn.Identity()
    return module


def patches_reversed(module: Any) -> Any:
    table = next(p for n, p in module.vision.named_parameters() if "position_embeddings" in n)
    with torch.no_grad():
        table[:, 1:] = table[:, 1:].flip(1)
    return module


def quantised_too_far(patch: pytest.MonkeyPatch) -> None:
    """A 4-bit file under an 8-bit name."""
    faithful = artifacts.gguf_quantize.quantize

    def quantize(src: Path, out: Path, *, file_type: str, **rest: Any) -> Any:
        return faithful(src, out, file_type="IQ4_NL", **rest)

    patch.setattr(gguf_quantize, "quantize", quantize)


def ranges_of_other_images(patch: pytest.MonkeyPatch) -> None:
    """int8 ranges calibrated on images that are nearly black."""
    faithful = artifacts.vision_quantize.to_int8

    def to_int8(src: Path, out: Path, *, images: Any, **rest: Any) -> Any:
        return faithful(src, out, images=[i * 0.01 - 2.0 for i in images], **rest)

    patch.setattr(artifacts.vision_quantize, "to_int8", to_int8)


AT_EXPORT: dict[str, tuple[Plant, str]] = {
    "adapter dropped": (update_scaled(0.0), "merge"),
    "adapter merged twice": (update_scaled(2.0), "merge"),
    "adapter lost after merging": (adapter_lost_after_merging, "prefill_logits"),
    "q and k not permuted": (q_and_k_not_permuted, "prefill_logits"),
    "rope base 10000": (numbers_changed(rope_freq_base=10000.0), "prefill_logits"),
    "wrong RMS eps": (numbers_changed(layer_norm_rms_eps=0.1), "prefill_logits"),
    "embedding rows shifted": (
        weights_changed("token_embd.weight", lambda w: np.roll(w, 1, axis=0)),
        "prefill_logits",
    ),
    "norm weights of the LM halved": (
        weights_changed("blk.1.ffn_norm.weight", lambda w: w * 0.5),
        "prefill_logits",
    ),
    "one attention output negated": (
        weights_changed("blk.0.attn_output.weight", lambda w: -w),
        "prefill_logits",
    ),
    "key heads in another order": (
        weights_changed("blk.0.attn_k.weight", lambda w: np.roll(w, len(w) // 2, axis=0)),
        "prefill_logits",
    ),
    "gate and up swapped": (tensors_swapped, "prefill_logits"),
    "4-bit file under an 8-bit name": (quantised_too_far, "prefill_logits"),
    "soft prompt off by one patch": (vision_wrapped(Rolled), "soft_prompt"),
    "layer norm of the projector skipped": (vision_wrapped(norm_skipped), "soft_prompt"),
    "position embedding reversed": (vision_wrapped(patches_reversed), "soft_prompt"),
    "int8 ranges of other images": (ranges_of_other_images, "soft_prompt"),
}


@pytest.mark.parametrize("fault", AT_EXPORT)
def test_a_fault_of_the_exporter_is_refused(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    plant, stage = AT_EXPORT[fault]
    plant(monkeypatch)
    with pytest.raises(VerificationError, match=rf"stage {stage} of"):
        export(
            tiny_run, tmp_path / "out", config=SMALL if "bit" in fault or "int8" in fault else LEAN
        )
    assert list(tmp_path.iterdir()) == []  # neither a bundle nor anything half-made


# ---- planted into a finished bundle -------------------------------------------------------


@pytest.fixture(scope="module")
def int8_bundle(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mutations") / "bundle"
    export(tiny_run, out, config=SMALL)
    return out


@pytest.fixture
def bundle(int8_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(int8_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def scales_too_large(root: Path) -> None:
    """Every weight of the int8 encoder 10 % larger."""
    model = onnx.load(root / "vision.int8.onnx")
    changed = 0
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_scale") and len(tensor.dims) == 1 and tensor.dims[0] > 1:
            array = numpy_helper.to_array(tensor) * np.float32(1.1)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            changed += 1
    assert changed
    onnx.save(model, root / "vision.int8.onnx")
    agree(root)


def weight_is_nan(root: Path) -> None:
    model = onnx.load(root / "vision.onnx")
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, root / "vision.onnx")
    agree(root)


def language_weight_is_nan(root: Path) -> None:
    tensors = {t.name: t for t in gguf.GGUFReader(root / "llm.F16.gguf", "r+").tensors}
    tensors["output_norm.weight"].data[3] = np.nan
    agree(root)


def wrong_language_bytes(root: Path) -> None:
    """A flipped exponent bit in one weight of a norm, hashed again."""
    tensors = {t.name: t for t in gguf.GGUFReader(root / "llm.F16.gguf", "r+").tensors}
    tensors["blk.0.attn_norm.weight"].data[:] *= 2.0
    agree(root)


def wrapper_text_missing(root: Path) -> None:
    agree(root, prompt={"image_begin": "", "image_end": ""})


def instruction_changed(root: Path) -> None:
    prompt = json.loads((root / MANIFEST).read_text("utf-8"))["prompt"]
    agree(root, prompt={"template": prompt["template"].replace("Write the", "State")})


def end_token_changed(root: Path) -> None:
    agree(root, prompt={"end_of_report": "<|endoftext|>"})


def means_swapped(root: Path) -> None:
    agree(root, image={"mean": [0.406, 0.456, 0.485]})


def tokenizer_swapped(root: Path) -> None:
    path = root / "tokenizer.json"
    spec = json.loads(path.read_text("utf-8"))
    vocab = spec["model"]["vocab"]
    a, b = sorted(vocab, key=len)[-2:]  # two long pieces change places
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(spec), "utf-8")
    agree(root)


def adapter_without_effect(root: Path) -> None:
    """Golden vectors of an adapter that changes nothing: a lost one could not be told."""
    from safetensors.numpy import load_file, save_file

    for path in (root / "golden").glob("*.safetensors"):
        vectors = load_file(path)
        vectors["logits_without_adapter"] = vectors["logits"]
        save_file(vectors, path)
    agree(root)


IN_A_BUNDLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "int8 scale x 1.1": (scales_too_large, "soft_prompt"),
    "one NaN in the encoder": (weight_is_nan, "NaN"),
    "one NaN in the LM": (language_weight_is_nan, "NaN"),
    "norm of the LM doubled": (wrong_language_bytes, "prefill_logits"),
    "wrapper text missing": (wrapper_text_missing, "prefill_logits"),
    "instruction changed": (instruction_changed, "prefill_logits"),
    "end token changed": (end_token_changed, "greedy_tokens"),
    "channel means swapped": (means_swapped, "pixels"),
    "tokenizer swapped": (tokenizer_swapped, "tokenizer"),
    "adapter without effect": (adapter_without_effect, "adapter"),
}


@pytest.mark.parametrize("fault", IN_A_BUNDLE)
def test_a_fault_in_a_bundle_is_refused(bundle: Path, fault: str) -> None:
    plant, stage = IN_A_BUNDLE[fault]
    plant(bundle)
    if stage == "NaN":
        with pytest.raises(BackendError, match="NaN or infinite"):
            verify(open_bundle(bundle))
        return
    assert stage in {s.stage for s in verify(open_bundle(bundle)).failures()}


def foreign_vision(root: Path, other: Path) -> None:
    shutil.copyfile(other / "vision.onnx", root / "vision.onnx")


def foreign_language(root: Path, other: Path) -> None:
    shutil.copyfile(other / "llm.F16.gguf", root / "llm.F16.gguf")


@pytest.fixture(scope="module")
def other_bundle(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes, another projector and adapter."""
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("other")
    shutil.copytree(tiny_run, root / "run")
    random = torch.Generator().manual_seed(1)
    for name in ("projector.safetensors", "adapter/adapter_model.safetensors"):
        path = root / "run" / "final" / name
        changed = {
            k: v + 0.3 * v.std().nan_to_num() * torch.randn(v.shape, generator=random).to(v.dtype)
            for k, v in load_file(path).items()
        }
        save_file(changed, path)
    export(root / "run", root / "bundle", config=SMALL)
    return root / "bundle"


@pytest.mark.parametrize("half", [foreign_vision, foreign_language])
def test_a_foreign_half_is_refused_on_load(
    bundle: Path, other_bundle: Path, half: Callable[[Path, Path], None]
) -> None:
    """Right shape, right hashes: only the pairing hash inside tells."""
    half(bundle, other_bundle)
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    for name in manifest["files"]:
        entry = describe(bundle / name)
        manifest["files"][name] = {"sha256": entry.sha256, "bytes": entry.bytes}
    (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError, match="belongs to model"):
        open_session(bundle)


@pytest.mark.parametrize(
    ("half", "stage"), [(foreign_vision, "soft_prompt"), (foreign_language, "prefill_logits")]
)
def test_a_foreign_half_with_a_forged_pairing_is_refused(
    bundle: Path, other_bundle: Path, half: Callable[[Path, Path], None], stage: str
) -> None:
    half(bundle, other_bundle)
    theirs = json.loads((other_bundle / MANIFEST).read_text("utf-8"))["pairing"]
    ours = json.loads((bundle / MANIFEST).read_text("utf-8"))["pairing"]
    for name in ("vision.onnx", "llm.F16.gguf"):
        content = (bundle / name).read_bytes()
        (bundle / name).write_bytes(content.replace(theirs.encode(), ours.encode()))
    agree(bundle)
    assert stage in {s.stage for s in verify(open_bundle(bundle)).failures()}


# ---- planted into the runtime -------------------------------------------------------------


def never_inverts(patch: pytest.MonkeyPatch) -> None:
    faithful = grayscale.render

    def render(stored: Any, dataset: Any) -> Any:
        dataset.PhotometricInterpretation = "MONOCHROME2"
        return faithful(stored, dataset)

    patch.setattr("rx_edge.dicom.render", render)


def always_inverts(patch: pytest.MonkeyPatch) -> None:
    faithful = grayscale.render

    def render(stored: Any, dataset: Any) -> Any:
        dataset.PhotometricInterpretation = "MONOCHROME1"
        return faithful(stored, dataset)

    patch.setattr("rx_edge.dicom.render", render)


def pixels_changed(change: Callable[[Any], Any]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        faithful = image.prepare

        def prepare(radiograph: Any, recipe: Any) -> Any:
            return np.ascontiguousarray(change(faithful(radiograph, recipe)))

        patch.setattr(image, "prepare", prepare)

    return plant


def other_kernel(patch: pytest.MonkeyPatch) -> None:
    faithful = image.Image.Image.resize

    def resize(self: Any, size: Any, _: Any) -> Any:
        return faithful(self, size, image.Image.Resampling.BILINEAR)

    patch.setattr(image.Image.Image, "resize", resize)


def first_token_doubled(patch: pytest.MonkeyPatch) -> None:
    faithful = prompting.prompt_ids

    def prompt_ids(prompt: Any, tokenizer: Any) -> Any:
        ids = faithful(prompt, tokenizer)
        return replace(ids, before=(ids.before[0], *ids.before))

    patch.setattr(session_module, "prompt_ids", prompt_ids)


IN_THE_RUNTIME: dict[str, tuple[Plant, str]] = {
    "inversion missing": (never_inverts, "pixels"),
    "inversion twice": (always_inverts, "pixels"),
    "resize kernel changed": (other_kernel, "pixels"),
    "mirrored left to right": (pixels_changed(lambda p: p[..., ::-1]), "pixels"),
    "padded with white": (
        pixels_changed(lambda p: np.where(p == p[..., :1, :1], p.max(), p)),
        "pixels",
    ),
    "scaled to -1..1": (pixels_changed(lambda p: p / np.abs(p).max()), "pixels"),
    "BOS doubled": (first_token_doubled, "prefill_logits"),
}


@pytest.mark.parametrize("fault", IN_THE_RUNTIME)
def test_a_fault_of_the_runtime_is_refused(
    int8_bundle: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    plant, stage = IN_THE_RUNTIME[fault]
    plant(monkeypatch)
    assert stage in {s.stage for s in verify(open_bundle(int8_bundle)).failures()}


def faults() -> Iterator[tuple[str, str]]:
    """Every fault of all tables, and the stage that catches it."""
    views = (test_two_views.IN_A_BUNDLE, test_two_views.IN_THE_RUNTIME)
    for table in (AT_EXPORT, IN_A_BUNDLE, IN_THE_RUNTIME, *views):
        for fault, (_, stage) in table.items():
            yield fault, stage


def test_the_published_list_is_this_one() -> None:
    published = re.findall(r"^\| ([^|]+) \| `(\w+)` \|$", README.read_text("utf-8"), re.MULTILINE)
    assert len(published) >= 25
    assert sorted(published) == sorted(faults())
