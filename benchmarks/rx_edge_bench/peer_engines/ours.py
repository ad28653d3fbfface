"""rx-edge itself, as production runs it: `rx_edge.runtime.pipeline.draft` and its language half.

Does not cover: what the parts of our own path cost (`latency.py`, `levers.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from rx_edge.backends import registry
from rx_edge.backends.base import LanguageBackend, Segment
from rx_edge.bundle import Artifact
from rx_edge.closing import Closing
from rx_edge.config import RuntimeConfig
from rx_edge.runtime.decoding import Draft, decode, greedy
from rx_edge.runtime.pipeline import open_study
from rx_edge.runtime.session import Session, open_checked
from rx_edge.types import FloatArray, IntArray, Logits, Timings
from rx_edge_bench.deployment_loss import bundle_logits
from rx_edge_bench.latency import forget, run_to_end
from rx_edge_bench.peer_engines.base import Answer, Job, Picture, random_ids

NO_END = -1  # a token that no model chooses: the length is fixed


class RxEdge(Closing):
    """The whole pipeline."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.weights = session.artifact.name
        self.settings: dict[str, Any] = {
            "vision": session.vision_artifact.name,
            "drafts": session.drafter is not None,
        }
        self._drafted: set[Path] = set()
        self._dictation: _Dictation | None = None

    def draft(self, picture: Picture) -> Answer:
        """The study itself, not the prepared square; never from memory of its own earlier draft."""
        if picture.study in self._drafted:
            forget(self.session)
            self._drafted.clear()
        self._drafted.add(picture.study)
        if picture.report is not None:
            self._dictate(picture.report)
        started = time.perf_counter()
        report = run_to_end(self.session, picture.study)
        return Answer(report.token_ids, report.text, time.perf_counter() - started)

    def margin(self, picture: Picture, ids: Sequence[int]) -> float:
        """By how many logits our choice after a draft's first `ids` beats the next best; untimed.

        All tokens go in at once, which rounds a little otherwise than decoding did.
        """
        session = self.session
        soft = session.vision.encode(open_study(session, picture.study).images.pixels)[0]
        logits = bundle_logits(session, soft, [*ids, session.prompt.end])[len(ids)]
        second, first = np.partition(logits, -2)[-2:]
        return float(first - second)

    def close(self) -> None:
        """Free both engines."""
        self.session.close()

    def _dictate(self, report: Sequence[int]) -> None:
        session = self.session
        if self._dictation is None:
            self._dictation = _Dictation(session.language)
            session.language = cast(LanguageBackend, self._dictation)
        self._dictation.script = (*report, session.prompt.end)


def open_ours(job: Job, *, drafts: bool, vision: str | None = None) -> RxEdge:
    """The session of one comparison.

    Args:
        vision: a vision artefact; None = the bundle's default.

    Raises:
        BundleError, BackendError: refused.
    """
    return RxEdge(
        open_checked(
            job.bundle,
            vision=vision,
            language=job.artifact,
            max_new_tokens=job.limit,
            threads=job.threads,
            runtime=RuntimeConfig(drafts=drafts),
        )
    )


class _Dictation:
    """A language model that computes as ever; then the script's next token has the best logit."""

    def __init__(self, language: LanguageBackend) -> None:
        self._language = language
        self._first = 0  # tokens in the KV cache before the script's first
        self.script: tuple[int, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._language, name)

    def prefill(self, segments: Sequence[Segment]) -> FloatArray:
        logits = self._language.prefill(segments)
        self._first = self._language.position
        self._dictate(logits[None], 0)
        return logits

    def step(self, ids: IntArray) -> Logits:
        at = self._language.position - self._first + 1
        rows = self._language.step(ids)
        self._dictate(rows, at)
        return rows

    def _dictate(self, rows: Logits, at: int) -> None:
        for row, token in zip(rows, self.script[at:], strict=False):
            row[token] = np.inf


class Language(Closing):
    """A language artefact of ours, drafts off: `prefill` and `decode` as the pipeline calls them.

    The model's choice is computed and then replaced by a random token, so that no text ends early
    or is stopped as a loop.
    """

    def __init__(self, job: Job, artifact: Artifact, *, soft: bool = False) -> None:
        """Open `artifact`.

        Args:
            soft: read the image's place as embeddings, as in a real draft, instead of as ids.

        Raises:
            BackendError: the engine cannot run it.
        """
        self._language: LanguageBackend = registry.load(artifact.format).open(
            job.bundle.path(artifact.file), n_ctx=job.n_ctx, threads=job.threads
        )
        self._soft_tokens = job.bundle.manifest.soft_tokens if soft else 0
        self.weights = artifact.name
        self.settings: dict[str, Any] = {"embeddings": self._soft_tokens}

    def write(self, prompt: Sequence[int], tokens: int) -> float:
        """Seconds for a text of exactly `tokens` tokens."""
        language, script = self._language, _Script(random_ids(tokens, self.n_vocab, tokens))
        segments = self._segments(np.asarray(prompt, np.int32))
        started = time.perf_counter()
        language.rewind(0)
        logits = language.prefill(segments)
        growing = Draft(end=NO_END, limit=tokens, choose=script, timings=Timings())
        for _ in decode(language, logits, growing, None):
            pass
        seconds = time.perf_counter() - started
        assert len(growing.ids) == tokens
        return seconds

    @property
    def n_vocab(self) -> int:
        """V."""
        return self._language.n_vocab

    def close(self) -> None:
        """Free the engine."""
        self._language.close()

    def _segments(self, ids: IntArray) -> list[Segment]:
        if not self._soft_tokens:
            return [ids]
        # as in the prompt: text, image, text
        first = (len(ids) - self._soft_tokens) // 2
        rng = np.random.default_rng(int(ids[0]))
        rows: FloatArray = rng.standard_normal(
            (self._soft_tokens, self._language.n_embd), np.float32
        )
        return [ids[:first], rows, ids[first + self._soft_tokens :]]


class _Script:
    """Chooses as production does, and says what was written down."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = iter(ids)

    def __call__(self, logits: FloatArray) -> int:
        greedy(logits)
        return next(self._ids)
