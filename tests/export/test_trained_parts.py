"""A run that trained its vision tower and its language model is exported with those, not the base.

An export that silently used the base tower would be the worst of all faults: it drafts fluently.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file

from rx_edge.backends import vision_onnx as reader
from rx_edge.bundle import open_bundle
from rx_edge.config import ExportConfig
from rx_edge.errors import ModelError, VerificationError
from rx_edge.model.digest import weights_digest
from rx_edge.model.report_model import ReportModel, load_run, part_state
from rx_edge.train.run import train
from rx_edge_export import artifacts, merge_lora, plan, vision_onnx
from rx_edge_export.export import export
from rx_edge_export.reference import read_canaries
from tests.conftest import Once

SMALL = ExportConfig(language=("gguf:F16",), drafts_from="none")


@pytest.fixture(scope="module")
def run(tiny_recipe: Path, once: Once) -> Path:
    """Vision in stage 1, the whole LM and the adapter in stage 2."""
    changes = [
        'stages.0.trains=["projector", "vision"]',
        'stages.1.trains=["projector", "lora", "lm"]',
        "stages.1.learning_rate=5e-3",
    ]
    return once("runs/trained-parts", lambda path: train(tiny_recipe, path, overrides=changes))


@pytest.fixture(scope="module")
def adapted(tiny_recipe: Path, once: Once) -> Path:
    """An adapter on the tower, trained in stage 1."""
    changes = ['stages.0.trains=["projector", "vision-lora"]', "stages.0.learning_rate=2e-2"]
    return once("runs/vision-lora", lambda path: train(tiny_recipe, path, overrides=changes))


@pytest.fixture(scope="module")
def bundle(run: Path, once: Once) -> Path:
    return once("trained-parts-bundle", lambda path: export(run, path, config=SMALL))


def untrained(run: Path) -> ReportModel:
    """The trained projector and adapter between base tower and base LM."""
    trained = load_run(run)
    base = ReportModel(trained.recipe).eval()
    for part in ("projector", "adapter"):
        for name, tensor in part_state(base, part).items():
            tensor.copy_(part_state(trained, part)[name])
    return base


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("part", ["vision", "language"])
def test_what_was_trained_is_saved_and_loaded_whole(run: Path, part: str) -> None:
    saved = load_file(run / "final" / f"{part}.safetensors")
    loaded = part_state(load_run(run), part)
    base = part_state(untrained(run), part)
    assert saved.keys() == loaded.keys() == base.keys()
    assert all(torch.equal(loaded[n], saved[n].float()) for n in saved)
    learned = {n for n in saved if not torch.allclose(loaded[n], base[n], atol=1e-3)}
    assert len(learned) > 0.8 * len(saved), base.keys() - learned


def test_the_onnx_is_the_trained_tower_and_not_the_base(run: Path, bundle: Path) -> None:
    check_encoder(run, bundle)


def test_the_onnx_holds_the_towers_adapter(adapted: Path, tmp_path: Path) -> None:
    export(adapted, tmp_path / "bundle", config=replace(SMALL, stock=True))
    check_encoder(adapted, tmp_path / "bundle")
    merged = {n for n, _ in load_run(adapted).merged_encoder.named_parameters()}
    onnx = (tmp_path / "bundle" / "vision.onnx").read_bytes()
    assert not any("lora" in name for name in merged)
    assert b"lora" not in onnx


def check_encoder(run: Path, bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    golden = load_arrays(bundle / manifest.canaries[0].replace(".dcm", ".safetensors"))
    trained, base = load_run(run), untrained(run)
    with torch.inference_mode():
        wanted, other = (m.encoder(torch.from_numpy(golden["pixels"])) for m in (trained, base))
    with reader.open(bundle / "vision.onnx", threads=1) as backend:
        found = torch.from_numpy(backend.encode(golden["pixels"]))
    assert relative(found, wanted) < 1e-4
    assert relative(found, other) > 0.1
    # what the gate compared with is the trained tower too, and what pairs the files
    assert relative(torch.from_numpy(golden["soft_prompt"]), wanted[0]) < 1e-5
    assert manifest.parts["encoder"] == weights_digest(trained.encoder)
    assert manifest.parts["encoder"] != weights_digest(base.encoder)


def test_the_gate_knows_the_lm_before_and_after_training(run: Path, bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    golden = load_arrays(bundle / manifest.canaries[0].replace(".dcm", ".safetensors"))
    soft = torch.from_numpy(golden["soft_prompt"])
    trained, base = load_run(run), untrained(run)
    wanted = trained.teacher_forced(soft, [])[0]
    with base.adapter_off():
        before = base.teacher_forced(soft, [])[0]
    assert relative(torch.from_numpy(golden["logits"]), wanted) < 1e-5
    assert relative(torch.from_numpy(golden["logits_without_adapter"]), before) < 1e-5
    assert relative(before, wanted) > 0.1


def test_a_base_tower_in_the_onnx_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, base = vision_onnx.write, untrained(run).encoder

    def base_instead(module: torch.nn.Module, out: Path, **options: Any) -> dict[str, Any]:
        return write(base, out, **options)

    monkeypatch.setattr(artifacts.vision_onnx, "write", base_instead)
    with pytest.raises(VerificationError, match=r"stage soft_prompt of vision\.onnx"):
        export(run, tmp_path / "bundle", config=SMALL)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("fault", [False, True])
def test_a_base_lm_under_the_adapter_is_refused(
    run: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: bool
) -> None:
    if fault:
        monkeypatch.setattr(merge_lora, "trained_parts", lambda _: ("projector", "adapter"))
    canaries = read_canaries(bundle, open_bundle(bundle).manifest.canaries)
    stages = merge_lora.merge(load_run(run), tmp_path / "merged", canaries)
    assert [s.passed for s in stages] == [not fault] * len(canaries)


@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_run_without_its_trained_tensors_is_refused(run: Path, tmp_path: Path, part: str) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = copy / "final" / f"{part}.safetensors"
    state = load_file(file)
    gone = sorted(state)[0]
    del state[gone]
    save_file(state, file)
    with pytest.raises(ModelError, match=f"{part} does not fit the recipe: {gone} is missing"):
        load_run(copy)
    file.unlink()
    with pytest.raises(ModelError, match=f"{part} does not fit .*safetensors' is missing"):
        load_run(copy)
    with pytest.raises(ModelError, match=f"final/{part}.safetensors is missing"):
        plan.make(copy, SMALL, tmp_path)


def test_trained_tensors_that_no_stage_trains_are_refused(
    run: Path, tiny_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    shutil.copyfile(run / "final/vision.safetensors", tmp_path / "run/final/vision.safetensors")
    with pytest.raises(ModelError, match="vision does not fit .* no stage trains it"):
        load_run(tmp_path / "run")
