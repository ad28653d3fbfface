"""What each protocol does to a text."""

from __future__ import annotations

import pytest

from rx_edge.errors import UsageError
from rx_edge.metrics.protocols import PROTOCOLS, UNKNOWN, protocol, split, tokeniser
from rx_edge.train.data.pairs_jsonl import VIEW_SENTENCE
from tests.metrics.reports import iu_reports

TEXT = (
    "Frontal chest radiograph. 1. Heart size is normal.. 2. No X-ray evidence (left/right), 3 cm."
)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("plain", TEXT),
        (
            "study-findings",
            "1 heart size is normal 2 no x-ray evidence left right 3 cm",
        ),
        ("r2gen", "heart size is normal . no x-ray evidence leftright 3 cm ."),
        (
            "rexrank",
            "1 . heart size is normal . . 2 . no x-ray evidence (left/right), 3 cm .",
        ),
    ],
)
def test_tokens(name: str, wanted: str) -> None:
    assert split(PROTOCOLS[name], TEXT) == wanted.split()


def test_r2gen_cuts_references_and_drafts() -> None:
    """60 ids with the start: 59 words of a reference; R2Gen's own drafts are at most 60 long."""
    long = " ".join(["word"] * 200)
    ready = tokeniser(PROTOCOLS["r2gen"], [long])
    assert (len(ready.reference(long)), len(ready.draft(long))) == (59, 60)
    ready = tokeniser(PROTOCOLS["r2gen-mimic"], [long])
    assert (len(ready.reference(long)), len(ready.draft(long))) == (99, 100)
    for name in ("plain", "study-findings", "rexrank"):
        assert len(tokeniser(PROTOCOLS[name], []).reference(long)) == 200


def test_r2gen_hides_words_that_are_rare_in_training() -> None:
    ready = tokeniser(PROTOCOLS["r2gen"], ["clear lungs"] * 3 + ["rare"] * 2)
    assert ready.reference("Clear rare lungs.") == ["clear", UNKNOWN, "lungs", "."]
    assert ready.draft("unheard rare") == [UNKNOWN, UNKNOWN, "."]


def test_the_view_sentence_is_the_readers() -> None:
    for sentence in VIEW_SENTENCE.values():
        assert split(PROTOCOLS["study-findings"], f"{sentence} Clear lungs.") == ["clear", "lungs"]
        assert split(PROTOCOLS["plain"], sentence) == sentence.split()


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_nothing_stays_nothing(name: str) -> None:
    assert split(PROTOCOLS[name], "") == []
    assert split(PROTOCOLS[name], " \n ") == []


def test_an_unknown_protocol_is_usage() -> None:
    with pytest.raises(UsageError, match="valid: plain, r2gen"):
        protocol("r2")


def test_r2gen_shortens_real_references() -> None:
    """The trap of facts.md D: the same references, and less of them is asked for."""
    references = iu_reports()
    ready = tokeniser(PROTOCOLS["r2gen"], iu_reports("train"))
    cut = [len(ready.reference(r)) < len(split(ready.protocol, r)) for r in references]
    unknown = sum(UNKNOWN in ready.reference(r) for r in references)
    assert 0 < sum(cut) < len(cut) / 2
    assert unknown > 50
