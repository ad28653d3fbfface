"""Which device each half of a bundle runs on, and what a reader is told of a second choice.

"auto" takes the GPU where this installation can use one. Where its memory is not enough, a shorter
KV cache is tried, then the processor; where the GPU's engine fails, the processor. Every step down
is a flag of every draft. "cuda" and "cpu" are orders: there is no second choice.

A bundle is verified on the exporter's processor. What runs on a GPU is therefore compared with the
trained model once more when it is opened (`self_check.py`).

Does not cover: loading (`rx_edge.backends`), choosing an artefact (`session.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rx_edge.backends import registry
from rx_edge.backends.base import LanguageBackend, VisionBackend
from rx_edge.bundle import Artifact, Bundle
from rx_edge.config import GenerateConfig, RuntimeConfig
from rx_edge.errors import BackendError, DeviceMemoryError
from rx_edge.prompting import MAX_INDICATION_TOKENS

TEXT = 128  # tokens of a prompt's own text, generously: it is a sentence
STEP = 64  # tokens by which a KV cache is rounded up


@dataclass(frozen=True)
class Placed:
    """An opened half.

    Attributes:
        generate: with the KV cache that fits.
        flags: what a reader of every draft must know about where it runs.
    """

    engine: Any
    generate: GenerateConfig
    flags: tuple[str, ...]


def open_language(
    bundle: Bundle,
    artifact: Artifact,
    generate: GenerateConfig,
    runtime: RuntimeConfig,
    *,
    exact: bool,
) -> Placed:
    """The language model on the first device that takes it.

    Raises:
        BackendError: none does; the last one's reason.
    """

    def load(device: str, fits: GenerateConfig) -> LanguageBackend:
        opened: LanguageBackend = registry.load(artifact.format).open(
            bundle.path(artifact.file),
            n_ctx=fits.n_ctx,
            threads=fits.threads,
            exact=exact,
            fused=runtime.fused_prefill,
            device=device,
        )
        return opened

    tries = [
        (device, fits)
        for device in devices(artifact, runtime)
        for fits in _contexts(bundle, generate, shorter=device != "cpu")
    ]
    return _first("the language model", tries, load)


def open_vision(
    bundle: Bundle, artifact: Artifact, generate: GenerateConfig, runtime: RuntimeConfig
) -> Placed:
    """The vision model on the first device that takes it.

    Raises:
        BackendError: none does; the last one's reason.
    """

    def load(device: str, _: GenerateConfig) -> VisionBackend:
        opened: VisionBackend = registry.load(artifact.format).open(
            bundle.path(artifact.file), threads=generate.threads, device=device
        )
        return opened

    tries = [(device, generate) for device in devices(artifact, runtime)]
    return _first("the vision model", tries, load)


def devices(artifact: Artifact, runtime: RuntimeConfig) -> tuple[str, ...]:
    """What `artifact` is tried on, in this order."""
    able: tuple[str, ...] = registry.load(artifact.format).devices()
    if runtime.device == "auto":
        return able
    # TensorRT has no processor to run on: its order stands, and its error says what is missing
    return (runtime.device,) if able != ("cuda",) else able


def _contexts(
    bundle: Bundle, generate: GenerateConfig, *, shorter: bool
) -> Iterator[GenerateConfig]:
    """As planned, then the shortest KV cache that still holds a whole draft."""
    yield generate
    manifest = bundle.manifest
    views = 1 if manifest.prompt.views == "one" else 2
    needed = TEXT + MAX_INDICATION_TOKENS + views * manifest.soft_tokens + generate.max_new_tokens
    least = -(-needed // STEP) * STEP
    if shorter and least < generate.n_ctx:
        yield replace(generate, n_ctx=least)


def _first(what: str, tries: list[tuple[str, GenerateConfig]], load: Any) -> Placed:
    flags: list[str] = []
    gone: set[str] = set()  # devices whose engine fails for another reason than memory
    for number, (device, fits) in enumerate(tries):
        if device in gone:
            continue
        try:
            return Placed(load(device, fits), fits, tuple(flags))
        except BackendError as error:
            if not isinstance(error, DeviceMemoryError):
                gone.add(device)
            rest = [(d, f) for d, f in tries[number + 1 :] if d not in gone]
            if not rest:
                raise
            flags = [_stepped_down(what, error, rest[0], same=rest[0][0] == device)]
    raise BackendError(f"{what} has no device to run on")


def _stepped_down(
    what: str, error: BackendError, then: tuple[str, GenerateConfig], *, same: bool
) -> str:
    short = isinstance(error, DeviceMemoryError)
    why = "the GPU has too little free memory" if short else f"the GPU cannot be used ({error})"
    if same:
        return f"{what} has a context of {then[1].n_ctx} tokens only: {why}"
    return f"{what} runs on the processor: {why}"
