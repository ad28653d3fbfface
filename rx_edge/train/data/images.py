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
def naming(sample: Sample, path: Path) -> Iterator[None]:
    """A failure to read `path`, an image of the sample, names the study instead.

    Raises:
        InputError: the body could not read the image.
    """
    try:
        yield
    except (InputError, UsageError) as error:
        which = "image" if path == sample.image else "lateral image"
        raise InputError(
            f"study {sample.id!r}: its {which} is unreadable: {_reason(error, path)}; "
            "replace it, or set skip_bad = true for this corpus to leave such studies out"
        ) from None  # the cause names the path


def open_images(sample: Sample) -> Iterator[Radiograph]:
    """Radiographs of all of the sample's images, pixels float32 (H, W) in [0, 1].

    Raises:
        InputError: one is unreadable; the message names the study.
    """
    for path in sample.images:
        with naming(sample, path):
            opened = open_radiograph(path)
        yield opened


def unreadable(samples: Iterable[Sample], tick: Tick = lambda: None) -> dict[str, str]:
    """Open every image. What cannot be read: sample id -> reason, without a path."""
    found: dict[str, str] = {}
    for sample in samples:
        for path in sample.images:
            try:
                open_radiograph(path)
            except (InputError, UsageError) as error:
                found.setdefault(sample.id, _reason(error, path))
            tick()
    return found


def _reason(error: Exception, path: Path) -> str:
    return str(error).replace(repr(str(path)), "the file").replace(str(path), "the file")
