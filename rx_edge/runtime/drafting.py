"""How many tokens to propose: what they are likely to bring against what a wider pass costs.

A pass over k + 1 tokens costs more than one over a single token, by a factor that depends on the
machine, the precision and the model; a proposal is worth its chance of being accepted. Both are
learnt while drafting: the seconds of a pass per width, and how often proposals of a given chance
came true. Of the report corpus (`rx_edge.draft_index`) and earlier drafts (`draft_memory.py`), the
source and the length with the most expected tokens per second are taken; nothing where that is
best.

Widths are a fixed few, because GPU graphs and kernels are built per width.

Does not cover: what is proposed (`rx_edge.draft_index`), verification (`decoding.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from rx_edge.draft_index import DraftIndex, Proposal
from rx_edge.runtime.draft_memory import DraftMemory
from rx_edge.types import IntArray

WIDTHS = (1, 2, 4, 6, 8, 12, 16)  # tokens per pass: the last chosen one and the proposals

# Pass over w tokens against a pass over one, where nothing was measured yet: SmolLM2-135M Q8_0,
# two AVX2 cores. Wider passes are far cheaper where decoding waits for memory.
PRIOR_COST = {1: 1.0, 2: 1.67, 4: 2.27, 6: 2.7, 8: 3.15, 12: 4.2, 16: 5.3}
FORGET = 0.9  # weight of the past, per pass of the same width: machines warm up and get busy

BINS = 10  # of chances
BIN_WEIGHT = 8.0  # proposals that a bin's own chance counts for, before it was seen to come true


class PassCosts:
    """Seconds of one pass per width; the widths share one scale until they are measured."""

    def __init__(self, measured: Mapping[int, float] | None = None) -> None:
        """`measured`: seconds per width, e.g. of this machine's profile."""
        self._seconds: dict[int, float] = dict(measured or {})

    def add(self, width: int, seconds: float) -> None:
        """One pass was timed."""
        old = self._seconds.get(width)
        self._seconds[width] = seconds if old is None else FORGET * old + (1 - FORGET) * seconds

    def relative(self, width: int) -> float:
        """Cost of a pass of `width` against a pass of one token."""
        return self._of(width) / self._of(1)

    def _of(self, width: int) -> float:
        if width in self._seconds:
            return self._seconds[width]
        # scale the prior by the nearest width that was measured
        if not self._seconds:
            return PRIOR_COST[width]
        near = min(self._seconds, key=lambda w: abs(w - width))
        return self._seconds[near] / PRIOR_COST[near] * PRIOR_COST[width]


class Acceptance:
    """How often proposals came true, by the chance that the index gave them."""

    def __init__(self) -> None:
        centres = (np.arange(BINS) + 0.5) / BINS
        self._came_true = BIN_WEIGHT * centres
        self._proposed = np.full(BINS, BIN_WEIGHT)

    def add(self, chance: float, accepted: bool) -> None:
        """A proposal of `chance` was judged."""
        self._came_true[_bin(chance)] += accepted
        self._proposed[_bin(chance)] += 1

    def of(self, chance: float) -> float:
        """The chance corrected by experience."""
        return float(self._came_true[_bin(chance)] / self._proposed[_bin(chance)])


def _bin(chance: float) -> int:
    return min(BINS - 1, int(chance * BINS))


class Source(Protocol):
    """Where proposals come from: the report corpus, or earlier drafts."""

    def propose(self, context: Sequence[int], limit: int) -> Proposal: ...


class Drafter:
    """Proposes for one draft after another; keeps what it learnt.

    Attributes:
        index: the report corpus; None where the bundle has none.
        costs: of passes, on this machine.
    """

    def __init__(
        self, index: DraftIndex | None, end: int, max_draft: int, costs: PassCosts | None = None
    ) -> None:
        """`end` ends a draft and is never proposed, since nothing follows it."""
        self.index, self.costs = index, costs or PassCosts()
        self._end, self._max_draft = end, max_draft
        self._memory = DraftMemory()
        sources: list[Source] = [index, self._memory] if index else [self._memory]
        self._sources = [(source, Acceptance()) for source in sources]
        self._proposed: tuple[Acceptance, tuple[float, ...]] | None = None

    def propose(self, ids: Sequence[int], room: int) -> IntArray:
        """Likely next tokens (k,), k >= 0, after the draft so far.

        Args:
            ids: the draft's tokens so far.
            room: most tokens that may be proposed.
        """
        self._proposed, best, best_rate = None, _NOTHING, 1.0  # a pass over one token: rate 1
        limit = min(self._max_draft, room)
        for source, acceptance in self._sources if limit > 0 else ():
            proposal = source.propose(ids, limit)
            known = proposal.ids
            if self._end in known:
                known = known[: known.index(self._end)]
            length, rate = self._best(proposal.chances[: len(known)], acceptance)
            if rate > best_rate:
                best, best_rate = np.asarray(known[:length], np.int32), rate
                self._proposed = acceptance, proposal.chances[:length]
        return best

    def judged(self, accepted: int) -> None:
        """The first `accepted` tokens of the last proposal were right, the next one was not."""
        if self._proposed:
            acceptance, chances = self._proposed
            for index, chance in enumerate(chances[: accepted + 1]):
                acceptance.add(chance, index < accepted)
        self._proposed = None

    def passed(self, width: int, seconds: float) -> None:
        """A pass of `width` tokens took this long."""
        if width in PRIOR_COST:
            self.costs.add(width, seconds)

    def remember(self, ids: Sequence[int]) -> None:
        """A draft is finished: later ones will resemble it."""
        self._memory.add(ids)

    def forget(self) -> None:
        """Drop the earlier drafts: who drafts a study twice must not find its first draft here."""
        self._memory.clear()

    def close(self) -> None:
        """Give the corpus back."""
        if self.index:
            self.index.close()

    def _best(self, chances: Sequence[float], acceptance: Acceptance) -> tuple[int, float]:
        """The number of proposals with the most expected tokens per cost, and that rate."""
        best, best_rate = 0, 1.0
        expected, reach = 1.0, 1.0
        for count, chance in enumerate(chances, start=1):
            reach *= acceptance.of(chance)
            expected += reach
            if count + 1 in WIDTHS:
                rate = expected / self.costs.relative(count + 1)
                if rate > best_rate:
                    best, best_rate = count, rate
        return best, best_rate


_NOTHING: IntArray = np.zeros(0, np.int32)
