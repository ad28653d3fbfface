"""Which reports get into drafts.bin, and that no other text does."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rx_edge.bundle import DRAFTS, FileEntry, describe, open_bundle
from rx_edge.cli import app
from rx_edge.config import CorpusConfig, ExportConfig, TrainRecipe
from rx_edge.config_io import load_toml
from rx_edge.draft_index import HEADER, boundary, open_drafts
from rx_edge.errors import BundleError, UsageError
from rx_edge.model.language import tokenizer_file
from rx_edge.prompting import encode, load_tokenizer
from rx_edge.train.data.openi_xml import __file__ as openi_file
from rx_edge_export import draft_corpus, plan, staged_manifest
from rx_edge_export.artifacts import Workshop, draft_index
from rx_edge_export.calibration import Calibration
from rx_edge_export.drafts import write
from rx_edge_export.export import _key, silent
from rx_edge_export.steps import Steps

runner = CliRunner()
NO_STUDIES = Calibration((), (), "", "")


@pytest.fixture(scope="session")
def recipe(tiny_run: Path) -> TrainRecipe:
    return load_toml(tiny_run / "recipe.toml", TrainRecipe)


def reports_in(path: Path) -> list[list[int]]:
    """Everything that can be read out of a drafts.bin with two-byte tokens."""
    content = path.read_bytes()
    _, _, width, reports, tokens, _ = HEADER.unpack_from(content)
    text = np.frombuffer(content, "<u2", offset=HEADER.size + 4 * (reports + tokens))
    assert width == 2
    ends = np.flatnonzero(text == boundary(2))
    return [text[a + 1 : b].tolist() for a, b in itertools.pairwise(ends)]


def test_a_bundle_holds_the_training_reports_as_the_model_saw_them(
    tiny_bundle: Path, tiny_pairs: Path, recipe: TrainRecipe
) -> None:
    bundle = open_bundle(tiny_bundle)
    tokenizer = load_tokenizer(tiny_bundle / "tokenizer.json")
    end = tokenizer.token_to_id(recipe.prompt.end_of_report)
    rows = [json.loads(r) for r in (tiny_pairs / "pairs.jsonl").read_text("utf-8").splitlines()]
    opening = {"PA": "Frontal chest radiograph.", "L": "Lateral chest radiograph."}
    wanted = [
        [*encode(tokenizer, f"{opening[row['view']]} {row['report']}"), end]
        for row in sorted(rows, key=lambda row: row["image"])
        if row["split"] == "train"
    ]
    assert bundle.drafts is not None
    assert reports_in(bundle.drafts) == wanted
    said = bundle.manifest.lineage["drafts"]
    assert (said["reports"], said["tokens"]) == (12, sum(map(len, wanted)))
    assert [s["name"] for s in said["sources"]] == ["pairs"]
    assert said["left_out"] == []
    assert bundle.manifest.lineage["licences"]["drafts"] == "pairs: not stated"
    assert "study-" not in json.dumps(said)
    index = open_drafts(bundle)
    assert index is not None
    with index:
        assert tokenizer.decode(index.propose([], 99).ids).startswith(opening["PA"])


def test_the_plan_knows_the_size(tiny_run: Path, tiny_bundle: Path) -> None:
    rows = {row.file: row for row in plan.make(tiny_run, ExportConfig(), tiny_run).rows}
    assert rows[DRAFTS].disk == (tiny_bundle / DRAFTS).stat().st_size
    without = plan.make(tiny_run, ExportConfig(drafts_from="none"), tiny_run)
    assert DRAFTS not in {row.file for row in without.rows}


def test_none_leaves_it_out(
    tiny_run: Path, tiny_bundle: Path, recipe: TrainRecipe, tmp_path: Path
) -> None:
    for spec, files in (("none", []), ("auto", [DRAFTS])):
        corpus = draft_corpus.load(tiny_run, recipe, spec)
        with Steps(tmp_path / spec, "key", 1, silent) as steps:
            shop = Workshop(tiny_run, ExportConfig(), steps, [], NO_STUDIES, corpus)
            draft_index(shop)
            assert [p.name for p in shop.bundle.iterdir()] == files
            assert ("drafts" in staged_manifest._licences(shop, recipe)) == bool(files)
    bundle = open_bundle(tiny_bundle)
    files_without = {k: v for k, v in bundle.manifest.files.items() if k != DRAFTS}
    without = replace(bundle, manifest=replace(bundle.manifest, files=files_without))
    assert without.drafts is None
    assert open_drafts(without) is None


def test_the_same_reports_give_the_same_bytes(
    tiny_run: Path, tiny_bundle: Path, tiny_pairs: Path, recipe: TrainRecipe, tmp_path: Path
) -> None:
    for spec in ("auto", str(tiny_pairs), str(tiny_pairs / "pairs.jsonl")):
        corpus = draft_corpus.load(tiny_run, recipe, spec)
        write(tmp_path / DRAFTS, corpus.reports, corpus.tokenizer_sha256)
        assert describe(tmp_path / DRAFTS) == open_bundle(tiny_bundle).manifest.files[DRAFTS]
    assert corpus.tokenizer_sha256 == describe(tokenizer_file(recipe.model.language)).sha256


def test_held_out_text_never_gets_in(
    tiny_run: Path, tiny_pairs: Path, recipe: TrainRecipe, tmp_path: Path
) -> None:
    shutil.copytree(tiny_pairs / "images", tmp_path / "images")
    rows = [json.loads(r) for r in (tiny_pairs / "pairs.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        if row["split"] != "train":
            row["report"] = "Mild cardiomegaly is seen in the heart."
        row["licence"] = f"CC {row['split']}"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    corpus = draft_corpus.load(tiny_run, recipe, str(tmp_path))
    assert len(corpus.reports) == 12
    tokenizer = load_tokenizer(tokenizer_file(recipe.model.language))
    text = " ".join(tokenizer.decode(list(report)) for report in corpus.reports)
    assert "lungs are clear" in text
    assert "cardiomegaly" not in text
    assert corpus.licences == "drafts_from: CC train"
    fewer = replace(corpus, reports=corpus.reports[1:])
    keys = {_key(tiny_run, ExportConfig(), [], NO_STUDIES, c) for c in (corpus, fewer)}
    assert len(keys) == 2


def _openi(directory: Path) -> None:
    """One report of each split, which says its split."""
    table = json.loads((Path(openi_file).parent / "splits" / "iu_r2gen.json").read_text("utf-8"))
    directory.mkdir(parents=True)
    for split, ids in table.items():
        study = ids[0].split("_")[0]
        (directory / f"{study.removeprefix('CXR')}.xml").write_text(
            f'<eCitation><uId id="{study}"/><AbstractText Label="FINDINGS">'
            f"Lungs are clear in {split}.</AbstractText></eCitation>",
            "utf-8",
        )


def test_openi_reports(tiny_run: Path, recipe: TrainRecipe, tmp_path: Path) -> None:
    _openi(tmp_path / "xml")
    corpus = draft_corpus.load(tiny_run, recipe, str(tmp_path / "xml"))
    tokenizer = load_tokenizer(tokenizer_file(recipe.model.language))
    assert [tokenizer.decode(list(r)) for r in corpus.reports] == ["Lungs are clear in train."]
    assert corpus.licences == "drafts_from: CC BY-NC-ND 4.0 (reports)"


def test_fetched_reports_are_taken_only_if_the_run_knows_them(
    tiny_run: Path, recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe's path is not set here, the fetched corpus is there."""
    monkeypatch.setenv("RX_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RX_EDGE_NOWHERE", raising=False)
    fetched = tmp_path / "cache" / "models" / "iu-reports"
    config = CorpusConfig(reader="openi-xml", path="$RX_EDGE_NOWHERE")
    stages = (replace(recipe.stages[0], data=("iu",)),)
    changed = replace(recipe, data={**recipe.data, "iu": config}, stages=stages)
    found = draft_corpus.load(tiny_run, changed, "auto")
    assert (found.reports, found.left_out) == ((), ("iu: not on this machine",))
    _openi(fetched)
    found = draft_corpus.load(tiny_run, changed, "auto")
    assert found.left_out == ("iu: not the reports that the run was trained on",)
    row = draft_corpus._row(
        draft_corpus.data.read("iu", replace(config, path=str(fetched))).split("train")[0]
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / "data_manifest.json").write_text(
        json.dumps({"iu": {"studies": [f"train {row} -", "test x y -"]}}), "utf-8"
    )
    found = draft_corpus.load(run, changed, "auto")
    assert (len(found.reports), found.left_out) == (1, ())
    assert draft_corpus.load(tmp_path, changed, "auto").reports == ()  # a run without a manifest
    next(fetched.iterdir()).write_text("<", "utf-8")
    assert draft_corpus.load(run, changed, "auto").left_out == (
        "iu: cannot be read on this machine",
    )


