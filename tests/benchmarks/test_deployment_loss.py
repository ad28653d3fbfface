"""The cost of deployment: none for a faithful bundle, and seen where another model is planted."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rx_edge.bundle import MANIFEST, describe, open_bundle
from rx_edge.config import ExportConfig
from rx_edge.errors import BundleError, UsageError
from rx_edge.runtime.session import open_checked
from rx_edge_bench import deployment_loss
from rx_edge_bench.deployment_loss import METRICS, SCHEMA, measure, paired, resampled
from rx_edge_export import llm_gguf
from rx_edge_export.export import export, silent
from tests.factories import tiny_llama_dir

pytest.importorskip("rouge_score", reason="[bench] is not installed")
pytest.importorskip("sacrebleu", reason="[bench] is not installed")
F16 = "gguf:F16"


@pytest.fixture(scope="module")
def result(tiny_run: Path, tiny_bundle: Path, tiny_pairs: Path) -> dict[str, Any]:
    return measure(tiny_run, tiny_bundle, tiny_pairs, [F16, "Q8_0"], threads=1, progress=silent)


@pytest.fixture(scope="module")
def planted(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that agrees with itself but holds the language model of another seed."""
    root = tmp_path_factory.mktemp("planted") / "bundle"
    shutil.copytree(tiny_bundle, root)
    other = tiny_llama_dir(root.parent / "other", seed=5)
    manifest = json.loads((root / MANIFEST).read_text("utf-8"))
    llm_gguf.write(
        other, root / "llm.F16.gguf", dtype="f16", name="other", pairing=manifest["pairing"]
    )
    entry = describe(root / "llm.F16.gguf")
    manifest["files"]["llm.F16.gguf"] = {"sha256": entry.sha256, "bytes": entry.bytes}
    (root / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return root


def test_the_same_numbers_cost_nothing(
    tiny_run: Path, tiny_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 language model in exact arithmetic: every draft and every metric is the same.

    Beside it an int8 tower, which does cost something: it is the tower that is asked for.
    """
    out = tmp_path / "bundle"
    towers = ("onnx:fp32", "onnx:int8")
    export(tiny_run, out, config=ExportConfig(vision=towers, language=("gguf:F32",)))
    exact = functools.partial(open_checked, exact=True)
    monkeypatch.setattr(deployment_loss, "open_checked", exact)
    result = measure(tiny_run, out, tiny_pairs, ["gguf:F32"], threads=1, progress=silent)
    found = result["artifacts"]["gguf:F32"]
    assert found["drafts"]["identical"] == {"share": 1.0, "low": 1.0, "high": 1.0, "studies": 8}
    for name, metric in found["metrics"].items():
        assert metric["change"] == pytest.approx(0.0, abs=1e-5), name
        assert metric["change_low"] == pytest.approx(0.0, abs=1e-5), name
    assert found["metrics"]["nll_per_token"]["torch"] > 0.1
    int8 = measure(
        tiny_run, out, tiny_pairs, ["gguf:F32"], vision="onnx:int8", threads=1, progress=silent
    )
    assert (result["vision"], int8["vision"]) == towers
    likelihood = int8["artifacts"]["gguf:F32"]["metrics"]["nll_per_token"]
    assert likelihood["torch"] == found["metrics"]["nll_per_token"]["torch"]
    assert abs(likelihood["change"]) > 1e-5


def test_float16_in_production_costs_next_to_nothing(result: dict[str, Any]) -> None:
    assert (result["schema"], result["n"], result["n_with_report"]) == (SCHEMA, 8, 8)
    found = result["artifacts"][F16]
    likelihood = found["metrics"]["nll_per_token"]
    assert abs(likelihood["change"]) < 1e-3
    assert likelihood["within_limit"]
    assert likelihood["interval_within_limit"]
    assert found["drafts"]["changed_where_torch_was_decided"]["studies"] == 0


def test_the_likelihood_is_that_of_the_trainer(
    result: dict[str, Any], tiny_run: Path, tiny_pairs: Path
) -> None:
    """Independent route: the training loss of the same studies."""
    import torch

    from rx_edge.model.language import hidden_states
    from rx_edge.model.report_model import IGNORE, load_run
    from rx_edge.train.batching import Example, collate

    model = load_run(tiny_run)
    studies = deployment_loss.read_studies(model, tiny_pairs, ("val", "test"), None)
    nats = tokens = 0.0
    with torch.inference_mode():
        for study in studies:
            soft = model.encoder(torch.from_numpy(study.pixels))[0]
            batch = collate(model, [Example(study.sample, study.ids)], None, softs=[soft])
            wanted = batch.targets != IGNORE
            hidden = hidden_states(model.lm, batch.embeds, batch.mask)
            logits = model.lm.get_output_embeddings()(hidden[wanted])
            loss = torch.nn.functional.cross_entropy(logits, batch.targets[wanted], reduction="sum")
            nats, tokens = nats + float(loss), tokens + int(wanted.sum())
    assert tokens == result["target_tokens"]
    found = result["artifacts"][F16]["metrics"]["nll_per_token"]["torch"]
    assert found == pytest.approx(nats / tokens, rel=1e-5)


def test_two_views_and_an_indication_cost_next_to_nothing(
    asking_run: Path, asking_bundle: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    from rx_edge.model.report_model import load_run

    root = tmp_path / "pairs"
    shutil.copytree(tiny_pairs, root)
    rows = [json.loads(line) for line in (root / "pairs.jsonl").read_text("utf-8").splitlines()]
    frontal = [{**row, "lateral": rows[i + 1]["image"]} for i, row in enumerate(rows) if i % 2 == 0]
    frontal[-1] |= {"lateral": None}
    lines = [json.dumps({**row, "indication": f"cough {i}"}) for i, row in enumerate(frontal)]
    (root / "pairs.jsonl").write_text("\n".join(lines), "utf-8")
    studies = deployment_loss.read_studies(load_run(asking_run), root, ("val", "test"), None)
    assert sorted(len(study.pixels) for study in studies) == [1, 2, 2, 2]
    assert {study.indication for study in studies} == {f"cough {i}" for i in range(6, 10)}
    result = measure(asking_run, asking_bundle, root, [F16], threads=1, progress=silent)
    found = result["artifacts"][F16]
    assert abs(found["metrics"]["nll_per_token"]["change"]) < 1e-3
    assert found["drafts"]["changed_where_torch_was_decided"]["studies"] == 0
    assert "cough" not in json.dumps(result)


def test_nothing_of_the_studies_is_told(
    result: dict[str, Any], tiny_pairs: Path, tiny_bundle: Path
) -> None:
    text = json.dumps(result, allow_nan=False)
    for secret in ("study-", ".jpg", "pneumothorax", "effusion", str(tiny_pairs), "/tmp"):
        assert secret not in text, secret
    assert result["bundle_sha256"] == open_bundle(tiny_bundle).digest
    assert result["data"]["licences"] == {"unstated": 8}


def test_the_same_input_gives_the_same_figures(
    result: dict[str, Any], tiny_run: Path, tiny_bundle: Path, tiny_pairs: Path
) -> None:
    again = measure(tiny_run, tiny_bundle, tiny_pairs, [F16], threads=1, progress=silent)
    assert again["artifacts"][F16] == result["artifacts"][F16]


def test_a_planted_worse_model_is_seen(
    planted: Path, tiny_run: Path, tiny_pairs: Path, result: dict[str, Any]
) -> None:
    bad = measure(tiny_run, planted, tiny_pairs, [F16], threads=1, progress=silent)
    found = bad["artifacts"][F16]
    likelihood = found["metrics"]["nll_per_token"]
    assert likelihood["torch"] == result["artifacts"][F16]["metrics"]["nll_per_token"]["torch"]
    assert likelihood["change_low"] > 0
    assert likelihood["percent"] == pytest.approx(100 * likelihood["change"] / likelihood["torch"])
    assert not likelihood["within_limit"]
    assert not likelihood["interval_within_limit"]
    rouge = found["metrics"]["rouge_l"]
    assert rouge["change_high"] < 0
    assert found["drafts"]["identical"]["share"] == 0.0


def test_what_is_wrong_is_refused_before_the_long_part(
    tiny_run: Path, tiny_bundle: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="no language model 'gguf:Q2'"):
        measure(tiny_run, tiny_bundle, tiny_pairs, ["gguf:Q2"], progress=silent)
    with pytest.raises(BundleError, match="no vision model 'onnx:int8'"):
        measure(tiny_run, tiny_bundle, tiny_pairs, [F16], vision="onnx:int8", progress=silent)
    with pytest.raises(UsageError, match="--limit is 0"):
        measure(tiny_run, tiny_bundle, tiny_pairs, [F16], limit=0, progress=silent)
    other = tmp_path / "run"
    shutil.copytree(tiny_run, other)
    from safetensors.numpy import load_file, save_file

    weights = load_file(other / "final" / "projector.safetensors")
    weights = {k: v + 1 for k, v in weights.items()}
    save_file(weights, other / "final" / "projector.safetensors")
    with pytest.raises(UsageError, match="exported from another run"):
        measure(other, tiny_bundle, tiny_pairs, [F16], progress=silent)


def test_the_interval_is_paired() -> None:
    """Studies differ a lot, systems by exactly 0.5: an unpaired interval would be wide."""
    counts = resampled(20)
    assert (counts.sum(1) == 20).all()
    assert (counts == resampled(20)).all()
    hard = np.random.default_rng(0).uniform(1, 9, 20)
    one = np.stack([hard, np.ones(20)], axis=1)
    found = paired(METRICS["nll_per_token"], one, one + np.array([0.5, 0.0]), counts)
    for key in ("change", "change_low", "change_high"):
        assert found[key] == pytest.approx(0.5)
    assert found["percent"] == pytest.approx(50 / hard.mean())


def test_bleu_and_f1_follow_from_sums() -> None:
    from sacrebleu.metrics import BLEU

    wanted = ["The heart is normal in size today.", "There is a left pleural effusion seen."]
    said = ["The heart is normal in size.", "There is a right pleural effusion seen now."]
    rows = [deployment_loss._bleu_sums(w, s) for w, s in zip(wanted, said, strict=True)]
    _, bleu = METRICS["bleu_4"]
    found = bleu(np.asarray([np.sum(rows, axis=0)]))[0]
    assert found == pytest.approx(BLEU().corpus_score(said, [wanted]).score)
    _, f1 = METRICS["label_f1"]
    labels = deployment_loss._labels("There is an effusion. Cardiomegaly.", "Effusion. A fracture.")
    assert labels == [1.0, 1.0, 1.0]
    assert f1(np.asarray([labels]))[0] == 0.5
