"""How many tokens are proposed: by what they bring and what they cost."""

from __future__ import annotations

from typing import Any

import pytest

from rx_edge.draft_index import Proposal
from rx_edge.runtime.draft_memory import DRAFTS, DraftMemory
from rx_edge.runtime.drafting import PRIOR_COST, WIDTHS, Acceptance, Drafter, PassCosts

END = 2


class Index:
    def __init__(self, chances: tuple[float, ...], ids: tuple[int, ...] | None = None) -> None:
        self._proposal = Proposal(ids or tuple(range(10, 10 + len(chances))), chances)

    def propose(self, context: Any, limit: int) -> Proposal:
        return Proposal(self._proposal.ids[:limit], self._proposal.chances[:limit])


def proposed(chances: tuple[float, ...], costs: dict[int, float], **rest: Any) -> int:
    index: Any = Index(chances, rest.get("ids"))
    helper = Drafter(index, END, rest.get("max_draft", 15), PassCosts(costs))
    return len(helper.propose([1], rest.get("room", 99)))


FREE = dict.fromkeys(WIDTHS, 1.0)
LINEAR = {w: float(w) for w in WIDTHS}


def test_long_where_width_is_free_and_none_where_it_is_not() -> None:
    assert proposed((0.9,) * 15, FREE) == 15
    assert proposed((0.9,) * 15, LINEAR) == 0
    assert proposed((0.05,) * 15, PRIOR_COST) == 0


def test_the_length_follows_confidence() -> None:
    sure = proposed((0.98,) * 15, PRIOR_COST)
    half = proposed((0.98,) * 3 + (0.1,) * 12, PRIOR_COST)
    assert sure > half == 3


def test_widths_are_a_fixed_few() -> None:
    for count in range(16):
        assert proposed((0.9,) * count, FREE) + 1 in WIDTHS


def test_room_and_limit_are_kept() -> None:
    assert proposed((0.9,) * 15, FREE, room=4) == 3
    assert proposed((0.9,) * 15, FREE, room=0) == 0
    assert proposed((0.9,) * 15, FREE, max_draft=5) == 5


def test_the_end_is_never_proposed() -> None:
    assert proposed((0.9,) * 4, FREE, ids=(10, END, 11, 12)) == 1


def test_experience_corrects_chances() -> None:
    acceptance = Acceptance()
    before = acceptance.of(0.95)
    for _ in range(200):
        acceptance.add(0.95, False)
    assert before == pytest.approx(0.95)
    assert acceptance.of(0.95) < 0.1
    assert acceptance.of(0.55) == pytest.approx(0.55)


def test_a_corpus_that_is_always_wrong_is_given_up() -> None:
    index: Any = Index((0.9,) * 15)
    helper = Drafter(index, END, 15)
    passes = 0
    while len(helper.propose([1], 99)):
        helper.judged(0)
        passes += 1
        assert passes < 60
    assert passes > 0


def test_measured_costs_replace_the_prior() -> None:
    costs = PassCosts()
    assert costs.relative(8) == PRIOR_COST[8]
    costs.add(1, 0.010)
    assert costs.relative(8) == pytest.approx(PRIOR_COST[8])  # same shape, other scale
    costs.add(8, 0.012)
    assert costs.relative(8) == pytest.approx(1.2)
    for _ in range(100):
        costs.add(8, 0.030)
    assert costs.relative(8) == pytest.approx(3.0, rel=0.01)


def test_earlier_drafts_are_proposed_where_the_corpus_knows_less() -> None:
    index: Any = Index(())
    helper = Drafter(index, END, 15, PassCosts(FREE))
    draft = [5, 6, 7, 8, 9, 10, END]
    assert len(helper.propose([5], 99)) == 0
    for _ in range(3):
        helper.remember(draft)
    assert helper.propose([5], 99).tolist() == [6, 7, 8, 9, 10]
    assert helper.propose([5, 6], 4).tolist() == [7, 8, 9]
    helper.forget()
    assert len(helper.propose([5], 99)) == 0


def test_a_session_without_a_corpus_learns_as_well() -> None:
    helper = Drafter(None, END, 15, PassCosts(FREE))
    helper.remember([5, 6, 7, 8, 9, END])
    assert helper.propose([5, 6], 99).tolist() == [7, 8, 9]
    helper.close()


def test_memory_follows_the_most_frequent_and_forgets_the_oldest() -> None:
    memory = DraftMemory()
    memory.add([1, 2, 3])
    memory.add([1, 2, 4])
    memory.add([1, 2, 4])
    assert memory.propose([1], 5).ids == (2, 4)
    assert memory.propose([], 5).ids == (1, 2, 4)
    assert memory.propose([9, 9, 1], 5).ids == (2, 4)  # a shorter end of the context
    assert memory.propose([99], 5).ids == ()
    for number in range(DRAFTS):
        memory.add([1, 1000 + number])
    assert memory.propose([1, 2], 5).ids == ()
    assert memory.propose([1], 1).ids == (1000,)
    assert len(memory._next) < 3 * DRAFTS  # nothing of forgotten drafts is kept
