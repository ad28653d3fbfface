"""A bundle as it runs in production: its guards, engines, arithmetic and draft index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rx_edge.evaluate.systems import Prompted, Settings
from rx_edge.prompting import fitted_indication, layout
from rx_edge.runtime.decoding import decode
from rx_edge.runtime.pipeline import encode, new_draft, open_study, text_of
from rx_edge.runtime.session import open_session
from rx_edge.types import StudyInput, Timings


class BundleSystem:
    """See `rx_edge.evaluate.systems.System`."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._session = open_session(
            path,
            vision=settings.vision,
            language=settings.language,
            max_new_tokens=settings.max_new_tokens,
            threads=settings.threads,
            allow_unverified=settings.allow_unverified,
        )
        session = self._session
        self.prompt = session.bundle.manifest.prompt
        self.about: dict[str, Any] = {
            "kind": "bundle",
            "label": path.resolve().name,
            "model": session.bundle.manifest.name,
            "bundle_sha256": session.bundle.digest,
            "encoder_sha256": session.bundle.manifest.parts.get("encoder"),
            "verified": not session.unverified,
            "vision": f"{session.vision_artifact.name} on {session.vision.device}",
            "language": f"{session.artifact.name} on {session.language.device}",
        }

    def encode(self, study: StudyInput) -> Prompted:
        """Its V images -> (V N, D_lm), with the indication fitted."""
        opened = open_study(self._session, study)
        soft_prompt = encode(self._session, opened.images.pixels, opened.timings)
        indication, _ = fitted_indication(self._session.tokenizer, study.indication)
        return Prompted(soft_prompt, indication)

    def write(self, prompts: Sequence[Prompted]) -> list[str]:
        """One draft after the other, as `rx-edge report` decodes."""
        return [self._write(one) for one in prompts]

    def _write(self, given: Prompted) -> str:
        session, timings = self._session, Timings()
        segments = layout(session.prompt_for(given.indication), given.soft)
        timings.prompt_tokens = sum(map(len, segments))
        session.language.rewind(0)
        logits = session.language.prefill(segments)
        growing = new_draft(session, timings, session.drafter)
        for _ in decode(session.language, logits, growing, session.drafter):
            pass
        return text_of(session, growing.ids)

    def __enter__(self) -> BundleSystem:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._session.close()
