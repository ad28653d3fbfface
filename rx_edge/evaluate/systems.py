"""What can be evaluated: a directory that is a training run, or one that is a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from rx_edge.bundle import MANIFEST, open_bundle
from rx_edge.config import GenerateConfig, PromptConfig, TrainRecipe
from rx_edge.config_io import load_toml
from rx_edge.errors import UsageError
from rx_edge.types import SoftPrompt, StudyInput

Kind: TypeAlias = Literal["run", "bundle"]


@dataclass(frozen=True)
class Settings:
    """How systems are opened; the same for both of a comparison.

    Attributes:
        max_new_tokens: drafts are cut there.
        threads: CPU threads; None = as the run or bundle says.
        vision, language: artefacts of a bundle by name; None = its default.
        allow_unverified: accept a bundle without a passing verdict; the result says so.
    """

    max_new_tokens: int = GenerateConfig().max_new_tokens
    threads: int | None = None
    vision: str | None = None
    language: str | None = None
    allow_unverified: bool = False


@dataclass(frozen=True)
class Prompted:
    """What a draft is written from.

    Attributes:
        soft: of V images, (V N, D_lm).
        indication: as it stands in the prompt; "" = not stated.
    """

    soft: SoftPrompt
    indication: str = ""


class System(AbstractContextManager["System"], Protocol):
    """Something that turns a study into a draft, in two steps."""

    about: dict[str, Any]  # JSON-ready: what it is and what runs where; no path
    prompt: PromptConfig  # says what it reads: how many views, and whether an indication

    def encode(self, study: StudyInput) -> Prompted:
        """The soft prompt of the study's images, and its indication.

        Raises:
            UsageError, InputError: a file is no usable chest radiograph, the indication spells out
                a special token, or the system does not read what the study has.
        """

    def write(self, prompts: Sequence[Prompted]) -> list[str]:
        """The greedy draft after each."""


def kind(path: Path) -> Kind:
    """What `path` is.

    Raises:
        UsageError: neither a finished run nor a bundle.
    """
    if (path / MANIFEST).is_file():
        return "bundle"
    if (path / "recipe.toml").is_file():
        return "run"
    raise UsageError(
        f"{str(path)!r} is neither a bundle ({MANIFEST}) nor a training run (recipe.toml); "
        "name the output of `rx-edge export` or `rx-edge train`"
    )


def check(path: Path, settings: Settings) -> tuple[Kind, PromptConfig]:
    """What `path` is and reads; a bundle is checked too, before another system works for an hour.

    Raises:
        UsageError: neither a finished run nor a bundle.
        BundleError: the bundle is refused, or has no such artefact.
        ConfigError: the run's recipe is wrong.
    """
    found = kind(path)
    if found == "run":
        return found, load_toml(path / "recipe.toml", TrainRecipe).prompt
    bundle = open_bundle(path, allow_unverified=settings.allow_unverified)
    bundle.vision(settings.vision)
    bundle.language(settings.language)
    return found, bundle.manifest.prompt


def open_system(path: Path, settings: Settings) -> System:
    """Load what lies at `path`.

    Raises:
        UsageError: neither a run nor a bundle.
        BundleError, BackendError, ModelError: it does not open.
    """
    if kind(path) == "run":
        from rx_edge.evaluate.run_system import RunSystem

        return RunSystem(path, settings)
    from rx_edge.evaluate.bundle_system import BundleSystem

    return BundleSystem(path, settings)
