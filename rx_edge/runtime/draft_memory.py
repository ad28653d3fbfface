"""What this session drafted before is the best guess at what it will draft next.

A model says the same things in the same words far more often than its training reports do. The
tokens of recent drafts are kept in memory, never on disk, and proposed like those of the report
corpus (`rx_edge.draft_index`).

Does not cover: the corpus, and how many tokens are proposed (`drafting.py`).
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence

from rx_edge.draft_index import Proposal

LONGEST = 8  # tokens of context that are looked up
DRAFTS = 256  # drafts remembered; the oldest is forgotten first
_START = -1  # stands before the first token
# As in the report corpus: what was seen once comes again less often than always.
_DOUBT = 3.0

Context = tuple[int, ...]


class DraftMemory:
    """Which token followed which context, over the last `DRAFTS` drafts."""

    def __init__(self) -> None:
        self._drafts: deque[Context] = deque()
        self._next: dict[Context, Counter[int]] = defaultdict(Counter)

    def add(self, ids: Sequence[int]) -> None:
        """A draft is finished."""
        if len(self._drafts) == DRAFTS:
            self._count(self._drafts.popleft(), -1)
        self._drafts.append(tuple(ids))
        self._count(self._drafts[-1], 1)

    def clear(self) -> None:
        """Forget every draft."""
        self._drafts.clear()
        self._next.clear()

    def propose(self, context: Sequence[int], limit: int) -> Proposal:
        """How earlier drafts went on, as `DraftIndex.propose`."""
        ids: list[int] = []
        chances: list[float] = []
        tail = [_START, *context] if len(context) < LONGEST else list(context[-LONGEST:])
        while len(ids) < limit:
            found = self._longest(tail)
            if not found:
                break
            followers, length = found
            token, count = max(followers.items(), key=lambda item: (item[1], -item[0]))
            ids.append(token)
            chances.append(count / (followers.total() + _DOUBT / length))
            tail = [*tail[1 - LONGEST :], token]
        return Proposal(tuple(ids), tuple(chances))

    def _longest(self, tail: list[int]) -> tuple[Counter[int], int] | None:
        for start in range(len(tail)):
            followers = self._next.get(tuple(tail[start:]))
            if followers:
                return followers, len(tail) - start
        return None

    def _count(self, draft: Context, by: int) -> None:
        ids = (_START, *draft)
        for at in range(1, len(ids)):
            for length in range(1, min(LONGEST, at) + 1):
                key = ids[at - length : at]
                followers = self._next[key]
                followers[ids[at]] += by
                if followers[ids[at]] <= 0:
                    del followers[ids[at]]
                    if not followers:
                        del self._next[key]
