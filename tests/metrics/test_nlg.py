"""BLEU, ROUGE-L, CIDEr and METEOR: the packages' own values on real reports."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator

import numpy as np
import pytest

from rx_edge.metrics import meteor, nlg
from rx_edge.metrics.bootstrap import Table, whole
from rx_edge.metrics.meteor import Meteor
from tests.metrics.reports import iu_pairs, words

needs_pycocoevalcap = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None, reason="[eval] is not installed"
)
needs_java = pytest.mark.skipif(meteor.missing() is not None, reason=str(meteor.missing()))


def table(references: list[list[str]], drafts: list[list[str]]) -> Table:
    return np.asarray([nlg.bleu_sums(r, d) for r, d in zip(references, drafts, strict=True)])


def as_pycocoevalcap(texts: list[list[str]]) -> dict[int, list[str]]:
    return {number: [" ".join(tokens)] for number, tokens in enumerate(texts)}


@needs_pycocoevalcap
def test_bleu_is_pycocoevalcaps_on_real_reports() -> None:
    from pycocoevalcap.bleu.bleu import Bleu

    references, drafts = iu_pairs()
    assert len(references) > 500
    corpus, each = Bleu(4).compute_score(
        as_pycocoevalcap(references), as_pycocoevalcap(drafts), verbose=0
    )
    sums = table(references, drafts)
    for n in range(1, 5):
        assert whole(nlg.bleu(n), sums) == pytest.approx(corpus[n - 1], rel=1e-12)
        np.testing.assert_allclose(nlg.bleu(n)(sums), each[n - 1], rtol=1e-9, atol=1e-15)


def test_bleu_is_sacrebleus_on_the_same_tokens() -> None:
    sacrebleu = pytest.importorskip("sacrebleu.metrics", reason="[eval] is not installed")
    references, drafts = iu_pairs()
    ours = table(references, drafts)
    for n in range(1, 5):
        scorer = sacrebleu.BLEU(
            tokenize="none", smooth_method="none", max_ngram_order=n, force=True
        )
        theirs = scorer.corpus_score(
            [" ".join(d) for d in drafts], [[" ".join(r) for r in references]]
        )
        assert 100 * whole(nlg.bleu(n), ours) == pytest.approx(theirs.score, rel=1e-9)


@needs_pycocoevalcap
def test_rouge_l_is_pycocoevalcaps_on_real_reports() -> None:
    from pycocoevalcap.rouge.rouge import Rouge

    references, drafts = iu_pairs()
    mean, each = Rouge().compute_score(as_pycocoevalcap(references), as_pycocoevalcap(drafts))
    ours = [nlg.rouge_l(r, d) for r, d in zip(references, drafts, strict=True)]
    np.testing.assert_allclose(ours, each, rtol=1e-12)
    assert np.mean(ours) == pytest.approx(mean)


@needs_pycocoevalcap
def test_cider_is_pycocoevalcaps_on_real_reports() -> None:
    from pycocoevalcap.cider.cider import Cider

    references, drafts = iu_pairs()
    mean, each = Cider().compute_score(as_pycocoevalcap(references), as_pycocoevalcap(drafts))
    ours = nlg.cider(references, drafts)
    np.testing.assert_allclose(ours, each, rtol=1e-9, atol=1e-12)
    assert np.mean(ours) == pytest.approx(mean)


@pytest.fixture(scope="module")
def running() -> Iterator[Meteor]:
    with Meteor() as found:
        yield found


@needs_java
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # pycocoevalcap leaves its process behind
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_meteor_is_pycocoevalcaps_on_real_reports(running: Meteor) -> None:
    from pycocoevalcap.meteor.meteor import Meteor as Theirs

    references, drafts = iu_pairs()
    theirs = Theirs()
    mean, each = theirs.compute_score(as_pycocoevalcap(references), as_pycocoevalcap(drafts))
    sums = running.sums(references, drafts)
    assert whole(running.figure, sums) == pytest.approx(mean, rel=1e-9)
    np.testing.assert_allclose(running.figure(sums), each, rtol=1e-9)


@needs_java
def test_meteor_of_identical_and_empty_drafts(running: Meteor) -> None:
    references = words("the heart is normal in size", "no pleural effusion is seen")
    same, nothing = running.sums(references, references), running.sums(references, [[], []])
    assert whole(running.figure, same) > 0.99
    assert running.figure(nothing).tolist() == [0.0, 0.0]
    # a separator of the line protocol inside a report must not shift the answers
    odd = running.sums(references, [[*references[0], "|||"], references[1]])
    np.testing.assert_array_equal(odd, same)


def test_meteor_says_why_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(meteor.shutil, "which", lambda _: None)
    assert "install a JRE" in str(meteor.missing())
    monkeypatch.setattr(meteor.importlib.util, "find_spec", lambda _: None)
    assert "rx-edge[eval]" in str(meteor.missing())


def test_an_identical_draft_is_perfect() -> None:
    references = words(
        "the heart is normal in size and shape", "there is a small left pleural effusion"
    )
    sums = table(references, references)
    for n in range(1, 5):
        assert whole(nlg.bleu(n), sums) == pytest.approx(1.0)
        np.testing.assert_allclose(nlg.bleu(n)(sums), 1.0, atol=1e-8)
    assert [nlg.rouge_l(r, r) for r in references] == [1.0, 1.0]
    assert nlg.cider(references, references) == pytest.approx([10.0, 10.0])


def test_an_empty_draft_scores_nothing_and_costs_the_others() -> None:
    references = words("the heart is normal in size", "there is a small left pleural effusion")
    whole_draft, failed = references, [references[0], []]
    sums = table(references, failed)
    for n in range(1, 5):
        assert nlg.bleu(n)(sums)[1] == 0.0
        assert whole(nlg.bleu(n), sums) < whole(nlg.bleu(n), table(references, whole_draft))
    assert nlg.rouge_l(references[1], []) == 0.0
    assert nlg.cider(references, failed)[1] == 0.0


def test_one_study_has_no_document_frequencies() -> None:
    assert nlg.cider(words("a b c"), words("a b c")) == [0.0]


def test_the_longest_common_subsequence_is_that_of_the_textbook() -> None:
    def by_table(one: list[str], other: list[str]) -> int:
        best = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, a in enumerate(one):
            for j, b in enumerate(other):
                longer = max(best[i][j + 1], best[i + 1][j])
                best[i + 1][j + 1] = best[i][j] + 1 if a == b else longer
        return best[-1][-1]

    rng = random.Random(0)
    for _ in range(300):
        one, other = ([rng.choice("abcd") for _ in range(rng.randrange(90))] for _ in range(2))
        assert nlg.longest_common(one, other) == by_table(one, other)
