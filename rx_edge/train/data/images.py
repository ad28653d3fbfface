"""A sample's image, opened; what fails is named by study id.

Paths of a corpus may hold patient ids, so messages here say the study's id and never the path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rx_edge.errors import InputError, UsageError
from rx_edge.radiograph import open_radiograph
from rx_edge.train.data import Sample
from rx_edge.types import Radiograph

Tick = Callable[[], None]


@contextmanager
def naming(sample: Sample) -> Iterator[Path]:
    """Yield the image's path; a failure to read it inside names the study instead.

    Raises:
        InputError: the body could not read the image.
    """
    if sample.image is None:
        raise InputError(f"study {sample.id!r} has no image")
    try:
        yield sample.image
    except (InputError, UsageError) as error:
        raise InputError(
            f"study {sample.id!r}: its image is unreadable: {_reason(error, sample.image)}; "
            "replace it, or set skip_bad = true for this corpus to leave such studies out"
        ) from None  # the cause names the path


def open_image(sample: Sample) -> Radiograph:
    """The sample's radiograph, pixels float32 (H, W) in [0, 1].

    Raises:
        InputError: it is unreadable; the message names the study.
    """
    with naming(sample) as path:
        return open_radiograph(path)


def unreadable(samples: Iterable[Sample], tick: Tick = lambda: None) -> dict[str, str]:
    """Open every image. What cannot be read: sample id -> reason, without a path."""
    found = {}
    for sample in samples:
        if sample.image is not None:
            try:
                open_radiograph(sample.image)
            except (InputError, UsageError) as error:
                found[sample.id] = _reason(error, sample.image)
        tick()
    return found


def _reason(error: Exception, path: Path) -> str:
    return str(error).replace(repr(str(path)), "the file").replace(str(path), "the file")
