"""Models of two views and an indication: exported, verified, and every fault of them refused.

The table of faults is published with that of `test_mutations.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from rx_edge.backends import base, registry, vision_onnx
from rx_edge.bundle import MANIFEST, Artifact, open_bundle
from rx_edge.config import ExportConfig, ImageRecipe, PromptConfig, TrainRecipe
from rx_edge.config_io import load_toml
from rx_edge.errors import BundleError, ExportError, UsageError, VerificationError
from rx_edge.model.report_model import load_run
from rx_edge.prompting import MAX_INDICATION_TOKENS
from rx_edge.runtime import reading
from rx_edge.runtime.self_check import INDICATION, LIMITS, golden_indication
from rx_edge.runtime.session import Session, open_checked
from rx_edge.types import StudyInput
from rx_edge_export import artifacts, calibration, golden, imatrix, plan, verify_drafts
from rx_edge_export.export import export
from rx_edge_export.reference import draft, read_canaries
from rx_edge_export.verify import verify
from tests.export.planting import Plant, agree
from tests.factories import IMAGE_SIZE

RECIPE = ImageRecipe(size=IMAGE_SIZE)
LEAN = ExportConfig(vision=("onnx:fp32",), language=("gguf:F16",), drafts_from="none")
BOTH = PromptConfig(
    template="Findings of\n{image}\nIndication: {indication}<|im_end|>\n", views="frontal+lateral"
)


def test_every_stage_is_about_both_views_and_the_indication(asking_bundle: Path) -> None:
    bundle = open_bundle(asking_bundle)
    verdict = bundle.manifest.verification
    stages = [s for s in verdict.stages if s.artifact in ("vision.onnx", "llm.F16.gguf")]
    for canary in bundle.manifest.canaries:
        about = [s for s in stages if s.canary == canary and s.stage == "prefill_logits"]
        assert [s.metric for s in about] == ["kl", "kl (first image alone, no indication)"]
        vectors = load_file(asking_bundle / golden.golden_file(canary))
        assert vectors["pixels"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
        assert vectors["soft_prompt"].shape == (8, 64)
        assert golden_indication(vectors) == golden.ASKED
    one, two = (load_file(asking_bundle / golden.golden_file(c)) for c in bundle.manifest.canaries)
    assert np.array_equal(one["pixels"], two["pixels"][::-1])
    assert verify(bundle).passed


def test_an_onnx_language_model_reads_both(asking_run: Path, tmp_path: Path) -> None:
    config = ExportConfig(vision=("onnx:int8",), language=("onnx:fp32",), drafts_from="none")
    manifest = export(asking_run, tmp_path / "out", config=config)
    assert manifest.verification.passed
    assert manifest.vision[0].details["calibration_images"] == 100  # two of every study


@pytest.mark.parametrize("only", ["views", "indication"])
def test_one_of_the_two_alone(asking_run: Path, tmp_path: Path, only: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(asking_run, run)
    text = (run / "recipe.toml").read_text("utf-8")
    if only == "views":
        text = text.replace("\\nIndication: {indication}", "")
    else:
        text = text.replace('views = "frontal+lateral"', "", 1)
    (run / "recipe.toml").write_text(text, "utf-8")
    manifest = export(run, tmp_path / "out", config=LEAN)
    assert (manifest.schema, manifest.soft_tokens) == (3, 4)
    assert manifest.prompt.views == ("frontal+lateral" if only == "views" else "one")
    vectors = load_file(tmp_path / "out" / golden.golden_file(manifest.canaries[0]))
    assert len(vectors["pixels"]) == (2 if only == "views" else 1)
    assert (INDICATION in vectors) == (only == "indication")
    assert golden.PLAIN in vectors


# ---- planted faults -----------------------------------------------------------------------


def assembled(change: Callable[[Any], Any]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        faithful = reading.tensors
        patch.setattr(reading, "tensors", lambda images, recipe: change(faithful(images, recipe)))

    return plant


def images_of(change: Callable[[tuple[Path, ...]], tuple[Path, ...]]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        faithful = StudyInput.images.fget
        assert faithful is not None
        patch.setattr(StudyInput, "images", property(lambda self: change(faithful(self))))

    return plant


def encoded(change: Callable[[Any], Any]) -> Plant:
    """The engine gets other images than the study has."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        faithful = base.encode_views
        for module in ("runtime.pipeline", "runtime.self_check"):
            patch.setattr(f"rx_edge.{module}.encode_views", lambda v, p: faithful(v, change(p)))
        patch.setattr("rx_edge_export.verify.encode_views", lambda v, p: faithful(v, change(p)))

    return plant


def indication_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Session, "prompt_for", lambda self, _: self.prompt)


IN_THE_RUNTIME: dict[str, tuple[Plant, str]] = {
    "lateral given as frontal": (images_of(lambda paths: paths[::-1]), "pixels"),
    "lateral never read": (images_of(lambda paths: paths[:1]), "pixels"),
    "tensors of the views swapped": (assembled(lambda pixels: pixels[::-1]), "pixels"),
    "soft prompts of the views swapped": (encoded(lambda pixels: pixels[::-1]), "soft_prompt"),
    "soft prompt of the lateral dropped": (encoded(lambda pixels: pixels[:1]), "soft_prompt"),
    "frontal taken for both views": (encoded(lambda pixels: pixels[[0, 0]]), "soft_prompt"),
    "indication ignored": (indication_ignored, "prefill_logits"),
}


