"""Proposals are what a search by hand finds in the reports; a bad file is refused."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rx_edge.draft_index import DEPTH, HEADER, LONGEST, DraftIndex, Proposal, size
from rx_edge.errors import BundleError, ExportError
from rx_edge_export.drafts import suffix_order, write

END, SHA256 = 9, "ab" * 32
REPORTS = [[1, 2, 3, END], [1, 2, 4, END], [1, 2, 4, 5, END], [6, 7]]  # the last one was cut


def made(path: Path, reports: list[list[int]]) -> DraftIndex:
    write(path, [np.asarray(r, np.uint32) for r in reports], SHA256)
    return DraftIndex.open(path)


def by_hand(reports: list[list[int]], context: list[int], limit: int) -> Proposal:
    """The same without an index: -2 before a report, -3 after it."""
    texts = [[-2, *r, -3] for r in reports]

    def followers(pattern: list[int]) -> Counter[int]:
        n = len(pattern)
        return Counter(
            t[i + n] for t in texts for i in range(len(t) - n) if t[i : i + n] == pattern
        )

    pattern = [-2, *context][-LONGEST:]
    while pattern and not followers(pattern):
        pattern = pattern[1:]
    ids: list[int] = []
    chances: list[float] = []
    while pattern and len(ids) < limit and len(pattern) < DEPTH:
        found = followers(pattern)
        # a report's end sorts after every token
        token = min(found, key=lambda t: (-found[t], t if t != -3 else 1 << 40))
        if token == -3:
            break
        ids.append(token)
        chances.append(found[token] / (found.total() + 3 / len(pattern)))
        pattern = [*pattern, token]
    return Proposal(tuple(ids), tuple(chances))


def test_a_report_begins_as_most_do(tmp_path: Path) -> None:
    with made(tmp_path / "drafts.bin", REPORTS) as index:
        assert (index.n_reports, index.n_tokens) == (4, 15)
        assert index.tokenizer_sha256 == SHA256
        proposal = index.propose([], 9)
        assert proposal.ids == (1, 2, 4, 5, END)  # of equals the smallest id: 5
        assert proposal.chances[0] == pytest.approx(3 / (4 + 3))
        assert proposal.chances[2] == pytest.approx(2 / (3 + 1))
        assert index.propose([], 2).ids == (1, 2)
        assert index.propose([], 0) == Proposal()


def test_the_longest_end_of_the_context_counts(tmp_path: Path) -> None:
    with made(tmp_path / "drafts.bin", REPORTS) as index:
        assert index.propose([1, 2, 3], 9).ids == (END,)
        assert index.propose([8, 8, 4, 5], 9).ids == (END,)
        assert index.propose((np.int32(1), np.int32(2)), 1).ids == (4,)


def test_reports_are_not_crossed(tmp_path: Path) -> None:
    with made(tmp_path / "drafts.bin", REPORTS) as index:
        assert index.propose([6], 9).ids == (7,)
        assert index.propose([6, 7], 9) == Proposal()
        assert index.propose([1, 2, 3, END], 9) == Proposal()


@pytest.mark.parametrize("unknown", [100, -1, 0xFFFF, 0x10000, 1 << 40])
def test_unknown_tokens_end_the_context(tmp_path: Path, unknown: int) -> None:
    with made(tmp_path / "drafts.bin", REPORTS) as index:
        assert index.propose([1, 2, unknown], 9) == Proposal()
        assert index.propose([unknown, 1, 2, 3], 9).ids == (END,)
        assert index.propose([unknown] * 20, 9) == Proposal()


@pytest.mark.parametrize("seed", range(12))
def test_any_corpus_any_context(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    kinds = rng.choice([2, 3, 8])
    reports = [
        [rng.randrange(kinds) for _ in range(rng.randrange(12))] + [END] * rng.randrange(2)
        for _ in range(rng.randrange(1, 30))
    ]
    with made(tmp_path / "drafts.bin", reports) as index:
        for _ in range(60):
            context = [rng.randrange(kinds + 1) for _ in range(rng.randrange(12))]
            limit = rng.choice([1, 4, 40])
            assert index.propose(context, limit) == by_hand(reports, context, limit), context


def test_many_matches_are_sampled(tmp_path: Path) -> None:
    """Thousands of matches: the most frequent token all the same, with its exact share."""
    reports = [[1, 2 + n % 3, END] for n in range(3000)] + [[1, 3, END]] * 500
    with made(tmp_path / "drafts.bin", reports) as index:
        proposal = index.propose([1], 2)
    assert proposal.ids == (3, END)
    assert proposal.chances == pytest.approx((1500 / 3501.5, 1500 / 1501))


def test_ids_beyond_sixteen_bits(tmp_path: Path) -> None:
    reports = [[0xFFFF, 128_000, 5], [0xFFFF, 128_000, 6], [0xFFFE, 1]]
    with made(tmp_path / "drafts.bin", reports) as index:
        assert index.propose([0xFFFF], 9).ids == (128_000, 5)
    assert (tmp_path / "drafts.bin").stat().st_size == size(3, 8, 4)
    with made(tmp_path / "small.bin", [[0xFFFE, 1]]) as index:
        assert index.propose([0xFFFE], 9).ids == (1,)
    assert (tmp_path / "small.bin").stat().st_size == size(1, 2, 2)


def test_positions_are_ordered_by_depth_then_place() -> None:
    text = np.random.default_rng(0).integers(0, 2, 400)
    for depth in (2, 4, DEPTH):
        wanted = sorted(range(400), key=lambda p: (text[p : p + depth].tolist(), p))
        assert suffix_order(text, depth).tolist() == wanted


def test_equal_reports_give_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        made(tmp_path / name, REPORTS).close()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda b: b"GGUF" + b[4:], "it is no draft index"),
        (lambda _: b"", "it is no draft index"),
        (lambda b: b[: HEADER.size - 1], "it ends after"),
        (lambda b: b[:-1], "its header says"),
        (lambda b: b + b"\0", "its header says"),
        (lambda b: b[:8] + b"\2" + b[9:], "its format is 2, this rx-edge reads 1"),
        (lambda b: b[:12] + b"\3" + b[13:], "3-byte tokens cannot be"),
        (lambda b: b[:23] + b"\xff" + b[24:], "its header says"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, damage: object, says: str) -> None:
    path = tmp_path / "drafts.bin"
    made(path, REPORTS).close()
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(BundleError, match=says):
        DraftIndex.open(path)


def test_absent_files_and_no_reports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        DraftIndex.open(tmp_path / "drafts.bin")
    with pytest.raises(ExportError, match="needs reports"):
        write(tmp_path / "drafts.bin", [], SHA256)
    assert list(tmp_path.iterdir()) == []
