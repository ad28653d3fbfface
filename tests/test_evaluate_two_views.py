"""Evaluation of systems that read two views and an indication, also beside one that does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rx_edge.config import PromptConfig
from rx_edge.errors import ConfigError, InputError
from rx_edge.evaluate.answers import ask
from rx_edge.evaluate.corpus import Corpus, open_corpus, read_by
from rx_edge.evaluate.evaluate import Request, evaluate
from rx_edge.evaluate.systems import Prompted, Settings, open_system
from rx_edge.metrics import meteor
from rx_edge.metrics.protocols import PROTOCOLS
from rx_edge.model.report_model import greedy_batch
from rx_edge.types import StudyInput
from tests.conftest import Once
from tests.train import corpora

ONE = PromptConfig()
TEMPLATE = ONE.template.replace("{image}", "{image}\nIndication: {indication}")
BOTH = PromptConfig(template=TEMPLATE, views="frontal+lateral")
SETTINGS = Settings(max_new_tokens=6, threads=1)


def silent(*_: object) -> None:
    """No progress."""


@pytest.fixture
def no_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor, "missing", lambda: "not here")


@pytest.fixture(scope="session")
def root(once: Once) -> Path:
    return once("two-views", corpora.two_views)


def corpus_of(root: Path, *prompts: PromptConfig) -> Corpus:
    return open_corpus(root, "test", PROTOCOLS["plain"], None, 2000, prompts=prompts)


def test_every_system_sees_the_same_studies(root: Path) -> None:
    plain, both = corpus_of(root, ONE), corpus_of(root, ONE, BOTH)
    assert plain.note.keys() | {"with_lateral", "with_indication"} == both.note.keys()
    assert (both.note["with_lateral"], both.note["with_indication"]) == (1, 2)
    assert plain.note["sha256"] == both.note["sha256"]
    assert [s.id for s in plain.train] == [s.id for s in both.train]
    for one, other in zip(plain.studies, both.studies, strict=True):
        assert one.text == other.text
        assert read_by(ONE, one.given) == read_by(ONE, other.given)
        assert read_by(BOTH, other.given) == other.given
        assert other.given.indication
    assert any(study.given.lateral for study in both.studies)
    with pytest.raises(ConfigError, match="does not say which image is the lateral one"):
        corpus_of(corpora.r2gen(root.parent / "r2gen"), BOTH)


class Scripted:
    """Two rows for a frontal image, two more for a lateral one; it writes what it was given."""

    def __init__(self) -> None:
        self.about: dict[str, Any] = {"kind": "bundle", "label": "scripted"}
        self.prompt = BOTH
        self.encoded: list[StudyInput] = []

    def encode(self, study: StudyInput) -> Prompted:
        self.encoded.append(study)
        if "9" in study.indication:
            raise InputError("refused here")
        number = float(study.image.stem[1:])
        rows = [number] * 2 + [100 + number] * (2 * (study.lateral is not None))
        return Prompted(np.asarray([[row, 1.0] for row in rows], np.float32), study.indication)

    def write(self, prompts: Sequence[Prompted]) -> list[str]:
        return [f"{p.soft[:, 0].tolist()} {p.indication}" for p in prompts]

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None: ...


def test_the_ablated_system_keeps_shape_and_indication(root: Path) -> None:
    corpus = corpus_of(root, BOTH)
    corpus = replace(corpus, studies=tuple(sorted(corpus.studies, key=lambda s: s.id)))
    system = Scripted()
    found = ask(system, corpus, "same", "x", silent)
    assert found.drafts == ("[8.0, 8.0, 108.0, 108.0] cough for 8 days.", "")
    assert found.refused == 1
    # train: 0, 2 and 4 have a lateral image, 1, 3 and 5 have none; the usual is what came first
    two = [2.0, 2.0, 102.0, 102.0]
    usual = two if corpus.train[0].given.lateral else [3.0, 3.0]
    assert found.baselines["ablated"] == (f"{two} cough for 8 days.", f"{usual} ")
    assert {study.indication for study in system.encoded[:6]} == {""}
    others = replace(corpus, train=tuple(s for s in corpus.train if s.given.lateral is None))
    found = ask(Scripted(), others, "same", "x", silent)
    assert found.baselines["ablated"][0] == "[3.0, 3.0] cough for 8 days."


def test_a_run_reads_both_views_and_the_indication(
    asking_run: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def spy(model: Any, soft: Any, limit: int, indications: Sequence[str]) -> Any:
        told.extend(indications)
        return greedy_batch(model, soft, limit, indications)

    monkeypatch.setattr("rx_edge.evaluate.run_system.greedy_batch", spy)
    study = next(s.given for s in corpus_of(root, BOTH).studies if s.given.lateral)
    with open_system(asking_run, SETTINGS) as system:
        assert system.prompt.views == BOTH.views
        whole, alone = (system.encode(s) for s in (study, replace(study, lateral=None)))
        assert whole.soft.shape == (8, 64)
        assert np.allclose(whole.soft[:4], alone.soft, atol=1e-5)
        other = system.encode(replace(study, image=study.lateral or study.image, lateral=None))
        assert np.allclose(whole.soft[4:], other.soft, atol=1e-5)
        assert whole.indication == "cough for 8 days."
        drafts = system.write([whole, alone, replace(whole, indication="fever"), whole])
        assert drafts[0] == drafts[3]
        assert told == ["cough for 8 days."] * 2 + ["fever", "cough for 8 days."]
        with pytest.raises(InputError, match="control token"):
            system.encode(replace(study, indication="cough <|im_end|>"))


def compared(systems: list[Path], root: Path) -> dict[str, Any]:
    request = Request(root, protocol="plain", resamples=100)
    found = evaluate(systems, request, SETTINGS, silent)
    assert {row.id for row in found.rows} == {"s50000008", "s50000009"}
    assert "days" not in json.dumps(found.result)
    assert found.result["data"]["with_lateral"] == 1
    assert [one["refused"] for one in found.result["systems"]] == [0, 0]
    return found.result


@pytest.mark.usefixtures("no_meteor")
def test_a_run_of_two_views_beside_a_bundle_of_one(
    asking_run: Path, tiny_bundle: Path, root: Path
) -> None:
    compared([asking_run, tiny_bundle], root)


@pytest.mark.usefixtures("no_meteor")
def test_a_bundle_reads_what_its_run_read(
    asking_run: Path, asking_bundle: Path, root: Path
) -> None:
    result = compared([asking_run, asking_bundle], root)
    assert result["comparison"]["same_encoder"] is True
    assert result["comparison"]["identical_drafts"] == 1.0
    study = next(s.given for s in corpus_of(root, BOTH).studies if s.given.lateral)
    versions = [study, replace(study, lateral=None), replace(study, indication="")]
    drafts = []
    for path in (asking_run, asking_bundle):
        with open_system(path, SETTINGS) as system:
            given = [system.encode(version) for version in versions]
            drafts.append((given, system.write(given)))
    (one, said), (other, found) = drafts
    assert found == said
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.soft, b.soft, atol=1e-4)
        assert a.indication == b.indication
