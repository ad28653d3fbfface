"""Calibration studies, importance matrices and whole drafts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rx_edge.bundle import open_bundle
from rx_edge.config import ExportConfig, ImageRecipe
from rx_edge.errors import ExportError
from rx_edge.model.report_model import greedy_batch, load_run
from rx_edge.runtime.session import open_checked, open_session
from rx_edge_export import calibration, imatrix, merge_lora, phantom, verify_drafts
from rx_edge_export.export import export
from rx_edge_export.golden import DRAFT_TOKENS, Drafts
from rx_edge_export.imatrix import Stream
from rx_edge_export.reference import draft
from rx_edge_export.verify import verify
from rx_edge_export.verify_page import page
from tests.factories import IMAGE_SIZE

RECIPE = ImageRecipe(size=IMAGE_SIZE)


@pytest.fixture(scope="module")
def many_pairs(tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 studies of as many patients, from the images of `tiny_pairs`."""
    root = tmp_path_factory.mktemp("many")
    shutil.copytree(tiny_pairs / "images", root / "images")
    rows = []
    for number in range(120):
        name = f"copy-{number}.jpg"
        shutil.copyfile(root / "images" / f"study-{number % 20}.jpg", root / "images" / name)
        rows.append(
            {
                "image": name,
                "report": "The lungs are clear. No pneumothorax.",
                "view": "PA",
                "patient": f"p{number}",
                "split": "train" if number < 60 else "test",
            }
        )
    (root / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return root


def test_a_corpus_gives_two_disjoint_sets(many_pairs: Path) -> None:
    found = calibration.load(many_pairs, [], RECIPE, 50)
    assert (len(found.fit), len(found.check)) == (50, 50)
    assert not {s.name for s in found.fit} & {s.name for s in found.check}
    assert found.fit[0].pixels.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert all(s.report for s in found.fit)
    again = calibration.load(many_pairs / "pairs.jsonl", [], RECIPE, 50)
    assert [s.name for s in again.fit] == [s.name for s in found.fit]


def test_too_few_studies_are_refused(tiny_pairs: Path) -> None:
    with pytest.raises(ExportError, match="12 studies in train; at least 50"):
        calibration.load(tiny_pairs, [], RECIPE, 50)
    with pytest.raises(ExportError, match="studies is 10; at least 50"):
        calibration.load(None, [], RECIPE, 10)


def test_variations_differ_and_keep_their_sides(phantom_study: Path) -> None:
    found = calibration.load(None, [phantom_study], RECIPE, 50)
    assert "variations of 1 real canary" in found.origin
    assert len({s.pixels.tobytes() for s in (*found.fit, *found.check)}) == 100
    assert "no real study" in calibration.load(None, [], RECIPE, 50).origin
    picture = phantom.display(3)
    picture[:, :200] *= 0.3  # dark on the left
    for seed in range(20):
        varied = calibration.vary(picture, seed=seed)
        assert varied.shape == picture.shape
        assert varied.min() >= 0.0
        assert varied.max() <= 1.0
        assert varied[:, :180].mean() < varied[:, 220:].mean()
    assert np.array_equal(calibration.vary(picture, seed=5), calibration.vary(picture, seed=5))


def test_batched_drafts_are_the_single_ones(tiny_run: Path) -> None:
    model = load_run(tiny_run)
    studies = calibration.load(None, [], RECIPE, 50).check[:10]
    drafts = draft(model, studies)
    assert [p.shape for p in drafts.pixels] == [(1, 3, IMAGE_SIZE, IMAGE_SIZE)] * 10
    for soft, tokens, margins in zip(
        drafts.soft_prompts, drafts.tokens, drafts.margins, strict=True
    ):
        assert list(tokens) == model.greedy(torch.from_numpy(soft), DRAFT_TOKENS)
        ended = len(tokens) < DRAFT_TOKENS
        assert len(margins) == len(tokens) + ended
        assert min(margins) >= 0
    ((ids, _),) = greedy_batch(model, [torch.from_numpy(drafts.soft_prompts[0])], 3)
    assert list(drafts.tokens[0][:3]) == ids


def test_drafts_of_the_bundle_are_found_whatever_is_proposed(
    tiny_run: Path, tiny_bundle: Path
) -> None:
    model = load_run(tiny_run)
    studies = calibration.load(None, [], RECIPE, 50).check[:4]
    drafts = draft(model, studies)
    with open_checked(open_bundle(tiny_bundle), language="F16", exact=True) as session:
        for soft in drafts.soft_prompts:
            tokens = verify_drafts.greedy(session, soft, ())
            assert len(tokens) > 2
            for proposal in (tokens, tokens[:2], (5, 6, 7), (*tokens[:1], 9, *tokens[2:])):
                assert verify_drafts.greedy(session, soft, proposal) == tokens


class _Says:
    """A tokenizer whose every draft is a text of our choice."""

    def __init__(self, texts: dict[tuple[int, ...], str]) -> None:
        self.texts = texts

    def decode(self, ids: list[int], **_: Any) -> str:
        return self.texts[tuple(ids)]


@pytest.mark.parametrize(("margin", "counted"), [(0.1, 0), (2.0, 1)])
def test_a_flipped_side_counts_unless_it_was_a_tie(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, margin: float, counted: int
) -> None:
    wanted, found = (1, 2, 3), (1, 4, 3)
    monkeypatch.setattr(verify_drafts, "greedy", lambda *_: found)
    drafts = Drafts(
        names=("a",),
        pixels=(np.zeros((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32),),
        soft_prompts=(np.zeros((4, 64), np.float32),),
        tokens=(wanted,),
        margins=((9.0, margin, 9.0, 9.0),),
    )
    with open_session(tiny_bundle) as session:
        spoken = replace(
            session,
            tokenizer=_Says({wanted: "Left pleural effusion.", found: "Right pleural effusion."}),
        )
        comparison = verify_drafts.compare(spoken, drafts, list(drafts.soft_prompts))
    assert comparison.flips == {"negation": 0, "side": counted, "finding": 0}
    assert (comparison.changed, comparison.tied) == (1, 1 - counted)


@pytest.fixture(scope="module")
def merged_dir(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "hf"
    merge_lora.merge(load_run(tiny_run), out, [])
    return out


def test_importance_is_the_mean_square_of_the_inputs(tiny_run: Path, merged_dir: Path) -> None:
    model = load_run(tiny_run)
    soft = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    report = [5, 6, 7]
    matrix = imatrix.collect(merged_dir, [Stream(model.prompt, soft, report)])
    before, after = model.prompt.before, [*model.prompt.after, *report, model.prompt.end]
    with torch.inference_mode():
        embeds = torch.cat([model.embed(before), torch.from_numpy(soft), model.embed(after)])
        layer = model.lm.get_base_model().model.layers[0]
        wanted = layer.input_layernorm(embeds).pow(2).mean(0).numpy()
    np.testing.assert_allclose(matrix["blk.0.attn_q.weight"], wanted, rtol=1e-4)
    assert set(matrix) == {
        "token_embd.weight",
        *(
            f"blk.{i}.{name}.weight"
            for i in range(2)
            for name in (
                "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
            )
        ),
    }  # fmt: skip


def test_soft_prompts_change_the_importance(tiny_run: Path, merged_dir: Path) -> None:
    prompt = load_run(tiny_run).prompt
    soft = 5 * np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    text = imatrix.collect(merged_dir, [Stream(prompt, None, [5, 6])])
    both = imatrix.collect(merged_dir, [Stream(prompt, soft, [5, 6])])
    name = "blk.1.ffn_down.weight"
    assert not np.allclose(text[name], both[name], rtol=0.05)
    with pytest.raises(ExportError, match="needs calibration studies"):
        imatrix.collect(merged_dir, [])


def test_a_corpus_and_an_importance_matrix_in_one_export(
    tiny_run: Path, many_pairs: Path, tmp_path: Path
) -> None:
    config = ExportConfig(language=("gguf:Q4_K_M",), calibration=str(many_pairs))
    export(tiny_run, tmp_path / "out", config=config)
    bundle = open_bundle(tmp_path / "out")
    details = bundle.manifest.language[0].details
    assert details["imatrix"] == "multimodal"
    assert bundle.manifest.lineage["calibration"]["origin"] == "corpus of 120 studies"
    assert str(many_pairs) not in (tmp_path / "out" / "manifest.json").read_text("utf-8")
    html = page(bundle.manifest, bundle.digest, verify(bundle))
    assert "PASSED" in html
    assert html.count("<tr>") > 10
    assert bundle.manifest.banner in html
