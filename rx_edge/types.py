"""The values that travel down the pipeline, with their shapes and units.

Nothing here computes; nothing here knows a file format. The order is the data's order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rx_edge.errors import RxEdgeError

FloatArray: TypeAlias = NDArray[np.float32]
IntArray: TypeAlias = NDArray[np.int32]

ImageTensor: TypeAlias = FloatArray  # (B, 3, S, S), normalised by an ImageRecipe
SoftPrompt: TypeAlias = FloatArray  # (N, D_lm), image embeddings in the LM's input space
Logits: TypeAlias = FloatArray  # (T, V), natural-log odds, unnormalised


@dataclass(frozen=True)
class Radiograph:
    """One projection radiograph as a person would see it.

    Attributes:
        pixels: float32 (H, W) in [0, 1]; 0 is black and 1 is white on a display, so bone is
            bright whatever PhotometricInterpretation (PS3.3 C.7.6.3.1.2) the file had.
        pixel_sha256: sha256 of shape + `pixels`; the cache key of everything computed from it.
        view: ViewPosition (PS3.3 C.8.11.5) such as "PA", "AP", "LL", or None when not stated.
        source_format: "dicom", "png" or "jpeg".
        notes: what the reader had to assume, in words for the user; never patient data.
        provenance: technical attributes only (TransferSyntaxUID, PhotometricInterpretation...).
    """

    pixels: FloatArray
    pixel_sha256: str
    view: str | None = None
    source_format: str = "dicom"
    notes: tuple[str, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyInput:
    """What one draft is written from. Where one is asked for, the path of an image will do.

    Attributes:
        image: DICOM, PNG or JPEG file; the frontal image, where there are two.
        lateral: the lateral image of the same study, for models that read two views.
        indication: why the study was asked for, in free text; it may identify a patient, so it is
            never logged.
    """

    image: Path
    lateral: Path | None = None
    indication: str = field(default="", repr=False)

    @staticmethod
    def of(study: StudyInput | Path) -> StudyInput:
        """An image file alone is a study, too."""
        return StudyInput(study) if isinstance(study, Path) else study

    @property
    def images(self) -> tuple[Path, ...]:
        """The files in the order of their soft prompts."""
        return (self.image,) if self.lateral is None else (self.image, self.lateral)


@dataclass(frozen=True)
class TokenChunk:
    """What the language model produced in one step.

    Attributes:
        text: complete UTF-8 characters that became printable with this step (may be empty).
        ids: the token ids of this step.
        logprobs: natural-log probability of each id, where `RuntimeConfig.logprobs` asks for it.
        seconds: wall time of the step.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    seconds: float


@dataclass
class Timings:
    """Seconds per stage of one study, and the work counted in tokens and passes.

    Attributes:
        read: file to `Radiograph`: parse, decode pixels, render for display.
        prefill, decode, detokenise: `decode` contains `detokenise`.
        gaps: seconds between the chunks of the stream, the first one excluded.
        cached_tokens: of `prompt_tokens`, those kept in the KV cache from an earlier study.
        drafted_tokens: proposed by the draft index and fed to the model.
        accepted: proposed tokens that the model would have chosen, per decode pass.
    """

    read: float = 0.0
    prepare: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    detokenise: float = 0.0
    time_to_first_token: float = 0.0
    total: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    decode_passes: int = 0
    drafted_tokens: int = 0
    accepted: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """A draft report. `status` is always "draft": rx-edge never issues a final one.

    Attributes:
        text: the draft's text without the banner.
        banner: the sentence that must accompany the text wherever it is shown.
        flags: what a reader must know before trusting the text (length limit reached, ...).
        token_ids: the ids behind `text`, end-of-text excluded.
        finish: "end" (the model ended), "length" (the limit cut it) or "loop" (stopped because it
            repeats itself).
        provenance: bundle digest, backends and their devices, recipe, image hash.
    """

    text: str
    banner: str
    flags: tuple[str, ...]
    token_ids: tuple[int, ...]
    finish: str
    timings: Timings
    provenance: dict[str, str]
    status: str = "draft"


@dataclass(frozen=True)
class Result:
    """One study's outcome in a worklist: exactly one of `report` and `error` is set."""

    index: int
    study: Path
    report: Report | None = None
    error: RxEdgeError | None = None
