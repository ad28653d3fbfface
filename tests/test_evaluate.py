"""`rx-edge evaluate` end to end on a tiny run and the bundle made of it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from rx_edge.cli import app
from rx_edge.config import PromptConfig
from rx_edge.errors import InputError, ModelError, UsageError
from rx_edge.evaluate.answers import ask, constant_report
from rx_edge.evaluate.corpus import Corpus, Study, _digest, _one_a_study, open_corpus
from rx_edge.evaluate.evaluate import Evaluation, Request, Row, evaluate
from rx_edge.evaluate.files import csv_text, page
from rx_edge.evaluate.systems import Prompted, Settings
from rx_edge.metrics import meteor, radeval
from rx_edge.metrics.protocols import PROTOCOLS
from rx_edge.types import StudyInput

runner = CliRunner()
QUICK = ["--max-new-tokens", "12", "--resamples", "100", "--threads", "1"]
NO_JAVA = "no java in this test"


def silent(*_: object) -> None:
    """No progress."""


@pytest.fixture
def no_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Java takes seconds to start; what METEOR says is tested beside it."""
    monkeypatch.setattr(meteor, "missing", lambda: NO_JAVA)


@pytest.fixture(scope="module")
def compared(
    tiny_run: Path, tiny_bundle: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The files of `rx-edge evaluate RUN BUNDLE`, with METEOR where Java is."""
    out = tmp_path_factory.mktemp("evaluation")
    files = ["--json", out / "r.json", "--html", out / "r.html", "--csv", out / "r.csv"]
    arguments = ["evaluate", tiny_run, tiny_bundle, "--data", tiny_pairs, "--protocol", "plain"]
    found = runner.invoke(app, [*map(str, [*arguments, *files]), *QUICK])
    assert found.exit_code == 0, found.output
    assert found.stdout == ""
    return out


@pytest.fixture(scope="module")
def result(compared: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((compared / "r.json").read_text("utf-8"))
    return found


def test_two_systems_are_compared(result: dict[str, Any]) -> None:
    run, bundle = result["systems"]
    assert (run["kind"], bundle["kind"], result["data"]["studies"]) == ("run", "bundle", 4)
    assert result["comparison"]["same_encoder"] is True
    assert run["metrics"].keys() == result["comparison"]["metrics"].keys()
    assert {"bleu_4", "rouge_l", "cider", "label_f1_micro_14", "label_f1_macro_5"} <= run[
        "metrics"
    ].keys()
    assert ("meteor" in run["metrics"]) != ("meteor" in result["missing"])
    for name, one in result["comparison"]["metrics"].items():
        a, b = run["metrics"][name]["value"], bundle["metrics"][name]["value"]
        if one["value"] is not None:
            assert one["value"] == pytest.approx(b - a)
            assert 0.0 < one["p"] <= 1.0
    for value in run["metrics"].values():
        if value["value"] is not None:
            assert value["low"] <= value["value"] <= value["high"]


def test_conditions_are_in_the_result(result: dict[str, Any]) -> None:
    assert result["protocol"]["name"] == "plain"
    assert result["labels"]["uncertain"] == "u-negative"
    assert result["sampling"]["resamples"] == 100
    assert result["settings"]["max_new_tokens"] == 12
    assert len(result["systems"][1]["bundle_sha256"]) == 64
    assert result["environment"]["evaluation_packages"]["torch"]
    assert "RadEval" not in result["missing"]
    assert result["missing"]["chexbert"] == "not asked for: --radeval chexbert"


def test_baselines_are_always_there(result: dict[str, Any]) -> None:
    for system in result["systems"]:
        assert set(system["baselines"]) == {"constant", "nearest", "ablated"}
        for one in system["baselines"].values():
            difference = one["system_minus_baseline"]["rouge_l"]["value"]
            own = system["metrics"]["rouge_l"]["value"]
            assert difference == pytest.approx(own - one["metrics"]["rouge_l"]["value"])


def test_the_result_holds_no_text_and_no_name(result: dict[str, Any], compared: Path) -> None:
    text = (compared / "r.json").read_text("utf-8")
    for secret in ("study-", ".jpg", "pneumothorax.", "There is", "/tmp"):
        assert secret not in text, secret
    assert "study-" in (compared / "r.csv").read_text("utf-8")


def test_every_study_is_in_the_csv(compared: Path) -> None:
    with (compared / "r.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {r["id"] for r in rows} == {f"study-{n}.jpg" for n in range(16, 20)}
    assert all(r["reference"].endswith(".") and 0 <= float(r["rouge_l"]) <= 1 for r in rows)


def test_the_page_shows_the_worst_and_escapes(compared: Path) -> None:
    found = (compared / "r.html").read_text("utf-8")
    assert found.count("<h3>Worst by rouge_l</h3>") == 2
    assert "Second minus first" in found
    assert found.count("There is a left pleural effusion.") >= 2
    assert not re.search(r"<script|https?://", found)


def test_the_corpus_value_is_that_of_its_studies(result: dict[str, Any], compared: Path) -> None:
    with (compared / "r.csv").open(encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["system"].startswith("2: bundle")]
    mean = np.mean([float(r["rouge_l"]) for r in rows])
    assert result["systems"][1]["metrics"]["rouge_l"]["value"] == pytest.approx(mean)


@pytest.mark.usefixtures("no_meteor")
def test_the_same_bundle_twice_is_the_same(tiny_bundle: Path, tiny_pairs: Path) -> None:
    found = runner.invoke(
        app,
        ["evaluate", *map(str, [tiny_bundle, tiny_bundle, "--data", tiny_pairs]), *QUICK,
         "--json", "-"],
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["comparison"]["identical_drafts"] == 1.0
    for one in result["comparison"]["metrics"].values():
        assert one["value"] is None or (one["value"], one["low"], one["high"]) == (0, 0, 0)
        assert one["p"] in (None, 1.0)
    assert result["missing"]["meteor"] == NO_JAVA
    assert f"missing: meteor: {NO_JAVA}" in found.stderr


def test_a_bundle_leaves_torch_alone(tiny_bundle: Path, tiny_pairs: Path) -> None:
    arguments = ["evaluate", str(tiny_bundle), "--data", str(tiny_pairs), *QUICK]
    code = (
        "import sys; from rx_edge.cli import app; from rx_edge.metrics import meteor\n"
        "meteor.missing = lambda: 'not here'\n"
        f"try: app({arguments!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'peft', 'pycocoevalcap'} & sys.modules.keys()"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    for shown in ("label_f1_micro_14", "nearest"):
        assert shown in found.stdout


class Scripted:
    """A system that says what a test tells it, by the brightness of the image."""

    def __init__(self, draft: str, refused: Sequence[str] = ()) -> None:
        self.about: dict[str, Any] = {"kind": "bundle", "label": "scripted"}
        self.prompt = PromptConfig()
        self._draft, self._refused = draft, refused

    def encode(self, study: StudyInput) -> Prompted:
        if study.image.name in self._refused:
            raise InputError("refused here")
        side = np.asarray(Image.open(study.image), np.float32) / 255
        half = side.shape[1] // 2
        bright = [side[:, :half].mean(), side[:, half:].mean()]
        return Prompted(np.asarray([bright, bright], np.float32))

    def write(self, prompts: Sequence[Prompted]) -> list[str]:
        return [f"{self._draft} {one.soft.mean():.4f}" if self._draft else "" for one in prompts]

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def corpus(tiny_pairs: Path) -> Corpus:
    return open_corpus(tiny_pairs, "test", PROTOCOLS["plain"], None, 2000)


def test_the_nearest_training_image_is_of_the_same_kind(corpus: Corpus) -> None:
    """Frontal ones are bright left, lateral ones right, and the reports say so."""
    found = ask(Scripted("draft"), corpus, constant_report(corpus), "x", silent)
    for study, near in zip(corpus.studies, found.baselines["nearest"], strict=True):
        assert near.split()[0] == study.text.split()[0]
        assert near in {s.text for s in corpus.train}


def test_the_ablated_system_sees_the_mean_of_the_training_images(corpus: Corpus) -> None:
    system = Scripted("draft")
    found = ask(system, corpus, constant_report(corpus), "x", silent)
    mean = np.mean([system.encode(s.given).soft for s in corpus.train])
    assert found.baselines["ablated"] == (f"draft {mean:.4f}",) * 4
    assert len(set(found.drafts)) > 1


def test_the_constant_report_is_a_training_report(corpus: Corpus) -> None:
    same = constant_report(corpus)
    assert same in {s.text for s in corpus.train}
    found = ask(Scripted("draft"), corpus, same, "x", silent)
    assert found.baselines["constant"] == (same,) * 4


@pytest.mark.usefixtures("no_meteor")
def test_empty_drafts_and_refused_images_are_failures(
    tiny_bundle: Path, tiny_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(system: Scripted) -> dict[str, Any]:
        monkeypatch.setattr("rx_edge.evaluate.evaluate.open_system", lambda *_: system)
        request = Request(tiny_pairs, protocol="plain", resamples=100)
        one: dict[str, Any] = evaluate([tiny_bundle], request, Settings(), silent).result[
            "systems"
        ][0]
        return one

    empty = scored(Scripted(""))
    assert (empty["empty"], empty["refused"]) == (4, 0)
    for name in ("bleu_1", "bleu_4", "rouge_l", "cider", "label_f1_micro_14"):
        assert empty["metrics"][name]["value"] in (0.0, None), name
    assert empty["metrics"]["rouge_l"]["high"] == 0.0
    text = "Frontal chest radiograph. The lungs are clear. No pneumothorax."
    every = scored(Scripted(text))
    some = scored(Scripted(text, refused=["study-16.jpg", "study-18.jpg"]))
    assert every["baselines"]["ablated"]["metrics"] == some["baselines"]["ablated"]["metrics"]
    assert (some["empty"], some["refused"]) == (2, 2)
    assert some["metrics"]["rouge_l"]["value"] < every["metrics"]["rouge_l"]["value"]


@pytest.mark.usefixtures("no_meteor")
def test_without_training_studies_baselines_are_missing_not_silent(
    tiny_bundle: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_pairs, tmp_path / "pairs")
    file = tmp_path / "pairs" / "pairs.jsonl"
    lines = [x for x in file.read_text("utf-8").splitlines() if json.loads(x)["split"] == "test"]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    request = Request(file, resamples=100)
    found = evaluate([tiny_bundle], request, Settings(max_new_tokens=4, threads=1), silent).result
    assert found["systems"][0]["baselines"] == {}
    assert "no training split" in found["missing"]["baselines"]
    with pytest.raises(UsageError, match="r2gen needs training reports"):
        open_corpus(file, "test", PROTOCOLS["r2gen"], None, 2000)


def test_what_is_left_out_is_counted(tiny_pairs: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_pairs, tmp_path / "pairs")
    file = tmp_path / "pairs" / "pairs.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    rows[-1]["report"] = "Nothing of use."  # no imaging sentence: only the view is known
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    found = open_corpus(file, "test", PROTOCOLS["plain"], 2, 2000)
    assert found.note["left_out"] == {
        "no written report, or no image": 1,
        "another image of a study": 0,
        "nothing left under the protocol": 0,
        "over --limit": 1,
    }
    assert [s.id for s in found.studies] == [
        s.id for s in open_corpus(file, "test", PROTOCOLS["r2gen"], 2, 2000).studies
    ]


@pytest.mark.usefixtures("no_meteor")
def test_a_bundle_of_another_run_is_told(
    tiny_run: Path, tiny_bundle: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tiny_run, other)
    weights = load_file(other / "final" / "projector.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, other / "final" / "projector.safetensors")
    call = ["evaluate", str(other), str(tiny_bundle), "--data", str(tiny_pairs), *QUICK]
    found = runner.invoke(app, [*call, "--json", "-"])
    assert json.loads(found.stdout)["comparison"]["same_encoder"] is False
    assert "this is no loss from deployment" in found.stderr


def test_a_damaged_bundle_is_refused_before_the_run_is_loaded(
    tiny_run: Path, tiny_bundle: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, broken)
    (broken / "tokenizer.json").write_text("{}", encoding="utf-8")
    found = runner.invoke(
        app, ["evaluate", str(tiny_run), str(broken), "--data", str(tiny_pairs), *QUICK]
    )
    assert (found.exit_code, "tokenizer.json" in found.stderr) == (3, True)
    assert "drafts" not in found.stderr


def test_one_image_of_a_study_is_scored_a_frontal_one() -> None:
    def study(name: str, of: str, view: str) -> Study:
        return Study(name, of, view, StudyInput(Path(name)), "text")

    images = [
        study("a-1", "a", "lateral"),
        study("a-2", "a", "frontal"),
        study("a-3", "a", "frontal"),
        study("b-1", "b", "lateral"),
    ]
    assert sorted(s.id for s in _one_a_study(images)) == ["a-2", "b-1"]


def test_another_reference_is_another_corpus(corpus: Corpus) -> None:
    first, *others = corpus.studies
    assert corpus.note["sha256"] == _digest(reversed(corpus.studies))
    assert corpus.note["sha256"] != _digest([replace(first, text="Other."), *others])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reader", "rot13"], "--reader is 'rot13'"),
        (["--split", "train"], "--split is 'train'"),
        (["--protocol", "r2d2"], "--protocol is 'r2d2'"),
        (["--uncertain", "maybe"], "--uncertain is 'maybe'"),
        (["--radeval", "bleurt"], "--radeval is 'bleurt'"),
        (["--json", "/nowhere/at/all.json"], "its directory does not exist"),
    ],
)
def test_nonsense_is_refused_before_anything_is_loaded(
    tiny_bundle: Path, tiny_pairs: Path, arguments: list[str], message: str
) -> None:
    call = ["evaluate", str(tiny_bundle), "--data", str(tiny_pairs), *arguments]
    found = runner.invoke(app, call)
    assert found.exit_code == 2, found.output
    assert message in found.stderr


def test_what_is_no_system_and_no_data_is_refused(
    tiny_bundle: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    found = runner.invoke(app, ["evaluate", str(tmp_path), "--data", str(tiny_pairs)])
    assert (found.exit_code, "neither a bundle" in found.stderr) == (2, True)
    found = runner.invoke(app, ["evaluate", str(tiny_bundle), "--data", str(tmp_path / "no")])
    assert (found.exit_code, "does not exist" in found.stderr) == (2, True)
    found = runner.invoke(app, ["evaluate", *[str(tiny_bundle)] * 3, "--data", str(tiny_pairs)])
    assert (found.exit_code, "3 systems are named" in found.stderr) == (2, True)


def test_radeval_is_missing_with_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radeval.importlib.util, "find_spec", lambda _: None)
    assert "rx-edge[radeval]" in str(radeval.missing("green", asked=True))
    assert radeval.missing("green", asked=False) == "not asked for: --radeval green"


def test_radeval_is_called_as_it_documents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in with RadEval's interface: its weights cannot be had here."""
    (tmp_path / "radeval.py").write_text(
        "class RadEval:\n"
        "    def __init__(self, metrics): self.metrics = metrics\n"
        "    def __call__(self, refs, hyps):\n"
        "        if self.metrics == ['green']: raise OSError('weights: ' + refs[0])\n"
        "        return {self.metrics[0]: float(refs == hyps), 'by': {'n': len(refs)}, 'x': [1]}\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delitem(sys.modules, "radeval", raising=False)
    assert radeval.missing("chexbert", asked=True) is None
    assert radeval.score("chexbert", ["a"], ["a"]) == {"f1chexbert": 1.0, "by.n": 1.0}
    with pytest.raises(ModelError, match=r"cannot compute green \(OSError\)") as error:
        radeval.score("green", ["secret"], ["a"])
    assert "secret" not in str(error.value)
    monkeypatch.delitem(sys.modules, "radeval", raising=False)


def test_a_report_cannot_become_part_of_the_page(result: dict[str, Any]) -> None:
    name, text = result["systems"][0]["name"], "<script>alert(1)</script>"
    row = Row(name, text, text, text, False, {"rouge_l": 0.0})
    written = page(Evaluation(result, (row,)))
    assert "<script" not in written
    assert written.count("&lt;script&gt;") == 3


@pytest.mark.usefixtures("no_meteor")
def test_the_comparison_is_second_minus_first(
    tiny_bundle: Path, tiny_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = "Frontal chest radiograph. The lungs are clear. No pneumothorax."
    systems = iter([Scripted("nonsense"), Scripted(good)])
    monkeypatch.setattr("rx_edge.evaluate.evaluate.open_system", lambda *_: next(systems))
    request = Request(tiny_pairs, protocol="plain", resamples=200)
    found = evaluate([tiny_bundle, tiny_bundle], request, Settings(), silent).result
    rouge = found["comparison"]["metrics"]["rouge_l"]
    assert rouge["value"] == found["systems"][1]["metrics"]["rouge_l"]["value"] > 0
    assert rouge["low"] > 0
    # four studies: both systems change hands together in 2 of 16 orders, never fewer
    assert rouge["p"] == pytest.approx(1 / 8, abs=0.06)


@pytest.mark.usefixtures("no_meteor")
def test_two_systems_of_one_label_stay_apart(tiny_bundle: Path, tiny_pairs: Path) -> None:
    request, settings = Request(tiny_pairs, resamples=100), Settings(max_new_tokens=4, threads=1)
    found = evaluate([tiny_bundle, tiny_bundle], request, settings, silent)
    names = [one["name"] for one in found.result["systems"]]
    assert names == ["1: bundle tiny-bundle", "2: bundle tiny-bundle"]
    assert [row.system for row in found.rows] == [names[0]] * 4 + [names[1]] * 4


def test_the_csv_survives_any_text() -> None:
    row = Row("run x", "1", 'a, "quoted"\nline', "", True, {"bleu_4": None})
    (back,) = csv.DictReader(csv_text([row]).splitlines(keepends=True))
    assert (back["reference"], back["bleu_4"], back["empty"]) == (row.reference, "", "1")