@pytest.mark.parametrize("fault", IN_THE_RUNTIME)
def test_a_fault_of_the_runtime_is_refused(
    asking_bundle: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    plant, stage = IN_THE_RUNTIME[fault]
    plant(monkeypatch)
    assert stage in {s.stage for s in verify(open_bundle(asking_bundle)).failures()}


def prompt(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / MANIFEST).read_text("utf-8"))["prompt"]
    return found


def no_indication_changed(root: Path) -> None:
    agree(root, prompt={"no_indication": "none given"})


def indication_elsewhere(root: Path) -> None:
    template = prompt(root)["template"].replace("\nIndication: {indication}", "")
    agree(root, prompt={"template": template.replace("{image}", "{image}{indication}")})


def label_of_the_indication_changed(root: Path) -> None:
    agree(root, prompt={"template": prompt(root)["template"].replace("Indication", "History")})


def one_view(root: Path) -> None:
    agree(root, prompt={"views": "one"})


IN_A_BUNDLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "text of no indication changed": (no_indication_changed, "prefill_logits"),
    "indication in another place": (indication_elsewhere, "prefill_logits"),
    "label of the indication changed": (label_of_the_indication_changed, "prefill_logits"),
    "two views called one": (one_view, "pixels"),
}


@pytest.fixture
def bundle(asking_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(asking_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("fault", IN_A_BUNDLE)
def test_a_fault_in_a_bundle_is_refused(bundle: Path, fault: str) -> None:
    plant, stage = IN_A_BUNDLE[fault]
    plant(bundle)
    assert stage in {s.stage for s in verify(open_bundle(bundle)).failures()}


@pytest.mark.parametrize("lost", [INDICATION, golden.PLAIN])
def test_vectors_that_tell_too_little_are_refused(bundle: Path, lost: str) -> None:
    file = bundle / golden.golden_file(open_bundle(bundle).manifest.canaries[1])
    vectors = load_file(file)
    del vectors[lost]
    save_file(vectors, file)
    agree(bundle)
    with pytest.raises(VerificationError, match=f"lacks {lost}, which"):
        verify(open_bundle(bundle))


@pytest.mark.parametrize("swapped", [False, True])
def test_an_engine_built_here_is_compared_on_both_views(
    asking_bundle: Path, monkeypatch: pytest.MonkeyPatch, swapped: bool
) -> None:
    faithful = registry.load

    class Built:
        """ONNX Runtime in the place of TensorRT."""

        @staticmethod
        def devices() -> tuple[str, ...]:
            return ("cuda",)

        @staticmethod
        def open(path: Path, **_: Any) -> Any:
            engine = vision_onnx.open(path, threads=1)
            engine.device = "some GPU"
            return engine

    monkeypatch.setattr(
        registry, "load", lambda name: Built if name == "vision_tensorrt" else faithful(name)
    )
    opened = open_bundle(asking_bundle)
    artifact = Artifact("vision.onnx", "vision_tensorrt", "fp32", {LIMITS: [1e-4, 1e-5]})
    if swapped:
        encoded(lambda pixels: pixels[::-1])(monkeypatch)
        with pytest.raises(BundleError, match="gives another soft prompt"):
            open_checked(opened, vision=artifact)
    else:
        open_checked(opened, vision=artifact).close()


# ---- calibration --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 studies; every other one has a lateral image and an indication."""
    root = tmp_path_factory.mktemp("told")
    shutil.copytree(tiny_pairs / "images", root / "images")
    rows = []
    for number in range(120):
        name = f"copy-{number}.jpg"
        shutil.copyfile(root / "images" / f"study-{2 * (number % 10)}.jpg", root / "images" / name)
        row = {"image": name, "report": "The lungs are clear.", "view": "PA",
               "patient": f"p{number}", "split": "train" if number < 60 else "test"}  # fmt: skip
        if number % 2:
            row |= {"lateral": "study-1.jpg", "indication": f"Cough,  day {number}."}
        rows.append(row)
    (root / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return root


def test_calibration_studies_have_what_the_model_reads(told: Path) -> None:
    found = calibration.load(told, [], RECIPE, 50, BOTH)
    sides = {(len(s.pixels), bool(s.indication)) for s in (*found.fit, *found.check)}
    assert sides == {(1, False), (2, True)}
    plain = calibration.load(told, [], RECIPE, 50)
    assert {(len(s.pixels), s.indication) for s in plain.fit} == {(1, "")}
    assert {s.name for s in plain.check} == {s.name for s in found.check}


def test_variations_have_two_views_and_no_indication() -> None:
    found = calibration.load(None, [], RECIPE, 50, BOTH)
    studies = (*found.fit, *found.check)
    assert {s.pixels.shape for s in studies} == {(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    assert len({view.tobytes() for s in studies for view in s.pixels}) == 200
    assert {s.indication for s in studies} == {""}
    plain = calibration.load(None, [], RECIPE, 50)
    for one, other in zip(plain.fit, found.fit, strict=True):
        assert np.array_equal(one.pixels[0], other.pixels[0])
    assert plain.sha256 == found.sha256


def test_drafts_are_each_studys_own(asking_run: Path, asking_bundle: Path, told: Path) -> None:
    model = load_run(asking_run)
    studies = calibration.load(told, [], RECIPE, 50, model.recipe.prompt).check[:24]
    drafts = draft(model, studies)
    assert {len(soft) for soft in drafts.soft_prompts} == {4, 8}
    for soft, tokens, study in zip(drafts.soft_prompts, drafts.tokens, studies, strict=True):
        wanted = model.greedy(torch.from_numpy(soft), golden.DRAFT_TOKENS, study.indication)
        assert list(tokens) == wanted
    with open_checked(open_bundle(asking_bundle), language="F16", exact=True) as session:
        soft_prompts = verify_drafts.encode(session, drafts)
        found = verify_drafts.compare(session, drafts, soft_prompts)
        assert found.changed == found.tied  # the file is float16
        forgotten = replace(drafts, indications=())
        lost = verify_drafts.compare(session, forgotten, soft_prompts)
        assert lost.changed > found.changed + 4


def test_an_importance_matrix_of_such_studies(
    asking_run: Path, told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every study in its own prompt; and no indication is left in the bundle."""
    seen: list[imatrix.Stream] = []
    faithful = imatrix.collect

    def collect(directory: Path, streams: Any, tick: Any) -> Any:
        seen.extend(streams)
        return faithful(directory, streams, tick)

    monkeypatch.setattr(artifacts.imatrix, "collect", collect)
    config = ExportConfig(language=("gguf:Q4_K_M",), calibration=str(told), drafts_from="none")
    manifest = export(asking_run, tmp_path / "out", config=config)
    assert manifest.language[0].details["imatrix"] == "multimodal"
    assert {len(s.soft) for s in seen if s.soft is not None} == {4, 8}
    assert len({s.prompt.after for s in seen}) > 10
    assert len({s.prompt.before for s in seen}) == 1
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"Cough, day" not in path.read_bytes()


def test_merging_is_compared_behind_the_canarys_own_prompt(
    asking_run: Path, asking_bundle: Path
) -> None:
    model = load_run(asking_run)
    canaries = open_bundle(asking_bundle).manifest.canaries
    for canary in read_canaries(asking_bundle, canaries):
        assert canary.indication == golden.ASKED
        found = model.teacher_forced(canary.soft_prompt, [], canary.indication)[0]
        torch.testing.assert_close(found, canary.logits)
        other = model.teacher_forced(canary.soft_prompt, [])[0]
        assert float((other - canary.logits).abs().max()) > 0.1


# ---- plan and stock -----------------------------------------------------------------------


def test_the_plan_counts_both_views_and_the_longest_indication(
    tiny_run: Path, asking_run: Path, tmp_path: Path
) -> None:
    counts = {}
    for run in (tiny_run, asking_run):
        prompt = load_run(run).prompt
        counts[run] = len(prompt.before) + len(prompt.after) + 159
    assert plan.make(tiny_run, LEAN, tmp_path).context == counts[tiny_run] + 4
    wanted = counts[asking_run] + 8 + MAX_INDICATION_TOKENS
    made = plan.make(asking_run, ExportConfig(n_ctx=wanted), tmp_path)
    assert made.context == wanted
    assert made.problems(0.0) == []
    config = ExportConfig(n_ctx=wanted - 1)
    with pytest.raises(UsageError, match=rf"{wanted} tokens and n_ctx is .* --set n_ctx=512"):
        export(asking_run, tmp_path / "out", config=config)


def test_a_stock_bundle_of_two_views_is_refused_with_the_reason(
    asking_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="wraps each image in its own; export with stock = false"):
        export(asking_run, tmp_path / "out", config=ExportConfig(stock=True))
    assert list(tmp_path.iterdir()) == []


def test_a_stock_bundle_of_one_view_with_an_indication(
    asking_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libmtmd's own tokens are those of a study without an indication, and no others."""
    run = tmp_path / "run"
    shutil.copytree(asking_run, run)
    recipe = (run / "recipe.toml").read_text("utf-8")
    (run / "recipe.toml").write_text(recipe.replace('views = "frontal+lateral"', "", 1), "utf-8")
    assert load_toml(run / "recipe.toml", TrainRecipe).prompt.views == "one"
    config = ExportConfig(language=("gguf:F16",), drafts_from="none", stock=True)
    export(run, tmp_path / "out", config=config)
    assert "not stated" in (tmp_path / "out" / "stock" / "chat-template.jinja").read_text("utf-8")
    monkeypatch.setattr("rx_edge_export.mmproj_check.filled", lambda prompt: prompt.template)
    with pytest.raises(ExportError, match="other tokens after the image"):
        export(run, tmp_path / "wrong", config=config)
