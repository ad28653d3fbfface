"""Proposals change the speed of a draft and never its words; sampling keeps its distribution."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rx_edge.config import RuntimeConfig
from rx_edge.draft_index import Proposal
from rx_edge.runtime.decoding import LOOP_TOKENS, Draft, Sampler, decode
from rx_edge.runtime.drafting import Drafter
from rx_edge.runtime.session import Session, open_session
from rx_edge.types import Timings

END = 2


class Index:
    """Proposes what a function says, with a high chance."""

    def __init__(self, propose: Any) -> None:
        self._propose = propose

    def propose(self, context: Sequence[int], limit: int) -> Proposal:
        ids = tuple(self._propose(list(context)))[:limit]
        return Proposal(ids, (0.99,) * len(ids))

    def close(self) -> None:
        """Nothing is held."""


def drafter(propose: Any, **rest: Any) -> Drafter:
    index: Any = Index(propose)
    cheap = Drafter(index, rest.pop("end", END), rest.pop("max_draft", 15))
    for width in (1, 2, 4, 6, 8, 12, 16):
        cheap.costs.add(width, 1.0)  # a pass costs the same whatever its width: always propose
    return cheap


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Session]:
    with open_session(tiny_bundle, max_new_tokens=40) as opened:
        yield opened


def prefilled(session: Session) -> Any:
    soft = np.random.default_rng(0).normal(0, 0.2, (4, 64)).astype(np.float32)
    session.language.rewind(0)
    before, after = (np.asarray(i, np.int32) for i in (session.prompt.before, session.prompt.after))
    return session.language.prefill([before, soft, after])


def grown(session: Session, helper: Drafter | None, choose: Any = None) -> tuple[Draft, Timings]:
    timings = Timings()
    options = {"choose": choose} if choose else {}
    draft = Draft(end=session.prompt.end, limit=40, drafter=helper, timings=timings, **options)
    steps = list(decode(session.language, prefilled(session), draft, helper))
    assert [i for step in steps for i in step.ids] == draft.ids
    assert timings.new_tokens == len(draft.ids)
    return draft, timings


@pytest.fixture(scope="module")
def plain(session: Session) -> Draft:
    draft, timings = grown(session, None)
    assert len(draft.ids) > 5
    assert timings.decode_passes == len(draft.ids) - (draft.finish != "end")
    return draft


def test_right_proposals_save_passes(session: Session, plain: Draft) -> None:
    found, timings = grown(session, drafter(lambda ids: plain.ids[len(ids) :]))
    assert (found.ids, found.finish) == (plain.ids, plain.finish)
    assert timings.decode_passes < len(plain.ids) / 4
    assert sum(timings.accepted) + timings.decode_passes + 1 >= len(plain.ids)


@pytest.mark.parametrize("seed", range(5))
def test_wrong_proposals_change_nothing(session: Session, plain: Draft, seed: int) -> None:
    """Right up to a random place, then noise: what a bad corpus would propose."""
    generator = random.Random(seed)

    def propose(ids: list[int]) -> list[int]:
        right = plain.ids[len(ids) : len(ids) + generator.randrange(6)]
        return right + [generator.randrange(session.language.n_vocab) for _ in range(8)]

    found, timings = grown(session, drafter(propose))
    assert (found.ids, found.finish) == (plain.ids, plain.finish)
    assert timings.drafted_tokens > sum(timings.accepted)


def test_a_proposed_end_ends_nothing(session: Session, plain: Draft) -> None:
    end = session.prompt.end
    helper = drafter(lambda ids: [*plain.ids[len(ids) :][:2], end, 5], end=end)
    assert grown(session, helper)[0].ids == plain.ids


def test_the_kv_cache_holds_no_rejected_token(session: Session, plain: Draft) -> None:
    """What follows a rejected proposal is computed as if it had never been fed."""
    helper = drafter(lambda ids: [7, 8, 9, 10, 11, 12, 13])
    timings, logits = Timings(), prefilled(session)
    start = session.language.position
    draft = Draft(end=session.prompt.end, limit=6, drafter=helper, timings=timings)
    for _ in decode(session.language, logits, draft, helper):
        pass
    assert draft.ids == plain.ids[:6]
    assert session.language.position == start + 5  # the last token is never fed


def test_the_limit_cuts_inside_a_proposal(session: Session, plain: Draft) -> None:
    helper = drafter(lambda ids: plain.ids[len(ids) :])
    draft = Draft(end=session.prompt.end, limit=5, drafter=helper, timings=Timings())
    list(decode(session.language, prefilled(session), draft, helper))
    assert draft.ids == plain.ids[:5]
    assert draft.finish == "length"


def test_the_same_seed_draws_the_same_text() -> None:
    """With proposals or without, over a table of logits: an engine's batches round differently."""
    table = np.random.default_rng(0).normal(0, 2, (50, 50)).astype(np.float32)

    timings = Timings()

    def text(helper: Drafter | None, seed: int) -> list[int]:
        draft = Draft(end=49, limit=60, choose=Sampler(1.0, seed), drafter=helper, timings=timings)
        draft.take(table[:1])
        while not draft.finish:
            draft.take(table[draft.feed()])
        return draft.ids

    likely = table.argmax(-1)

    def propose(ids: list[int]) -> list[int]:
        return [int(likely[ids[-1]]), int(likely[likely[ids[-1]]]), 3]

    alone = [text(None, seed) for seed in range(20)]
    assert timings.drafted_tokens == 0
    assert [text(drafter(propose, end=49), seed) for seed in range(20)] == alone
    assert timings.drafted_tokens > sum(timings.accepted) > 20
    assert len({tuple(ids) for ids in alone}) > 15


