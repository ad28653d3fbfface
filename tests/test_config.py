"""Recipes: strict keys, strict types, one default each, and a lossless round trip."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from rx_edge import config
from rx_edge.config import PromptConfig, TrainRecipe
from rx_edge.config_io import from_mapping, load_toml, override, to_mapping
from rx_edge.errors import ConfigError

RECIPES = sorted((Path(config.__file__).parent / "train" / "recipes").glob("*.toml"))
CLASSES = [
    c
    for c in vars(config).values()
    if dataclasses.is_dataclass(c) and isinstance(c, type) and c.__module__ == config.__name__
]
FULL: dict[str, Any] = {
    "name": "x",
    "model": {"pooling": "none", "projector": "linear"},
    "image": {"size": 56, "mean": [0.1, 0.2, 0.3]},
    "lora": {"targets": ["q_proj"], "dropout": 0},
    "data": {"a": {"reader": "openi-xml", "path": "p"}},
    "stages": [{"name": "s", "data": ["a"], "trains": ["lora", "projector"], "epochs": 2}],
}


def read(raw: dict[str, Any]) -> TrainRecipe:
    return from_mapping(TrainRecipe, raw, where="r.toml")


def test_every_value_of_a_recipe_is_read() -> None:
    recipe = read(FULL)
    assert recipe.model.pooling == "none"
    assert recipe.image.mean == (0.1, 0.2, 0.3)
    assert recipe.data["a"].reader == "openi-xml"
    assert recipe.stages[0].trains == ("lora", "projector")
    assert isinstance(recipe.stages[0].epochs, float)
    assert isinstance(recipe.lora.dropout, float)


def test_round_trip_is_lossless() -> None:
    recipe = read(FULL)
    assert from_mapping(TrainRecipe, to_mapping(recipe), where="") == recipe
    assert to_mapping(recipe)["stages"][0]["data"] == ["a"]  # JSON-ready: no tuples


def test_a_young_field_is_written_only_where_it_says_something() -> None:
    """Hashes over recipes and prompts of before it stay, and an older rx-edge reads them."""
    old = {"template", "image_begin", "image_end", "end_of_report", "add_bos"}
    assert to_mapping(PromptConfig()).keys() == old
    assert to_mapping(read(FULL))["prompt"].keys() == old
    changed = override(read(FULL), ["prompt.views=frontal+lateral"], where="r.toml")
    assert to_mapping(changed)["prompt"].keys() == old | {"views"}
    assert changed.prompt.views == "frontal+lateral"
    assert read(to_mapping(changed)) == changed
    back = override(changed, ["prompt.views=one"], where="r.toml")
    assert to_mapping(back) == to_mapping(read(FULL))
    with pytest.raises(ConfigError, match="views is 'two'; valid: 'one', 'frontal\\+lateral'"):
        override(read(FULL), ["prompt.views=two"], where="r.toml")


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"sed": 1}, "r.toml: unknown key 'sed'; did you mean 'seed'?"),
        ({"image": {"sise": 1}}, "r.toml: image: unknown key 'sise'; did you mean 'size'?"),
        ({"stages": [{}, {"epoch": 1}]}, r"stages\[1\]: unknown key 'epoch'; .* 'epochs'"),
        ({"data": {"a": {"paht": ""}}}, r"data\.a: unknown key 'paht'; did you mean 'path'?"),
        ({"seed": "1"}, "seed is '1'; int is expected"),
        ({"seed": True}, "seed is True; int is expected"),
        ({"seed": 1.0}, "seed is 1.0; int is expected"),
        ({"lora": {"dropout": True}}, "dropout is True; float is expected"),
        ({"prompt": {"add_bos": 1}}, "add_bos is 1; bool is expected"),
        ({"name": 3}, "name is 3; str is expected"),
        ({"image": {"mean": [0.5, 0.5]}}, "mean has 2 entries; 3 are expected"),
        ({"image": {"std": 0.5}}, "std is 0.5; a list is expected"),
        ({"lora": {"targets": "q_proj"}}, "targets is 'q_proj'; a list is expected"),
        ({"lora": {"targets": [1]}}, r"targets\[0\] is 1; str is expected"),
        ({"export_dtype": "fp16"}, "export_dtype is 'fp16'; valid: 'float16', 'float32'"),
        ({"stages": [{"trains": ["all"]}]}, r"trains\[0\] is 'all'; valid: 'projector', 'lora'"),
        ({"image": 3}, "image is 3; a table is expected"),
        ({"data": []}, r"data is \[\]; a table is expected"),
    ],
)
def test_wrong_recipe_is_refused(raw: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        read(raw)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_shipped_recipes_load(path: Path) -> None:
    recipe = load_toml(path, TrainRecipe)
    assert recipe.stages
    assert {d for s in recipe.stages for d in s.data} <= recipe.data.keys()


def test_recipes_are_shipped() -> None:
    assert RECIPES


def test_every_setting_explains_itself() -> None:
    assert TrainRecipe in CLASSES
    for cls in CLASSES:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            hint = hints[field.name]
            inner = [hint, *typing.get_args(hint)]
            if not any(dataclasses.is_dataclass(h) for h in inner):
                assert field.metadata.get("help"), f"{cls.__name__}.{field.name}"


def test_unreadable_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml' cannot be read: No such file"):
        load_toml(tmp_path / "none.toml", TrainRecipe)
    bad = tmp_path / "bad.toml"
    for content in (b"seed = = 1", b"\xff\xfe"):
        bad.write_bytes(content)
        with pytest.raises(ConfigError, match="is not valid TOML"):
            load_toml(bad, TrainRecipe)
