"""Open a bundle for drafting: checked files, matching parts, loaded engines, and what runs where.

Does not cover: studies (`pipeline.py`). One session belongs to one thread.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rx_edge.backends import registry
from rx_edge.backends.base import LanguageBackend, VisionBackend
from rx_edge.bundle import Artifact, Bundle, open_bundle
from rx_edge.config import GenerateConfig
from rx_edge.errors import BundleError
from rx_edge.prompting import PromptIds, load_tokenizer, prompt_ids


@dataclass
class Session:
    """A loaded bundle.

    Attributes:
        notes: sentences for the user about what was chosen and why.
        unverified: True when the bundle was accepted without a passing verdict.
    """

    bundle: Bundle
    artifact: Artifact
    vision: VisionBackend
    language: LanguageBackend
    tokenizer: Any
    prompt: PromptIds
    generate: GenerateConfig
    notes: tuple[str, ...]
    unverified: bool

    def close(self) -> None:
        """Free both engines."""
        self.vision.close()
        self.language.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_session(
    root: Path,
    *,
    precision: str | None = None,
    max_new_tokens: int | None = None,
    threads: int | None = None,
    allow_unverified: bool = False,
) -> Session:
    """Check and load a bundle.

    Args:
        precision: of the language model; None = the bundle's default.
        max_new_tokens, threads: override the bundle's settings.

    Raises:
        BundleError: refused; see `rx_edge.bundle`.
        BackendError: an engine cannot run it.
    """
    bundle = open_bundle(root, allow_unverified=allow_unverified)
    return open_checked(bundle, precision=precision, max_new_tokens=max_new_tokens, threads=threads)


def open_checked(
    bundle: Bundle,
    *,
    precision: str | None = None,
    max_new_tokens: int | None = None,
    threads: int | None = None,
    exact: bool = False,
) -> Session:
    """Load a bundle whose files are already checked; `exact` asks for parity-grade arithmetic."""
    manifest, artifact = bundle.manifest, bundle.language(precision)
    generate = manifest.generate
    if max_new_tokens is not None:
        generate = replace(generate, max_new_tokens=max_new_tokens)
    if threads is not None:
        generate = replace(generate, threads=threads)
    tokenizer = load_tokenizer(bundle.path(manifest.tokenizer))
    vision: VisionBackend = registry.load(manifest.vision.format).open(
        bundle.path(manifest.vision.file), threads=generate.threads
    )
    try:
        language: LanguageBackend = registry.load(artifact.format).open(
            bundle.path(artifact.file),
            n_ctx=generate.n_ctx,
            threads=generate.threads,
            exact=exact,
        )
    except BaseException:
        vision.close()
        raise
    session = Session(
        bundle=bundle,
        artifact=artifact,
        vision=vision,
        language=language,
        tokenizer=tokenizer,
        prompt=prompt_ids(manifest.prompt, tokenizer),
        generate=generate,
        notes=_what_runs_where(manifest.vision, vision, artifact, language, precision),
        unverified=not manifest.verification.passed,
    )
    try:
        _check_pairing(session)
    except BaseException:
        session.close()
        raise
    return session


def _what_runs_where(
    vision_artifact: Artifact,
    vision: VisionBackend,
    artifact: Artifact,
    language: LanguageBackend,
    precision: str | None,
) -> tuple[str, ...]:
    reason = "asked for" if precision else "the bundle's default"
    return (
        f"vision: {vision_artifact.format} {vision_artifact.precision} on {vision.device}",
        f"language: {artifact.format} {artifact.precision} on {language.device} ({reason})",
    )


def _check_pairing(session: Session) -> None:
    """Every artefact carries the pairing hash inside; a foreign one has the right shape at best."""
    manifest = session.bundle.manifest
    for file, found in (
        (manifest.vision.file, session.vision.pairing),
        (session.artifact.file, session.language.pairing),
    ):
        if found != manifest.pairing:
            raise BundleError(
                f"bundle {str(session.bundle.root)!r} is refused: {file} belongs to model "
                f"{(found or 'unknown')[:8]}, the manifest describes {manifest.pairing[:8]}; "
                "vision, language and prompt must come from one export"
            )
    if session.language.n_embd != manifest.width:
        raise BundleError(
            f"bundle {str(session.bundle.root)!r} is refused: the language model is "
            f"{session.language.n_embd} wide, the soft prompt {manifest.width}"
        )
