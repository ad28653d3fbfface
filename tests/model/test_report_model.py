"""The fp32 reference model, on tiny Hugging Face models of random weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, ViTConfig, ViTModel

from rx_edge.config import ImageRecipe, LoraSettings, ModelConfig, PromptConfig, TrainRecipe
from rx_edge.errors import InputError, ModelError
from rx_edge.model.language import load_language, tokenizer_file, with_lora
from rx_edge.model.projector import Projector
from rx_edge.model.report_model import ReportModel, greedy_batch, load_run, load_trained
from rx_edge.model.vision import load_vision
from rx_edge.train.checkpoint import save_trained
from tests.factories import IMAGE_SIZE, tiny_vit_dir


@pytest.fixture
def model(tiny_base: Path) -> ReportModel:
    """A model whose adapter clearly acts."""
    torch.manual_seed(0)
    recipe = TrainRecipe(
        image=ImageRecipe(size=IMAGE_SIZE),
        model=ModelConfig(vision=str(tiny_base / "vit"), language=str(tiny_base / "llama")),
    )
    out = ReportModel(recipe).eval()
    with torch.no_grad():
        for name, parameter in out.lm.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.1)
    return out


@pytest.fixture
def soft(model: ReportModel) -> torch.Tensor:
    with torch.inference_mode():
        return model.encoder(torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE))[0]


def without(directory: Path, key: str, out: Path) -> str:
    """A copy of a model directory that lacks one tensor."""
    shutil.copytree(directory, out)
    state = load_file(out / "model.safetensors")
    del state[key]
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return str(out)


@pytest.mark.parametrize("side", [2, 3, 4])
def test_pixel_shuffle_equals_a_naive_loop(side: int) -> None:
    grid = 3 * side
    config = ModelConfig(pooling=f"pixel-shuffle-{side}x{side}")  # type: ignore[arg-type]
    projector = Projector(config, grid=grid, width=3, lm_width=5)
    features = torch.randn(2, grid * grid, 3)
    tokens = []
    for top in range(0, grid, side):
        for left in range(0, grid, side):
            block = [(top + r, left + c) for r in range(side) for c in range(side)]
            tokens.append(torch.cat([features[:, r * grid + c] for r, c in block], -1))
    expected = projector.net(torch.stack(tokens, 1))
    assert projector.tokens == 9
    torch.testing.assert_close(projector(features), expected)


def test_odd_grid_is_refused_only_where_it_is_shuffled() -> None:
    with pytest.raises(ModelError, match="needs an even patch grid, this tower has 5"):
        Projector(ModelConfig(), grid=5, width=3, lm_width=5)
    assert Projector(ModelConfig(pooling="none"), grid=5, width=3, lm_width=5).tokens == 25


def test_average_pooling_equals_a_naive_loop() -> None:
    config = ModelConfig(pooling="average-3x3", projector="linear")
    projector = Projector(config, grid=6, width=4, lm_width=5)
    features = torch.randn(2, 36, 4)
    square = features.reshape(2, 6, 6, 4)
    blocks = [square[:, r : r + 3, c : c + 3].mean((1, 2)) for r in (0, 3) for c in (0, 3)]
    assert projector.tokens == 4
    torch.testing.assert_close(projector(features), projector.net(torch.stack(blocks, 1)))
    with pytest.raises(ModelError, match="'average-3x3' needs a patch grid that 3 divides.*has 37"):
        Projector(config, grid=37, width=4, lm_width=5)


def test_the_resampler_reads_every_patch_of_any_grid() -> None:
    config = ModelConfig(pooling="resampler", queries=7)
    projector = Projector(config, grid=37, width=128, lm_width=5)
    assert projector.tokens == 7
    assert projector.pool.heads == 2
    features = torch.randn(1, 37 * 37, 128, requires_grad=True)
    out = projector(features)
    assert out.shape == (1, 7, 5)
    out.square().sum().backward()
    assert features.grad is not None
    assert bool((features.grad.abs().amax(-1) > 0).all())
    with pytest.raises(ModelError, match=r"model\.queries is 0"):
        Projector(ModelConfig(pooling="resampler", queries=0), grid=2, width=4, lm_width=5)


def test_linear_projector_is_linear() -> None:
    config = ModelConfig(projector="linear", pooling="none")
    projector = Projector(config, grid=2, width=3, lm_width=5)
    a, b = torch.randn(2, 1, 4, 3)
    zero = projector(torch.zeros(1, 4, 3))
    torch.testing.assert_close(projector(a + b) - zero, projector(a) + projector(b) - 2 * zero)


def test_projector_starts_at_the_scale_of_the_embeddings() -> None:
    projector = Projector(ModelConfig(), grid=4, width=3, lm_width=5)
    features = torch.randn(8, 16, 3)
    projector.start_at_scale(features, 0.3)
    assert float(projector(features).detach().std()) == pytest.approx(0.3, rel=1e-4)


@pytest.mark.parametrize("size", [28, IMAGE_SIZE, 98])
@pytest.mark.parametrize("family", ["dinov2", "vit"])
def test_fixed_position_embedding_equals_transformers(
    tmp_path: Path, family: str, size: int
) -> None:
    path = tmp_path / "tower"
    if family == "dinov2":
        tiny_vit_dir(path)
    else:
        config = ViTConfig(
            image_size=IMAGE_SIZE, patch_size=14, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=64, initializer_range=0.2,
        )  # fmt: skip
        ViTModel(config, add_pooling_layer=False).save_pretrained(path)
    extra = {"interpolate_pos_encoding": True} if family == "vit" else {}  # DINOv2 always does
    pixels = torch.randn(2, 3, size, size)
    tower = load_vision(str(path), size)
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(path).eval()(pixels, **extra).last_hidden_state
        found = tower(pixels)
    assert found.shape == (2, (size // 14) ** 2, 32)
    torch.testing.assert_close(found, hidden[:, 1:], atol=1e-5, rtol=1e-5)


def test_unfit_towers_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match="is a 'llama'; supported: clip, .*dinov2, siglip, .*swin, vit"
    ):
        load_vision(str(tiny_base / "llama"), IMAGE_SIZE)
    with pytest.raises(ModelError, match="60 is not a multiple of the patch size 14 .*use 56"):
        load_vision(str(tiny_base / "vit"), 60)
    key = "embeddings.position_embeddings"
    with pytest.raises(ModelError, match=rf"lacks weights: \['{key}'\]"):
        load_vision(without(tiny_base / "vit", key, tmp_path / "vit"), IMAGE_SIZE)


def test_unfit_language_models_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    name = without(tiny_base / "llama", key, tmp_path / "llama")
    with pytest.raises(ModelError, match=rf"lacks weights: \['{key}'\]"):
        load_language(name)
    (tmp_path / "llama" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        tokenizer_file(name)


def test_unknown_lora_target_is_refused(tiny_base: Path) -> None:
    settings = LoraSettings(targets=("q_proj", "qkv"))
    with pytest.raises(ModelError, match=r"lora.targets \['qkv'\] .*valid: .*'v_proj'"):
        with_lora(load_language(str(tiny_base / "llama")), settings)


def test_greedy_is_the_argmax_of_teacher_forcing(model: ReportModel, soft: torch.Tensor) -> None:
    ids = model.greedy(soft, 12)
    assert len(ids) > 2
    best = model.teacher_forced(soft, ids).argmax(-1).tolist()
    assert best[:-1] == ids
    assert len(ids) == 12 or best[-1] == model.prompt.end


def test_greedy_stops_at_the_end_token(model: ReportModel, soft: torch.Tensor) -> None:
    ids = model.greedy(soft, 12)
    model.prompt = replace(model.prompt, end=ids[2])
    assert model.greedy(soft, 12) == ids[: ids.index(ids[2])]


def told(model: ReportModel) -> ReportModel:
    """The same model with an {indication} slot."""
    template = PromptConfig().template.replace("{image}", "{image} {indication}")
    recipe = replace(model.recipe, prompt=PromptConfig(template=template))
    out = ReportModel(recipe).eval()
    out.load_state_dict(model.state_dict())
    return out


def test_the_indication_reaches_the_lm(model: ReportModel, soft: torch.Tensor) -> None:
    with pytest.raises(InputError, match="trained without indications"):
        model.teacher_forced(soft, [], "cough")
    model = told(model)
    assert model.prompt_for("") is model.prompt
    assert model.prompt_for("not stated") == model.prompt
    plain, cough, fever = (model.teacher_forced(soft, [7], t) for t in ("", "cough", "fever"))
    assert torch.equal(plain, model.teacher_forced(soft, [7]))
    assert (plain - cough).abs().max() > 0.01 < (cough - fever).abs().max()
    embeds, before = model.prompt_embeddings(soft, "cough"), len(model.prompt.before)
    assert torch.equal(
        embeds[: before + len(soft)], model.prompt_embeddings(soft)[: before + len(soft)]
    )
    assert len(embeds) == before + len(soft) + len(model.prompt_for("cough").after)


def test_a_batch_of_drafts_is_one_after_the_other(model: ReportModel) -> None:
    """Soft prompts of one and of two views, with and without an indication."""
    model = told(model)
    with torch.inference_mode():
        one, two, three, four = model.encoder(torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE))
    prompts = [one, torch.cat([two, three]), four, torch.cat([one, four]), two]
    indications = ["", "cough", "cough and fever", "", "cough"]
    found = greedy_batch(model, prompts, 10, indications)
    wanted = [model.greedy(p, 10, text) for p, text in zip(prompts, indications, strict=True)]
    assert [ids for ids, _ in found] == wanted
    assert len({tuple(ids) for ids in wanted}) > 1
    for (ids, margins), prompt, text in zip(found, prompts, indications, strict=True):
        best = model.teacher_forced(prompt, ids, text).topk(2, dim=-1).values
        expected = (best[:, 0] - best[:, 1])[: len(margins)]
        torch.testing.assert_close(torch.tensor(margins), expected, atol=1e-3, rtol=1e-3)
    assert greedy_batch(model, prompts, 10) == greedy_batch(model, prompts, 10, [""] * 5)


def test_the_image_and_the_prompt_reach_the_lm(model: ReportModel, soft: torch.Tensor) -> None:
    assert model.encoder.projector is model.projector
    embeds = model.prompt_embeddings(soft)
    before = len(model.prompt.before)
    assert torch.equal(embeds[before : before + len(soft)], soft)
    assert len(model.prompt_embeddings(None)) == len(embeds) - len(soft)
    assert not torch.allclose(model.teacher_forced(soft, []), model.teacher_forced(soft * 0, []))


def test_adapter_off_is_the_base_lm(
    model: ReportModel, soft: torch.Tensor, tiny_base: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_base / "llama", dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = base(inputs_embeds=model.prompt_embeddings(soft)[None]).logits[0, -1:]
    with model.adapter_off():
        torch.testing.assert_close(model.teacher_forced(soft, []), expected)
    assert (model.teacher_forced(soft, []) - expected).abs().max() > 0.1


def test_trained_tensors_round_trip(model: ReportModel, soft: torch.Tensor, tmp_path: Path) -> None:
    save_trained(model, tmp_path / "final", torch.float32)
    other = ReportModel(model.recipe).eval()
    load_trained(other, tmp_path / "final")
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


PROJECTOR, ADAPTER = "projector.safetensors", "adapter/adapter_model.safetensors"


@pytest.mark.parametrize("file", [PROJECTOR, ADAPTER])
@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_odd_tensors_are_refused(model: ReportModel, tmp_path: Path, file: str, fault: str) -> None:
    save_trained(model, tmp_path / "final", torch.float32)
    path = tmp_path / "final" / file
    state: dict[str, Any] = load_file(path)
    key = sorted(state)[0]
    if fault == "missing":
        del state[key]
    elif fault == "extra":
        state["extra.weight"] = torch.zeros(1)
    else:
        state[key] = torch.zeros(1)
    save_file(state, path)
    with pytest.raises(ModelError, match="projector does not fit|adapter ") as caught:
        load_trained(model, tmp_path / "final")
    assert ("extra" if fault == "extra" else key) in str(caught.value)


def test_unfinished_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").touch()
    with pytest.raises(ModelError, match=r"not a finished training run: projector\.safetensors"):
        load_run(tmp_path)
