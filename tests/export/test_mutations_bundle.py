"""Faults planted into a finished bundle, whose manifest is made to agree (`test_mutations.py`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from rx_edge.bundle import MANIFEST, describe, open_bundle
from rx_edge.errors import BackendError, BundleError
from rx_edge.runtime.session import open_session
from rx_edge_export.export import export
from rx_edge_export.verify import verify
from tests.export.planting import SMALL, agree


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
