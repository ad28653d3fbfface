"""Do whole drafts still say the same? Facts of the bundle's drafts against the trained model's.

A study costs little where nothing changed: the trained model's tokens are checked in one pass,
and only from the first token that the bundle would not have chosen is a draft of its own decoded.
One pass over many tokens and one token at a time differ in the last digits of floating point; a
tie that this decides is counted as the change that it is.

Does not cover: single positions (`verify.py`) and the text's quality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rx_edge.backends.base import encode_views
from rx_edge.metrics.labels import flips
from rx_edge.prompting import layout
from rx_edge.runtime.session import Session
from rx_edge.types import SoftPrompt
from rx_edge_export.golden import DRAFT_TOKENS, Drafts

# The trained model gave the other token at least 0.6 of the probability of its own: it was
# undecided, and any rounding may decide. Such changes are counted and shown, apart from the rest.
TIE = 0.5  # logits


@dataclass(frozen=True)
class Comparison:
    """Counts over all studies.

    Attributes:
        changed: drafts that are not the same tokens.
        tied: of those, drafts whose first other token was a tie (`TIE`) for the trained model.
        flips: facts that differ in the changed drafts that were no tie, by kind: "negation",
            "side", "finding".
        facts: facts in the trained model's drafts.
    """

    studies: int
    changed: int
    tied: int
    flips: dict[str, int]
    facts: int


def encode(session: Session, drafts: Drafts) -> list[SoftPrompt]:
    """The session's soft prompt of every study; its language half may change without them."""
    return [encode_views(session.vision, pixels) for pixels in drafts.pixels]


def compare(session: Session, drafts: Drafts, soft_prompts: Sequence[SoftPrompt]) -> Comparison:
    """Draft every study from its soft prompt (`encode`) and count what differs."""
    counts = {"negation": 0, "side": 0, "finding": 0}
    changed = tied = facts = 0
    asked = drafts.indications or ("",) * len(drafts.tokens)
    for soft, wanted, margins, indication in zip(
        soft_prompts, drafts.tokens, drafts.margins, asked, strict=True
    ):
        found = greedy(session, soft, wanted, indication)
        text = session.tokenizer.decode(list(wanted), skip_special_tokens=True)
        other = session.tokenizer.decode(list(found), skip_special_tokens=True)
        difference = flips(text, other)
        facts += difference.facts
        if found == wanted:
            continue
        changed += 1
        if margins[_first_difference(wanted, found)] < TIE:
            tied += 1
            continue
        for kind in counts:
            counts[kind] += getattr(difference, kind)
    return Comparison(len(drafts.tokens), changed, tied, counts, facts)


def _first_difference(wanted: tuple[int, ...], found: tuple[int, ...]) -> int:
    """Index of the first token that differs; the end counts as a token."""
    for index, (a, b) in enumerate(zip(wanted, found, strict=False)):
        if a != b:
            return index
    return min(len(wanted), len(found))


def greedy(
    session: Session, soft_prompt: SoftPrompt, proposal: tuple[int, ...], indication: str = ""
) -> tuple[int, ...]:
    """The bundle's greedy tokens, the end token excluded, at most `DRAFT_TOKENS`.

    Args:
        proposal: what is expected; correct whatever it is, fast where it is right.
    """
    language, end = session.language, session.prompt.end
    language.rewind(0)
    logits = language.prefill(layout(session.prompt_for(indication), soft_prompt))
    start = language.position
    accepted: list[int] = []
    token = int(logits.argmax())
    if proposal and token == proposal[0]:
        best = language.step(np.asarray(proposal, np.int32)).argmax(-1)  # (T,)
        agree = 1
        while agree < len(proposal) and int(best[agree - 1]) == proposal[agree]:
            agree += 1
        accepted = list(proposal[:agree])
        token = int(best[agree - 1])
        language.rewind(start + agree)
    while token != end and len(accepted) < DRAFT_TOKENS:
        accepted.append(token)
        token = int(language.step(np.asarray([token], np.int32))[0].argmax())
    return tuple(accepted)
