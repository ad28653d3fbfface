"""Open-i (IU X-ray) reports as XML, text only: the FINDINGS section.

Split: a JSON file of ids as in R2Gen's annotation (`CXR2384_IM-0942...`), of which the study
number counts. Sentences with redactions (`XXXX`) are dropped: a model would learn to print them.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from rx_edge.config import CorpusConfig
from rx_edge.errors import ConfigError
from rx_edge.train.data import SPLITS, Corpus, Sample
from rx_edge.train.data.sentences import split_sentences


def read(path: Path, config: CorpusConfig) -> Corpus:
    """Read every `N.xml` below `path`.

    Raises:
        ConfigError: no split file, or a file that is not Open-i XML.
    """
    splits = _splits(config.split_file)
    samples, dropped = [], Counter[str]()
    for file in sorted(path.rglob("*.xml"), key=lambda p: p.name):
        study, findings = _findings(file)
        if study not in splits:
            dropped["not in the split file"] += 1
            continue
        sentences = [s for s in split_sentences(findings) if "XXXX" not in s]
        if not sentences:
            dropped["no findings without redactions"] += 1
            continue
        text, split = " ".join(sentences), splits[study]
        samples.append(Sample(study, study, None, None, text, complete=True, split=split))
    return Corpus(tuple(samples), dict(dropped))


def _splits(split_file: str) -> dict[str, str]:
    path = Path(split_file) if split_file else Path(__file__).parent / "splits" / "iu_r2gen.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {re.split(r"[_ ]", i)[0]: name for name in SPLITS for i in table[name]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"split file {str(path)!r} is not a JSON of ids per train/val/test: {error!r}"
        ) from error


def _findings(file: Path) -> tuple[str, str]:
    try:
        root = ET.parse(file).getroot()
    except ET.ParseError as error:
        raise ConfigError(f"{file.name} is not well-formed XML: {error}") from error
    identifier = root.find("uId")
    texts = [
        element.text or ""
        for element in root.iter("AbstractText")
        if element.get("Label") == "FINDINGS"
    ]
    return (identifier.get("id", "") if identifier is not None else ""), " ".join(texts).strip()
