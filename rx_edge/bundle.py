"""The deployment bundle: its manifest, its hashes, and every reason to refuse it.

A bundle is a directory that `manifest.json` describes completely. Files are hashed *before* any
parser sees them. A bundle is refused when it was written by newer code, when a file's bytes are
not those of the manifest, when it was never verified against the trained model, or when its parts
do not belong together (`pairing`, which each artefact also carries inside itself).

Does not cover: writing one (`rx_edge_export.export`), running one (`rx_edge.runtime`) and proving
that it equals the model (`rx_edge_export.verify`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from rx_edge.config import DRAFT_BANNER, GenerateConfig, ImageRecipe, PromptConfig
from rx_edge.config_io import from_mapping, to_mapping
from rx_edge.errors import BundleError, ConfigError

SCHEMA = 2
PROMPT_SCHEMA = 3  # its prompt says more: an {indication} slot, two views
MANIFEST = "manifest.json"
HASHING = 4  # files hashed at once; hashlib lets go of the interpreter's lock
DRAFTS = "drafts.bin"  # the report-corpus draft index (`rx_edge.draft_index`), where there is one


@dataclass(frozen=True)
class FileEntry:
    """What a file must be, byte for byte."""

    sha256: str = ""
    bytes: int = 0


@dataclass(frozen=True)
class Artifact:
    """One half of the model in one format.

    Attributes:
        file: path inside the bundle.
        format: name of the backend that reads it (`rx_edge.backends.registry`).
        precision: "fp32", "F16", "Q8_0" ...
        details: what the writer measured: opset, tensor-type histogram, sizes.
    """

    file: str = ""
    format: str = ""
    precision: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the user calls it: "gguf:Q8_0", "onnx:int8"."""
        return f"{self.format.partition('_')[2]}:{self.precision}"


@dataclass(frozen=True)
class StageResult:
    """One comparison with the trained model.

    Attributes:
        stage: "pixels", "soft_prompt", "prefill_logits", "greedy_tokens", "adapter" ...
        artifact: the file that was tested.
        canary: the study it was tested on.
        metric: what `value` is, with its direction; "max" and "kl" must stay below `tolerance`.
    """

    stage: str = ""
    artifact: str = ""
    canary: str = ""
    metric: str = ""
    value: float = 0.0
    tolerance: float = 0.0
    passed: bool = False


@dataclass(frozen=True)
class Verdict:
    """The outcome of a verification. No stages is not a pass.

    `notes` says what could not be checked on that machine, and where it is checked instead.
    """

    passed: bool = False
    stages: tuple[StageResult, ...] = ()
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(stages: list[StageResult], notes: tuple[str, ...] = ()) -> Verdict:
        """Passed only if something was compared and everything passed."""
        return Verdict(bool(stages) and all(s.passed for s in stages), tuple(stages), notes)

    def failures(self) -> list[StageResult]:
        """The stages that failed."""
        return [s for s in self.stages if not s.passed]


@dataclass(frozen=True)
class Manifest:
    """manifest.json, of the oldest schema that can say it (`schema_for`)."""

    schema: int = SCHEMA
    name: str = ""
    created: str = ""  # UTC, ISO 8601: the only field that differs between two equal exports
    banner: str = DRAFT_BANNER
    intended_use: str = ""
    files: dict[str, FileEntry] = field(default_factory=dict)
    pairing: str = ""  # hash over `parts`; every artefact carries it inside
    parts: dict[str, str] = field(default_factory=dict)  # hashes of what must stay together
    image: ImageRecipe = field(default_factory=ImageRecipe)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    soft_tokens: int = 0  # N
    width: int = 0  # D_lm
    vision: tuple[Artifact, ...] = ()  # the first one is the default
    language: tuple[Artifact, ...] = ()  # the first one is the default
    stock: tuple[Artifact, ...] = ()  # for other engines only: the runtime never opens them
    tokenizer: str = "tokenizer.json"
    canaries: tuple[str, ...] = ()
    lineage: dict[str, Any] = field(default_factory=dict)
    verification: Verdict = field(default_factory=Verdict)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose bytes have been checked.

    Attributes:
        digest: sha256 of manifest.json, which fixes every other byte.
    """

    root: Path
    manifest: Manifest
    digest: str

    def path(self, name: str) -> Path:
        """Absolute path of a file of the manifest.

        Raises:
            BundleError: the manifest does not list it, so its bytes were never checked.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{_name(self.root)} {name!r} is not listed in {MANIFEST}: not read")
        return self.root / name

    @property
    def drafts(self) -> Path | None:
        """The report-corpus draft index; None when the bundle has none."""
        return self.path(DRAFTS) if DRAFTS in self.manifest.files else None

    def vision(self, choice: str | Artifact | None = None) -> Artifact:
        """The vision artefact "onnx:int8" (or "int8": the first of that precision).

        Raises:
            BundleError: the bundle has none of that name.
        """
        return self._choose("vision", self.manifest.vision, choice)

    def language(self, choice: str | Artifact | None = None) -> Artifact:
        """The language artefact "gguf:Q8_0" (or "Q8_0": the first of that precision).

        Raises:
            BundleError: the bundle has none of that name.
        """
        return self._choose("language", self.manifest.language, choice)

    def _choose(
        self, half: str, artifacts: tuple[Artifact, ...], choice: str | Artifact | None
    ) -> Artifact:
        if isinstance(choice, Artifact):
            return choice
        for artifact in artifacts:
            if choice in (None, artifact.name, artifact.precision):
                return artifact
        have = ", ".join(a.name for a in artifacts) or "none"
        raise BundleError(f"{_name(self.root)} no {half} model {choice!r}; has: {have}")


