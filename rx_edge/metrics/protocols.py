"""Evaluation protocols: what happens to a text before it is scored.

The same two texts differ by many points of BLEU between protocols, so a figure without its
protocol means nothing. Each one is data, and goes whole into the result.

Sources: `r2gen` from the code of Chen et al. 2020 (github.com/cuhksz-nlp/R2Gen, tokenizers.py and
datasets.py): its *references* are cut too, and words that are rare in training reports become
`<unk>`. `rexrank` from rajpurkarlab/CXR-Report-Metric (run_eval.py). `study-findings` is ours.

Clinical labels read the untouched text under every protocol.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rx_edge.errors import UsageError

UNKNOWN = "<unk>"
# what the pairs-jsonl reader puts before every report: the same words in every reference
_VIEW = re.compile(r"^\s*(?:frontal|lateral) chest radiograph\.\s*", re.IGNORECASE)
_WORD = re.compile(r"\w+(?:['-]\w+)*")
# R2Gen's class has the range :-[ in it, so a hyphen stays and < = > @ go
_R2GEN_DROPPED = str.maketrans("", "", ".,?;*!%^&_+():<=>@[]{}\"/\\'")


@dataclass(frozen=True)
class Protocol:
    """One way to prepare texts.

    Attributes:
        lower: whether case is dropped.
        tokens: "whitespace"; "words" (letters and digits, no punctuation); "full-stops" (split
            at spaces, full stops apart); "r2gen" (its cleaning, sentences joined by " . ").
        reference_words: references are cut after so many tokens; None = never.
        draft_words: the same for drafts.
        rare_below: a word that occurs less often in the training reports becomes `<unk>` in both
            texts; 0 = never.
        drop_view: whether the view sentence that the reader puts first is removed from both.
        about: what it is for, and how it differs from its source.
    """

    name: str
    lower: bool
    tokens: Literal["whitespace", "words", "full-stops", "r2gen"]
    reference_words: int | None
    draft_words: int | None
    rare_below: int
    drop_view: bool
    about: str


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol(
            "plain", False, "whitespace", None, None, 0, False,
            "The texts as they are, split at whitespace.",
        ),
        Protocol(
            "study-findings", True, "words", None, None, 0, True,
            "Whole findings, lower-cased words without punctuation; the view sentence does not "
            "count.",
        ),
        # 60 ids, of which the first is the start: 59 words are left of a reference
        Protocol(
            "r2gen", True, "r2gen", 59, 60, 3, True,
            "IU X-ray as R2Gen scores it. R2Gen's own drafts are limited by its vocabulary; here "
            "the drafts of any system pass through it.",
        ),
        Protocol(
            "r2gen-mimic", True, "r2gen", 99, 100, 10, True,
            "MIMIC-CXR as R2Gen scores it; otherwise like r2gen.",
        ),
        Protocol(
            "rexrank", True, "full-stops", None, None, 0, True,
            "The tokens of CXR-Report-Metric, on which ReXrank builds. Its BLEU-2 is a mean over "
            "reports with another smoothing (fast-bleu): compare bleu_2_mean, roughly.",
        ),
    )
}  # fmt: skip


def protocol(name: str) -> Protocol:
    """The preset `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in PROTOCOLS:
        raise UsageError(f"--protocol is {name!r}; valid: {', '.join(sorted(PROTOCOLS))}")
    return PROTOCOLS[name]


@dataclass(frozen=True)
class Tokeniser:
    """A protocol with what it needs of the training reports.

    Attributes:
        known: words that stay; None where the protocol keeps rare ones.
    """

    protocol: Protocol
    known: frozenset[str] | None

    def reference(self, text: str) -> list[str]:
        """The tokens of a reference, cut as the protocol says."""
        return self._known(split(self.protocol, text))[: self.protocol.reference_words]

    def draft(self, text: str) -> list[str]:
        """The tokens of a draft, cut as the protocol says."""
        return self._known(split(self.protocol, text))[: self.protocol.draft_words]

    def _known(self, tokens: list[str]) -> list[str]:
        if self.known is None:
            return tokens
        return [t if t in self.known else UNKNOWN for t in tokens]


def tokeniser(chosen: Protocol, train: Iterable[str]) -> Tokeniser:
    """The protocol ready for use; `train` are the training reports."""
    if not chosen.rare_below:
        return Tokeniser(chosen, None)
    counts = Counter(token for text in train for token in split(chosen, text))
    return Tokeniser(chosen, frozenset(t for t, n in counts.items() if n >= chosen.rare_below))


def split(chosen: Protocol, text: str) -> list[str]:
    """The tokens of a text, neither cut nor mapped."""
    text = _VIEW.sub("", text) if chosen.drop_view else text
    text = text.lower() if chosen.lower else text
    if chosen.tokens == "words":
        return _WORD.findall(text)
    if chosen.tokens == "full-stops":
        return text.replace(".", " .").split()
    return _r2gen(text) if chosen.tokens == "r2gen" else text.split()


def _r2gen(text: str) -> list[str]:
    """Numbering and punctuation go, and " . " stands between sentences and at the end."""
    text = re.sub(r"\.\.+", ".", " ".join(re.sub(r"__+", "_", text).split()))
    text = text.replace("1. ", "")
    for prefix in (". ", " "):
        for number in "2345":
            text = text.replace(f"{prefix}{number}. ", ". ")
    sentences = [s.strip().translate(_R2GEN_DROPPED) for s in text.strip().split(". ")]
    words = " . ".join(sentences).split()
    return [*words, "."] if words else []