def test_sampled_tokens_keep_their_distribution() -> None:
    """Chi-square over the first two tokens of 20,000 draws with a proposal that is often right."""
    table = np.log(np.asarray([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]], np.float32))
    helper = drafter(lambda ids: [0, 3], end=99)
    counts = np.zeros((4, 4))
    sampler = Sampler(1.0, 0)
    for _ in range(20_000):
        draft = Draft(end=99, limit=3, choose=sampler, drafter=helper, timings=Timings())
        draft.take(table[:1])
        draft.take(np.stack([table[1]] * len(draft.feed())))
        counts[draft.ids[0], draft.ids[1]] += 1
    wanted = np.exp(table[0])[:, None] * np.exp(table[1]) * counts.sum()
    statistic = float(((counts - wanted) ** 2 / wanted).sum())
    assert statistic < 37.7  # the 99.9 % point of chi-square with 15 degrees of freedom


def test_a_temperature_sharpens() -> None:
    logits = np.log(np.asarray([0.6, 0.4], np.float32))
    cold = Sampler(0.1, 0)
    assert sum(cold(logits) for _ in range(500)) < 40  # .4 ** 10 / (.6 ** 10 + .4 ** 10) = .017


def test_a_loop_is_stopped(session: Session) -> None:
    vocabulary = session.language.n_vocab
    rows = np.full((3, vocabulary), -10.0, np.float32)
    for at, token in enumerate((5, 6, 7)):
        rows[at, token] = 10.0
    draft = Draft(end=END, limit=500, timings=Timings())
    step = 0
    while not draft.finish:
        draft.take(rows[step % 3][None])
        step += 1
    assert draft.finish == "loop"
    assert len(draft.ids) == LOOP_TOKENS


def test_log_probabilities_are_those_of_the_model(session: Session) -> None:
    draft = Draft(end=END, limit=5, logprobs=True, timings=Timings())
    logits = prefilled(session)
    step = draft.take(logits[None])
    wanted = logits.max() - np.log(np.exp(logits.astype(np.float64)).sum())
    assert step.logprobs[0] == pytest.approx(float(wanted), abs=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_a_cached_prefix_gives_the_same_draft(
    tiny_bundle: Path, phantom_study: Path, cached: bool
) -> None:
    """Also after something else was decoded in between: a stale prefix cannot survive."""
    from rx_edge.runtime.pipeline import draft
    from rx_edge_bench.latency import run_to_end

    runtime = RuntimeConfig(prefix_cache=cached)
    with open_session(tiny_bundle, max_new_tokens=12, runtime=runtime) as session:
        first = run_to_end(session, phantom_study)
        second = run_to_end(session, phantom_study)
        assert first.timings.cached_tokens == 0
        assert second.timings.cached_tokens == len(session.prompt.before) * cached
        session.language.rewind(0)
        session.language.prefill([np.arange(30, dtype=np.int32)])
        third = run_to_end(session, phantom_study)
        assert third.timings.cached_tokens == 0
        stream = draft(session, phantom_study)
        next(stream)
        stream.close()  # cancelled
        fourth = run_to_end(session, phantom_study)
    assert first.token_ids == second.token_ids == third.token_ids == fourth.token_ids