def open_bundle(
    root: Path,
    *,
    allow_unverified: bool = False,
    meanwhile: Callable[[Manifest], None] = lambda _: None,
) -> Bundle:
    """Read the manifest and check every file it lists.

    Args:
        allow_unverified: accept a bundle without a passing verdict; every draft then says so.
        meanwhile: called while the files are hashed; it may not open any of them.

    Raises:
        BundleError: no bundle, damaged, newer than this code, or unverified.
    """
    try:
        raw_bytes = (root / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(
            f"{_name(root)} {MANIFEST} cannot be read ({error.strerror}); "
            "make a bundle with `rx-edge export RUN --out BUNDLE`"
        ) from error
    manifest = _parse(root, raw_bytes)
    if not manifest.verification.passed and not allow_unverified:
        raise BundleError(
            f"{_name(root)} it has no passing verification against the trained model; "
            "export it again (or add --allow-unverified, which marks every draft)"
        )
    check_files(root, manifest.files, meanwhile=lambda: meanwhile(manifest))
    _check_parts(root, manifest)
    return Bundle(root, manifest, hashlib.sha256(raw_bytes).hexdigest())


def check_files(
    root: Path, files: dict[str, FileEntry], *, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Compare size and sha256 of every listed file with the manifest.

    Args:
        meanwhile: called while the files are hashed.

    Raises:
        BundleError: a file is missing or differs; the first such file is named.
    """
    for name in files:
        _check_inside(root, name)
    with ThreadPoolExecutor(HASHING) as pool:
        checks = [pool.submit(_check_file, root, *item) for item in sorted(files.items())]
        try:
            meanwhile()
            for check in checks:
                check.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_file(root: Path, name: str, entry: FileEntry) -> None:
    try:
        found = describe(root / name)
    except OSError as error:
        raise BundleError(f"{_name(root)} {name}: {error.strerror}; restore the file") from error
    if found != entry:
        raise BundleError(
            f"{_name(root)} {name} has sha256 {found.sha256[:8]}... ({found.bytes} bytes), "
            f"{MANIFEST} says {entry.sha256[:8]}... ({entry.bytes} bytes); "
            "export it again or restore the file"
        )


def describe(path: Path) -> FileEntry:
    """sha256 and size of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileEntry(digest, stream.tell())


def pairing_hash(parts: dict[str, str]) -> str:
    """One hash over the hashes of what must stay together: encoder, LM, tokenizer, prompt."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def schema_for(prompt: PromptConfig) -> int:
    """The oldest schema of a manifest with this prompt: an older rx-edge reads what it can run."""
    since: dict[str, int] = {f.name: f.metadata.get("since", SCHEMA) for f in fields(prompt)}
    slot = PROMPT_SCHEMA if "{indication}" in prompt.template else SCHEMA
    return max(slot, *(since[name] for name in to_mapping(prompt)))


def prompt_hash(prompt: PromptConfig) -> str:
    """The part "prompt" of a pairing."""
    return _config_hash(prompt)


def image_hash(image: ImageRecipe) -> str:
    """The part "image" of a pairing."""
    return _config_hash(image)


def _config_hash(config: PromptConfig | ImageRecipe) -> str:
    return hashlib.sha256(json.dumps(to_mapping(config), sort_keys=True).encode()).hexdigest()


def _check_parts(root: Path, manifest: Manifest) -> None:
    """Prompt, image recipe and tokenizer must be those that the weights were trained with."""
    tokenizer = manifest.files.get(manifest.tokenizer, FileEntry()).sha256
    found = {
        "prompt": prompt_hash(manifest.prompt),
        "image": image_hash(manifest.image),
        "tokenizer": tokenizer,
    }
    for name, sha256 in found.items():
        if manifest.parts.get(name) != sha256:
            raise BundleError(
                f"{_name(root)} its {name} is not the one that the model was trained with "
                f"(pairing {manifest.pairing[:8]}); export it again or restore {MANIFEST}"
            )
    if pairing_hash(manifest.parts) != manifest.pairing:
        raise BundleError(f"{_name(root)} parts and pairing disagree; restore {MANIFEST}")


def _parse(root: Path, raw_bytes: bytes) -> Manifest:
    try:
        raw = json.loads(raw_bytes)
        schema = raw["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{_name(root)} {MANIFEST} is damaged: {error!r}; restore it") from error
    if schema not in (SCHEMA, PROMPT_SCHEMA):
        raise BundleError(
            f"{_name(root)} its schema is {schema!r}, this rx-edge reads {SCHEMA} and "
            f"{PROMPT_SCHEMA}; update rx-edge or export the model again"
        )
    try:
        manifest = from_mapping(Manifest, raw, where=MANIFEST)
    except ConfigError as error:
        raise BundleError(f"{_name(root)} {error}") from error
    if schema < schema_for(manifest.prompt):
        raise BundleError(
            f"{_name(root)} its schema is {schema}, but its prompt needs {PROMPT_SCHEMA} (an "
            f"indication or two views); export it again or restore {MANIFEST}"
        )
    said = manifest.verification  # a claim of "passed" without passed stages is none
    passed = said.passed and Verdict.of(list(said.stages)).passed
    return replace(manifest, verification=replace(said, passed=passed))


def _check_inside(root: Path, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise BundleError(f"{_name(root)} {MANIFEST} lists {name!r}, which is outside the bundle")


def _name(root: Path) -> str:
    return f"bundle {str(root)!r} is refused:"
