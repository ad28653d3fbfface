"""What a timed engine is given and gives back.

Two kinds are timed. A `Drafter` goes from image file to text. A `Writer` is a language model alone:
it reads token ids and writes a fixed number of tokens, whatever they say. Both are context
managers, and `rx_edge_bench.peers` decides whose turn it is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rx_edge.bundle import Artifact, Bundle


@dataclass(frozen=True)
class Picture:
    """One study: the file as it came, and the square that `rx-edge prepare` makes of it.

    Attributes:
        square: PNG, 8 bits.
        report: token ids to write, the end token excluded: the engine computes as ever and is
            then made to choose these. None = it writes its own draft.
    """

    study: Path
    square: Path
    report: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Answer:
    """A finished draft, the end token excluded, and the seconds from file to text."""

    ids: tuple[int, ...]
    text: str
    seconds: float


@dataclass(frozen=True)
class Job:
    """What all engines share in one comparison.

    Attributes:
        artifact: the GGUF language artefact that llama.cpp and OpenVINO GenAI read.
        run: the training run that the bundle was exported from; None = not named.
        limit: most new tokens of a draft.
        threads: CPU threads of every engine.
    """

    bundle: Bundle
    artifact: Artifact
    run: Path | None
    end: int
    limit: int
    threads: int

    @property
    def llm(self) -> Path:
        """The language model's file."""
        return self.bundle.path(self.artifact.file)

    @property
    def n_ctx(self) -> int:
        """Tokens of the KV cache."""
        return self.bundle.manifest.generate.n_ctx


class Engine(Protocol):
    """What both kinds have.

    Attributes:
        weights: what it computes with, e.g. "gguf:Q8_0".
        settings: what differs from its defaults, and what a reader must know; JSON-ready.
    """

    weights: str
    settings: dict[str, Any]

    def close(self) -> None:
        """Free it."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class Drafter(Engine, Protocol):
    """From image file to text."""

    def draft(self, picture: Picture) -> Answer:
        """One greedy draft, or the picture's report."""
        ...


class Writer(Engine, Protocol):
    """A language model alone."""

    def write(self, prompt: Sequence[int], tokens: int) -> float:
        """Seconds to read `prompt` into an empty KV cache and write exactly `tokens` tokens."""
        ...


def random_ids(n: int, n_vocab: int, seed: int) -> list[int]:
    """Token ids to read or to write where only their number matters, as llama-bench's."""
    drawn = random.Random(seed)
    return [drawn.randrange(n_vocab) for _ in range(n)]
