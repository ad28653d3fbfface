"""Plain image-text pairs: one JSON object a line, images beside it in `images/`.

Keys: image, report, view (PA | AP | AP Supine | L | null), patient, split; optional are indication
and lateral, the name of the study's lateral image, which is read as "frontal+lateral" only. The
target begins with the view, as this is what a reader sees first and what proves that the image is
looked at.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from rx_edge.config import CorpusConfig
from rx_edge.errors import ConfigError
from rx_edge.train.data import SPLITS, Corpus, Sample
from rx_edge.train.data.sentences import imaging_sentences
from rx_edge.train.data.studies import BOTH, MISSING, NO_LATERAL, image_folder, one_line

_VIEWS = {"PA": "frontal", "AP": "frontal", "AP Supine": "frontal", "L": "lateral"}
VIEW_SENTENCE = {"frontal": "Frontal chest radiograph.", "lateral": "Lateral chest radiograph."}


def looks_like(path: Path) -> bool:
    """A directory with `pairs.jsonl`, or a .jsonl file."""
    return (path / "pairs.jsonl").is_file() or path.suffix == ".jsonl"


def read(path: Path, config: CorpusConfig) -> Corpus:
    """Read `path` (the .jsonl file or its directory).

    Raises:
        ConfigError: a line is not a JSON object with the keys above.
    """
    file = path / "pairs.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{str(file)!r} is missing: no image-text pairs")
    folder = image_folder(file.parent, config, "images")
    samples, dropped = [], Counter[str]()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            image, split = folder / row["image"], row["split"]
            view = _VIEWS.get(row.get("view") or "")
            sentences, patient = imaging_sentences(row["report"]), str(row["patient"])
            indication = one_line(row.get("indication") or "")
            second = row.get("lateral") if config.views == BOTH else None
            lateral = folder / second if second else None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file}:{number}: not an image-text pair: {error!r}") from error
        if split not in SPLITS:
            raise ConfigError(f"{file}:{number}: split {split!r}; valid: {', '.join(SPLITS)}")
        if lateral and view == "lateral":
            raise ConfigError(f"{file}:{number}: view L and a lateral image: image must be frontal")
        if not image.is_file():
            dropped[MISSING] += 1
            continue
        if view is None and not sentences:
            dropped["neither view nor imaging sentence"] += 1
            continue
        if not sentences:
            dropped["no imaging sentence: view only, end not learned"] += 1
        if lateral and not lateral.is_file():
            dropped[NO_LATERAL] += 1
            lateral = None
        opening = [VIEW_SENTENCE[view]] if view else []
        samples.append(
            Sample(
                id=image.name, patient=patient, image=image, view=view,
                target=" ".join([*opening, *sentences]), complete=bool(sentences), split=split,
                lateral=lateral, indication=indication,
            )
        )  # fmt: skip
    return Corpus(tuple(samples), dict(dropped))
