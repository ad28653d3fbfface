"""What a recipe must be before anything is trained by it.

Does not cover: single values (`rx_edge.config_io`), the run directory (`run.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rx_edge.config import TrainRecipe
from rx_edge.errors import ConfigError
from rx_edge.optional import require
from rx_edge.prompting import INDICATION, takes_indication
from rx_edge.train.data import Corpus
from rx_edge.train.data.studies import BOTH

RESERVED = ("final", "features", "tensorboard")  # directories of the run that are no stages


def check_recipe(recipe: TrainRecipe, path: Path) -> None:
    """Refuse what would fail, or be pointless, once the data is read.

    Raises:
        ConfigError: with the key, its value and what to do.
        MissingExtraError: the recipe needs a package that is not installed.
    """
    if not recipe.stages:
        raise ConfigError(f"{path}: no [[stages]]: nothing to train")
    names = [s.name for s in recipe.stages]
    if "" in names or len(set(names)) != len(names):
        raise ConfigError(f"{path}: every stage needs a name of its own, got {names}")
    _check_engine(recipe, path)
    _check_views(recipe, path)
    if recipe.checkpoint_every < 1:
        raise ConfigError(f"{path}: checkpoint_every is {recipe.checkpoint_every}; at least 1")
    _check_numbers(recipe, path)
    for stage in recipe.stages:
        if not stage.name.replace("-", "").replace("_", "").isalnum() or stage.name in RESERVED:
            raise ConfigError(
                f"{path}: stage name {stage.name!r} must be letters, digits, '-' or '_', and "
                f"none of {', '.join(RESERVED)}: it names a directory of the run"
            )
        if stage.batch_size < 1 or not 0 < stage.epochs < float("inf"):
            raise ConfigError(
                f"{path}: stage {stage.name!r} has batch_size {stage.batch_size} and epochs "
                f"{stage.epochs}; batch_size >= 1 and epochs > 0 are needed"
            )
        unknown = [d for d in stage.data if d not in recipe.data]
        if unknown or not stage.data:
            raise ConfigError(
                f"{path}: stage {stage.name!r} uses data {list(stage.data)}; "
                f"known: {', '.join(recipe.data) or 'none'}"
            )


def _check_numbers(recipe: TrainRecipe, path: Path) -> None:
    """What the optimiser or the adapter would choke on; NaN is in no range."""
    lora, infinite = recipe.lora, float("inf")
    checks = [
        ("lora.r", lora.r, lora.r >= 1, "at least 1"),
        ("lora.alpha", lora.alpha, lora.alpha >= 1, "at least 1"),
        ("lora.dropout", lora.dropout, 0 <= lora.dropout < 1, "in [0, 1)"),
    ]
    for index, stage in enumerate(recipe.stages):
        rate, clip, warm = stage.learning_rate, stage.max_grad_norm, stage.warmup_fraction
        at = f"stages.{index}"
        checks += [
            (f"{at}.learning_rate", rate, 0 < rate < infinite, "above 0"),
            (f"{at}.max_grad_norm", clip, clip > 0, "above 0"),
            (f"{at}.warmup_fraction", warm, 0 <= warm <= 1, "in [0, 1]"),
            (f"{at}.weight_decay", stage.weight_decay, 0 <= stage.weight_decay < infinite,
             "0 or more"),
        ]  # fmt: skip
    for name, value, good, wanted in checks:
        if not good:
            raise ConfigError(f"{path}: {name} is {value}; it must be {wanted}")


def _check_engine(recipe: TrainRecipe, path: Path) -> None:
    for name in ("pack_tokens", "accumulate"):
        if getattr(recipe.engine, name) < 1:
            raise ConfigError(
                f"{path}: engine.{name} is {getattr(recipe.engine, name)}; at least 1"
            )
    for stage in recipe.stages:
        never = stage.patience > 0 and stage.validate_every == 0
        if never or min(stage.validate_every, stage.patience) < 0:
            raise ConfigError(
                f"{path}: stage {stage.name!r} has patience {stage.patience} and validate_every "
                f"{stage.validate_every}; patience counts validations: set validate_every too"
            )
    if recipe.engine.tensorboard:
        require("tensorboard", extra="tensorboard")
    if recipe.engine.load_in_4bit:
        require("bitsandbytes", extra="qlora")
        if any("lm" in stage.trains for stage in recipe.stages):
            raise ConfigError(f"{path}: engine.load_in_4bit freezes the LM; train lora, not lm")


def _check_views(recipe: TrainRecipe, path: Path) -> None:
    two = [name for name, corpus in recipe.data.items() if corpus.views == BOTH]
    if recipe.prompt.views != BOTH and two:
        raise ConfigError(
            f"{path}: data.{two[0]}.views is {BOTH!r} and prompt.views {recipe.prompt.views!r}: a "
            f"model of one view has no place for the lateral image; set prompt.views = {BOTH!r} too"
        )
    if recipe.prompt.views == BOTH and not _used(recipe).intersection(two):
        raise ConfigError(
            f"{path}: prompt.views is {BOTH!r} and no stage reads a corpus so; set "
            f"data.NAME.views = {BOTH!r} for one of: {', '.join(recipe.data) or 'none'}"
        )


def check_corpora(recipe: TrainRecipe, corpora: Mapping[str, Corpus]) -> None:
    """Refuse a prompt with a place that no training study fills: it would never be learned.

    Raises:
        ConfigError: an {indication} slot without indications, two views without lateral images.
    """
    train = [s for name in sorted(_used(recipe)) for s in corpora[name].split("train")]
    if takes_indication(recipe.prompt) and not any(s.indication for s in train):
        raise ConfigError(
            f"prompt.template has an {INDICATION} slot, and no training study of "
            f"{', '.join(corpora)} has an indication; remove it, or add a corpus that has some"
        )
    if recipe.prompt.views == BOTH and not any(s.lateral for s in train):
        raise ConfigError(
            f"prompt.views is {BOTH!r}, and no training study of {', '.join(corpora)} has a "
            "lateral image here; see `rx-edge data check`, or set prompt.views = 'one'"
        )


def _used(recipe: TrainRecipe) -> set[str]:
    return {name for stage in recipe.stages for name in stage.data}
