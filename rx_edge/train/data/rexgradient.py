"""ReXGradient-160K: `metadata/{train,valid,test}_metadata_view_position.json` and `deid_png/`.

Objects keyed by study: Indication, Comparison, Findings, Impression, and the parallel lists
ImagePath (`../deid_png/PATIENT/...`) and ImageViewPosition. The patient is the first folder of an
image's path.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rx_edge.config import CorpusConfig
from rx_edge.errors import ConfigError
from rx_edge.train.data import Corpus
from rx_edge.train.data.studies import (
    SPLIT_NAMES,
    Picture,
    Study,
    assemble,
    image_folder,
    json_file,
    text_of,
)

_FILE = "{}_metadata_view_position.json"
_PREFIX = "../deid_png/"
_VIEWS = dict.fromkeys(("PA", "AP", "POSTERO_ANTERIOR", "ANTERO_POSTERIOR"), "frontal")
_VIEWS |= dict.fromkeys(("LATERAL", "LL", "RL"), "lateral")


def looks_like(path: Path) -> bool:
    """A directory with one of the metadata files, itself or in `metadata/`."""
    return bool(_files(path))


def read(path: Path, config: CorpusConfig) -> Corpus:
    """Read the metadata files that are there; images in `deid_png/`.

    Raises:
        ConfigError: there is none, or one is damaged.
    """
    files = _files(path)
    if not files:
        raise ConfigError(f"{str(path)!r} holds no metadata/{_FILE.format('train')}")
    folder = image_folder(path, config, "deid_png")
    studies = (s for name, file in files.items() for s in _studies(file, name, folder))
    return assemble(studies, config)


def _files(path: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name in ("train", "valid", "test"):
        for place in (path / "metadata", path):
            if (place / _FILE.format(name)).is_file():
                found.setdefault(name, place / _FILE.format(name))
    return found


def _studies(file: Path, name: str, folder: Path) -> Iterator[Study]:
    for number, (key, entry) in enumerate(json_file(file, dict).items()):
        try:
            yield _study(key, entry, SPLIT_NAMES[name], folder)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file.name}: study number {number} has no usable ImagePath or "
                f"ImageViewPosition ({type(error).__name__})"
            ) from error


def _study(key: str, entry: dict[str, Any], split: str, folder: Path) -> Study:
    paths = [path.removeprefix(_PREFIX) for path in entry["ImagePath"]]
    views = [_VIEWS.get(str(view).upper()) for view in entry["ImageViewPosition"]]
    views += [None] * (len(paths) - len(views))
    return Study(
        id=key,
        patient=paths[0].split("/")[0] if paths else key,
        split=split,
        findings=text_of(entry, "Findings"),
        impression=text_of(entry, "Impression"),
        pictures=tuple(Picture(folder / p, v) for p, v in zip(paths, views, strict=False)),
        indication=text_of(entry, "Indication"),
    )
