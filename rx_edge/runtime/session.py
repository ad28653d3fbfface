"""Open a bundle for drafting: checked files, matching parts, loaded engines, and what runs where.

Does not cover: studies (`pipeline.py`). One session belongs to one thread.
"""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rx_edge.backends import registry
from rx_edge.backends.base import LanguageBackend, VisionBackend
from rx_edge.bundle import Artifact, Bundle, Manifest, open_bundle
from rx_edge.closing import Closing
from rx_edge.config import GenerateConfig, RuntimeConfig
from rx_edge.draft_index import open_drafts
from rx_edge.errors import BundleError
from rx_edge.prompting import PromptIds, load_tokenizer, prompt_ids
from rx_edge.runtime import placement, self_check, tuning
from rx_edge.runtime.drafting import Drafter


@dataclass
class Session(Closing):
    """A loaded bundle.

    Attributes:
        prompt: token ids around the image slot of a study without an indication.
        drafter: proposes tokens, which the language model verifies; None = switched off.
        notes: sentences for the user about what was chosen and why.
        warnings: what the verification said about the artefacts in use; flags of every draft.
        unverified: True when the bundle was accepted without a passing verdict.
    """

    bundle: Bundle
    vision_artifact: Artifact
    artifact: Artifact
    vision: VisionBackend
    language: LanguageBackend
    tokenizer: Any
    prompt: PromptIds
    generate: GenerateConfig
    runtime: RuntimeConfig
    drafter: Drafter | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    unverified: bool

    def prompt_for(self, indication: str) -> PromptIds:
        """Token ids around the image slot of a study; "" = the indication is not stated.

        Raises:
            InputError: this model takes none, or a control token is in it.
        """
        if not indication:
            return self.prompt
        return prompt_ids(self.bundle.manifest.prompt, self.tokenizer, indication)

    def close(self) -> None:
        """Free both engines."""
        self.vision.close()
        self.language.close()
        if self.drafter:
            self.drafter.close()


def open_session(
    root: Path,
    *,
    vision: str | None = None,
    language: str | None = None,
    max_new_tokens: int | None = None,
    threads: int | None = None,
    allow_unverified: bool = False,
    runtime: RuntimeConfig | None = None,
) -> Session:
    """Check and load a bundle.

    Args:
        vision, language: artefacts by name, e.g. "onnx:int8", "gguf:Q8_0" or just "Q8_0";
            None = the bundle's default.
        max_new_tokens, threads: override the bundle's settings.
        runtime: levers of speed, and sampling; None = the defaults.

    Raises:
        BundleError: refused; see `rx_edge.bundle`.
        BackendError: an engine cannot run it.
    """
    bundle = open_bundle(root, allow_unverified=allow_unverified, meanwhile=_import_ahead)
    return open_checked(
        bundle,
        vision=vision,
        language=language,
        max_new_tokens=max_new_tokens,
        threads=threads,
        runtime=runtime,
    )


def open_checked(
    bundle: Bundle,
    *,
    vision: str | Artifact | None = None,
    language: str | Artifact | None = None,
    max_new_tokens: int | None = None,
    threads: int | None = None,
    exact: bool = False,
    runtime: RuntimeConfig | None = None,
) -> Session:
    """Load a bundle whose files are already checked; `exact` asks for parity-grade arithmetic."""
    manifest, runtime = bundle.manifest, runtime or RuntimeConfig()
    sees, writes = bundle.vision(vision), bundle.language(language)
    generate = manifest.generate
    if max_new_tokens is not None:
        generate = replace(generate, max_new_tokens=max_new_tokens)
    if threads is not None:
        generate = replace(generate, threads=threads)
    # none of the three waits for another, and each lets go of the interpreter's lock
    with ThreadPoolExecutor(2) as pool:
        seeing = pool.submit(placement.open_vision, bundle, sees, generate, runtime)
        reading = pool.submit(load_tokenizer, bundle.path(manifest.tokenizer))
        try:
            mouth = placement.open_language(bundle, writes, generate, runtime, exact=exact)
        except BaseException:
            if not seeing.exception():
                seeing.result().engine.close()
            raise
    try:
        eyes, tokenizer = seeing.result(), reading.result()
    except BaseException:
        mouth.engine.close()
        if not seeing.exception():
            seeing.result().engine.close()
        raise
    prompt = prompt_ids(manifest.prompt, tokenizer)
    session = Session(
        bundle=bundle,
        vision_artifact=sees,
        artifact=writes,
        vision=eyes.engine,
        language=mouth.engine,
        tokenizer=tokenizer,
        prompt=prompt,
        generate=mouth.generate,
        runtime=runtime,
        drafter=None,
        notes=(
            _note("vision", sees, eyes.engine.device, vision),
            _note("language", writes, mouth.engine.device, language),
        ),
        warnings=(
            *eyes.flags,
            *mouth.flags,
            *_warnings(manifest.verification.notes, sees, writes),
        ),
        unverified=not manifest.verification.passed,
    )
    try:
        _check_pairing(session)
        self_check.check(session)
        session.drafter = _drafter(bundle, prompt.end, runtime)
        _tune(session)
    except BaseException:
        session.close()
        raise
    return session


def _import_ahead(manifest: Manifest) -> None:
    """Import what the bundle needs while its files are hashed: two cores, one interpreter."""
    for artifact in (*manifest.vision[:1], *manifest.language[:1]):
        registry.load(artifact.format).is_available()
    importlib.import_module("rx_edge.radiograph")  # pydicom and its codecs: a study comes next


def _drafter(bundle: Bundle, end: int, runtime: RuntimeConfig) -> Drafter | None:
    if not (runtime.drafts and runtime.max_draft):
        return None
    return Drafter(open_drafts(bundle), end, runtime.max_draft)


def _tune(session: Session) -> None:
    """What was measured on this machine (`rx-edge tune`), where it was."""
    profile = tuning.stored(session)
    if profile:
        tuning.apply(session, profile)
        session.notes += (f"speed: as measured on this machine, {profile.threads} threads",)


def _warnings(notes: tuple[str, ...], *artifacts: Artifact) -> tuple[str, ...]:
    """What the verification said about the artefacts in use."""
    return tuple(n for n in notes if any(n.startswith(f"{a.file}: ") for a in artifacts))


def _note(half: str, artifact: Artifact, device: str, asked: str | Artifact | None) -> str:
    reason = "asked for" if asked else "the bundle's default"
    return f"{half}: {artifact.format} {artifact.precision} on {device} ({reason})"


def _check_pairing(session: Session) -> None:
    """Every artefact carries the pairing hash inside; a foreign one has the right shape at best."""
    manifest = session.bundle.manifest
    for file, found in (
        (session.vision_artifact.file, session.vision.pairing),
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
