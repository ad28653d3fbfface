"""Importance matrices compared: exact where nothing differs, and a planted loss is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rx_edge.backends import llm_gguf as reader
from rx_edge.errors import UsageError
from rx_edge.prompting import PromptIds
from rx_edge_bench import imatrix_comparison
from rx_edge_bench.deployment_loss import resampled
from rx_edge_bench.imatrix_comparison import MATRICES, SCHEMA, Stream, distance, measure
from rx_edge_export import gguf_quantize, llm_gguf
from rx_edge_export.export import silent
from tests.factories import tiny_llama_dir

TYPES = ("Q8_0", "IQ4_NL")


@pytest.fixture(scope="module")
def result(
    tiny_run: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("imatrix")
    return measure(
        tiny_run, tiny_pairs, work, file_types=TYPES, fit=4, check=6, threads=1, progress=silent
    )


def stream() -> Stream:
    soft = np.random.default_rng(0).normal(0, 0.2, (4, 64)).astype(np.float32)
    return Stream(PromptIds((5, 6, 7), (8, 9), 2), soft, (30, 31, 32, 2))


def test_every_cell_is_there_and_json(result: dict[str, Any]) -> None:
    assert (result["schema"], result["fit_studies"], result["n"]) == (SCHEMA, 4, 6)
    for file_type in TYPES:
        for name in MATRICES:
            cell = result["file_types"][file_type][name]
            for where in ("all_positions", "report_positions"):
                kl = cell[where]["kl_mean"]
                assert 0 < kl["low"] <= kl["value"] <= kl["high"]
                assert cell[where]["kl_median"]["value"] <= cell[where]["kl_p99"]["value"]
                assert 0 <= cell[where]["argmax_changed"]["value"] < 1
            assert cell["nll_per_token"]["value"] - cell["nll_change"]["value"] == pytest.approx(
                result["reference_nll_per_token"]
            )
    text = json.dumps(result, allow_nan=False)
    for secret in ("study-", ".jpg", "pneumothorax", "/tmp"):
        assert secret not in text, secret


def test_more_bits_are_nearer_and_q8_ignores_the_matrix(result: dict[str, Any]) -> None:
    fine, coarse = (result["file_types"][t] for t in TYPES)
    assert fine["none"]["bits_per_weight"] > coarse["none"]["bits_per_weight"]
    for name in MATRICES:
        one, other = (cells[name]["all_positions"]["kl_mean"] for cells in (fine, coarse))
        assert one["high"] < other["low"]
    assert fine["kl_differences"]["multimodal - none"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    for cells in (fine, coarse):
        for pair, found in cells["kl_differences"].items():
            one, other = (cells[m]["report_positions"]["kl_mean"] for m in pair.split(" - "))
            assert found["value"] == pytest.approx(one["value"] - other["value"])


def test_the_three_matrices_are_really_used(
    tiny_run: Path, tiny_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    real = gguf_quantize.quantize

    def spy(*paths: Path, **settings: Any) -> dict[str, Any]:
        seen.append(settings["imatrix"])
        return real(*paths, **settings)

    monkeypatch.setattr(gguf_quantize, "quantize", spy)
    measure(
        tiny_run, tiny_pairs, tmp_path / "w", file_types=["Q4_K_M"], fit=3, check=1, threads=1,
        progress=silent,
    )  # fmt: skip
    none, text, both = seen
    assert none == {}
    assert text.keys() == both.keys() != set()
    assert all(not np.array_equal(text[name], both[name]) for name in text)


def test_logits_of_every_position(tmp_path: Path) -> None:
    """Row by row what transformers computes, the soft prompt's rows included."""
    import torch
    from transformers import AutoModelForCausalLM

    directory, file = tiny_llama_dir(tmp_path / "hf"), tmp_path / "m.gguf"
    llm_gguf.write(directory, file, dtype="f32", name="m")
    model: Any = AutoModelForCausalLM.from_pretrained(directory).eval()
    one = stream()
    table = model.get_input_embeddings()
    with torch.no_grad():
        ids = [torch.tensor(i) for i in ((5, 6, 7), (8, 9, 30, 31, 32))]
        embeds = torch.cat([table(ids[0]), torch.from_numpy(one.soft), table(ids[1])])
        wanted = model(inputs_embeds=embeds[None]).logits[0].numpy()
    with reader.open(file, n_ctx=len(one), threads=1, exact=True) as backend:
        found = imatrix_comparison.every_logit(backend, one)
    assert found.shape == (len(one), backend.n_vocab) == (12, backend.n_vocab)
    assert np.abs(found - wanted).max() < 1e-3
    same = distance(wanted, found, one.ids)
    assert same.kl.max() < 1e-6
    assert same.changed.sum() == 0
    labels = torch.log_softmax(torch.from_numpy(wanted[-4:]), -1)
    assert same.nll == pytest.approx(-float(labels[range(4), list(one.ids)].sum()), abs=1e-3)


def test_distance_by_hand() -> None:
    wanted = np.log(np.asarray([[0.5, 0.5], [0.9, 0.1]], np.float32))
    found = np.log(np.asarray([[0.25, 0.75], [0.4, 0.6]], np.float32))
    row = distance(wanted, found, [1])
    assert row.kl[0] == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    assert row.changed.tolist() == [1.0, 1.0]
    assert (row.targets, row.nll) == (1, pytest.approx(-np.log(0.6)))


def test_quantiles_are_over_resampled_positions() -> None:
    """Two studies: all of the large values are in the second, so the interval spans both."""
    kl = np.asarray([0.0] * 10), np.asarray([1.0] * 10)
    rows = [(part, np.zeros(10)) for part in kl]
    found = imatrix_comparison._positions(rows, resampled(2))
    assert found["kl_mean"] == {"value": 0.5, "low": 0.0, "high": 1.0}
    assert found["kl_p99"] == {"value": 1.0, "low": 0.0, "high": 1.0}


def test_what_is_wrong_is_refused_before_the_long_part(
    tiny_run: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"file types are \['Q9'\]; valid: Q8_0"):
        measure(tiny_run, tiny_pairs, tmp_path / "w", file_types=["Q9"], progress=silent)
    (tmp_path / "left").write_text("x", encoding="utf-8")
    with pytest.raises(UsageError, match="is not empty"):
        measure(tiny_run, tiny_pairs, tmp_path, progress=silent)