def test_what_is_named_must_be_there(
    tiny_run: Path, tiny_pairs: Path, recipe: TrainRecipe, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--drafts-from '.*nowhere' does not exist; name a pairs"):
        draft_corpus.load(tiny_run, recipe, str(tmp_path / "nowhere"))
    shutil.copytree(tiny_pairs / "images", tmp_path / "images")
    text = (tiny_pairs / "pairs.jsonl").read_text("utf-8").replace('"train"', '"test"')
    (tmp_path / "pairs.jsonl").write_text(text, "utf-8")
    with pytest.raises(UsageError, match="no report in its training split"):
        draft_corpus.load(tiny_run, recipe, str(tmp_path))
    command = ["export", str(tiny_run), "--out", str(tmp_path / "out"), "--dry-run"]
    result = runner.invoke(app, [*command, "--drafts-from", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    result = runner.invoke(app, [*command, "--drafts-from", "none"])
    assert (result.exit_code, DRAFTS in result.stdout) == (0, False)
    assert DRAFTS in runner.invoke(app, command).stdout


def test_reports_behind_an_agreement_stay_out(tiny_run: Path, recipe: TrainRecipe) -> None:
    """A bundle is passed on; MIMIC's reports may not be. Not even their path is looked at."""
    name, config = next(iter(recipe.data.items()))
    mimic = replace(recipe, data={name: replace(config, reader="mimic-cxr")})
    found = draft_corpus.load(tiny_run, mimic, "auto")
    assert found.reports == ()
    assert found.left_out == (
        f"{name}: reports behind an agreement do not go into a bundle unasked",
    )


def test_another_tokenizer_is_refused(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    files = {**bundle.manifest.files, "tokenizer.json": FileEntry("0" * 64, 1)}
    other = replace(bundle, manifest=replace(bundle.manifest, files=files))
    with pytest.raises(
        BundleError, match="its token ids are of tokenizer .*, the bundle's is 0000"
    ):
        open_drafts(other)
