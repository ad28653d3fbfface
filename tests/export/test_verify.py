"""A planted fault must be refused: at export, by verify, or when the bundle is loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rx_edge.bundle import MANIFEST, describe, open_bundle
from rx_edge.errors import BackendError, BundleError, UsageError, VerificationError
from rx_edge.runtime.session import open_session
from rx_edge_export import staged_manifest
from rx_edge_export.export import export
from rx_edge_export.staged_manifest import export_digest
from rx_edge_export.tolerances import TOKEN_MARGIN, VISION_MARGIN
from rx_edge_export.verify import verify


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    return copy


def failed_stages(root: Path) -> set[str]:
    return {s.stage for s in verify(open_bundle(root)).failures()}


def rehash(root: Path, name: str) -> None:
    """What a careless hand would do: make the manifest agree with a changed file."""
    manifest = json.loads((root / MANIFEST).read_text("utf-8"))
    entry = describe(root / name)
    manifest["files"][name] = {"sha256": entry.sha256, "bytes": entry.bytes}
    (root / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def test_a_faithful_bundle_passes_every_stage(tiny_bundle: Path) -> None:
    verdict = verify(open_bundle(tiny_bundle))
    assert verdict.passed, verdict.failures()
    everywhere = {
        "pixels", "soft_prompt", "soft_prompt_scale", "tokenizer", "prefill_logits", "adapter",
        "greedy_tokens",
    }  # fmt: skip
    assert {s.stage for s in verdict.stages} == everywhere
    at_export = open_bundle(tiny_bundle).manifest.verification
    assert {s.stage for s in at_export.stages} == everywhere | {
        "merge", "facts_negation", "facts_side", "facts_finding",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["llm.Q8_0.gguf", "vision.onnx", "tokenizer.json", "golden/phantom-mono1.dcm"]
)
def test_one_flipped_byte_is_refused_on_load(bundle_copy: Path, name: str) -> None:
    path = bundle_copy / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=name.rpartition("/")[2]):
        open_session(bundle_copy)


def test_a_language_model_of_another_run_is_refused(
    bundle_copy: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """Same shapes, right hashes, other prompt: only the pairing hash inside the file tells."""
    other_run = tmp_path / "run"
    shutil.copytree(tiny_run, other_run)
    recipe = (other_run / "recipe.toml").read_text("utf-8")
    (other_run / "recipe.toml").write_text(recipe.replace("Write the", "State the"), "utf-8")
    export(other_run, tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "llm.Q8_0.gguf", bundle_copy / "llm.Q8_0.gguf")
    rehash(bundle_copy, "llm.Q8_0.gguf")
    with pytest.raises(BundleError, match="belongs to model"):
        open_session(bundle_copy)


@pytest.mark.parametrize(
    ("vector", "stage"),
    [("pixels", "pixels"), ("soft_prompt", "soft_prompt"), ("logits", "prefill_logits")],
)
def test_each_stage_can_fail(bundle_copy: Path, vector: str, stage: str) -> None:
    name = "golden/phantom-mono1.safetensors"
    vectors = load_file(bundle_copy / name)
    vectors[vector] = np.ascontiguousarray(np.roll(vectors[vector], 1, axis=-1))
    save_file(vectors, bundle_copy / name)
    rehash(bundle_copy, name)
    assert stage in failed_stages(bundle_copy)


def test_a_bundle_without_its_verdict_is_refused(bundle_copy: Path) -> None:
    manifest = json.loads((bundle_copy / MANIFEST).read_text("utf-8"))
    manifest["verification"]["passed"] = False
    (bundle_copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError, match="no passing verification"):
        open_session(bundle_copy)
    with open_session(bundle_copy, allow_unverified=True) as session:
        assert session.unverified


def test_nothing_to_compare_is_not_a_pass(bundle_copy: Path) -> None:
    manifest = json.loads((bundle_copy / MANIFEST).read_text("utf-8"))
    manifest["canaries"] = []
    (bundle_copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(VerificationError, match="no canaries"):
        verify(open_bundle(bundle_copy))


def test_nan_in_a_soft_prompt_is_refused(tiny_bundle: Path) -> None:
    with open_session(tiny_bundle) as session:
        soft = np.full((4, session.language.n_embd), np.nan, np.float32)
        with pytest.raises(BackendError, match="NaN"):
            session.language.prefill([soft])


def test_exporting_twice_gives_the_same_bytes(
    tiny_run: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    export(tiny_run, tmp_path / "again")
    first, second = (
        json.loads((root / MANIFEST).read_text("utf-8"))
        for root in (tiny_bundle, tmp_path / "again")
    )
    first.pop("created"), second.pop("created")
    assert first == second


def test_an_existing_target_is_kept(tiny_run: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--force"):
        export(tiny_run, tiny_bundle)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="not a bundle"):
        export(tiny_run, tmp_path / "mine")


def test_no_path_of_this_machine_is_in_a_bundle(tiny_bundle: Path) -> None:
    for name in (MANIFEST, "vision.onnx", "llm.Q8_0.gguf"):
        content = (tiny_bundle / name).read_bytes()
        if name == MANIFEST:  # the tiny recipe names its base models by path; nothing else may
            manifest = json.loads(content)
            manifest["lineage"].pop("recipe"), manifest["lineage"].pop("training")
            content = json.dumps(manifest).encode()
        assert str(tiny_bundle.parent).encode() not in content
        assert b"site-packages" not in content


def test_a_stale_bundle_is_noticed(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights, another card, or other code: the digest that the demo compares changes."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    digests = {export_digest(run)}
    assert digests == {export_digest(tiny_run)}
    (run / "MODEL_CARD.md").write_text("a card", encoding="utf-8")
    digests.add(export_digest(run))
    weights = run / "final" / "projector.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    digests.add(export_digest(run))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "export.py").write_text("changed", encoding="utf-8")
    monkeypatch.setattr(staged_manifest, "__file__", str(tmp_path / "code" / "export.py"))
    digests.add(export_digest(run))
    assert len(digests) == 4


def test_a_vision_artefact_is_allowed_what_its_language_model_is(tiny_bundle: Path) -> None:
    """On other processors Q8_0 alone may part at a tie, whatever sees the image."""
    bundle = open_bundle(tiny_bundle)
    assert bundle.language().precision == "Q8_0"
    half = replace(bundle.vision(), precision="fp16")
    manifest = replace(bundle.manifest, vision=(bundle.vision(), half))
    stages = verify(replace(bundle, manifest=manifest)).stages
    allowed = [s.tolerance for s in stages if (s.stage, s.artifact) == ("greedy_tokens", half.file)]
    assert max(allowed) == TOKEN_MARGIN["Q8_0"] > VISION_MARGIN["fp16"]
