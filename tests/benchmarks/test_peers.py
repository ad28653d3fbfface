"""Engines taking turns: the structure, equal texts, and nothing left out in silence. No timing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from rx_edge.bundle import open_bundle
from rx_edge.cli import app
from rx_edge.config import CorpusConfig, ExportConfig
from rx_edge.errors import BackendError, UsageError
from rx_edge.prompting import layout, load_tokenizer
from rx_edge.runtime.drafting import Drafter
from rx_edge.runtime.pipeline import open_study
from rx_edge.runtime.session import Session
from rx_edge.train.data import pairs_jsonl
from rx_edge.types import Report, Timings
from rx_edge_bench import latency, peers, turns
from rx_edge_bench.peer_engines import hf, llama_mtmd, openvino_lm, ours
from rx_edge_bench.peer_engines.base import Answer, Picture
from rx_edge_bench.peer_studies import held_out_reports
from rx_edge_bench.peers import MTMD, OPENVINO, OURS, PLAIN, RAW, SCHEMA, SOFT
from rx_edge_bench.peers_table import table
from rx_edge_export.export import export

TOKENS = 12
HF = tuple(hf.CACHES)


@pytest.fixture(autouse=True)
def _no_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(openvino_lm.VARIABLE, raising=False)


@pytest.fixture(scope="module")
def stock_bundle(tiny_run: Path, once: Callable[..., Path]) -> Path:
    config = ExportConfig(vision=("onnx:fp32",), language=("gguf:F16",), stock=True)
    return once("stock-bundle", lambda path: export(tiny_run, path, config=config))


@pytest.fixture(scope="module")
def images(tiny_pairs: Path) -> list[Path]:
    return [tiny_pairs / "images" / f"study-{number}.jpg" for number in (16, 17)]


@pytest.fixture(scope="module")
def result(stock_bundle: Path, tiny_run: Path, images: list[Path]) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(openvino_lm.VARIABLE, raising=False)
        return peers.measure(
            stock_bundle, images, run=tiny_run, repeats=2, max_new_tokens=TOKENS, threads=1
        )


def test_every_engine_has_its_row(result: dict[str, Any]) -> None:
    assert (result["schema"], result["artifact"], result["studies"]) == (SCHEMA, "gguf:F16", 2)
    assert list(result["end_to_end"]) == [OURS, PLAIN, MTMD, *HF]
    for name, row in result["end_to_end"].items():
        assert row["ran"], (name, row)
        assert row["seconds"]["n"] == 4
        assert row["against"][OURS]["studies"] == 2
        assert 0 < row["against"][OURS]["low"] <= row["against"][OURS]["ratio"]
        assert row["text"]["same_every_time"]
    assert result["end_to_end"][OURS]["against"][OURS]["ratio"] == 1.0


def test_the_texts_are_ours(result: dict[str, Any]) -> None:
    for name in (OURS, PLAIN, MTMD, *HF):
        row = result["end_to_end"][name]
        assert row["text"]["equal"] == row["text"]["of"] == 2, (name, row["text"])
        assert row["text"]["differ"] == []
        assert row["new_tokens"]["median"] > 2  # else there was nothing to compare
        assert row["against_where_text_is_equal"] == row["against"]


def test_dictated_reports(stock_bundle: Path, tiny_run: Path, tiny_pairs: Path) -> None:
    """Every engine writes the held-out reports, token for token, whatever it would have chosen."""
    found = peers.measure(
        stock_bundle, (), run=tiny_run, reports=tiny_pairs, limit=2, repeats=2, threads=1
    )
    bundle = open_bundle(stock_bundle)
    tokenizer = load_tokenizer(bundle.path(bundle.manifest.tokenizer))
    wanted = held_out_reports(tiny_pairs, tokenizer, studies=2, tokens=999)
    lengths = sorted(len(ids) for ids in wanted.values())
    assert (found["texts"], found["studies"]) == ("reference reports, dictated", 2)
    for name in (OURS, PLAIN, MTMD, *HF):
        row = found["end_to_end"][name]
        assert row["text"]["equal"] == 2, name
        assert [row["new_tokens"][key] for key in ("least", "most")] == [lengths[0], lengths[-1]]
    assert "dictated" in table(found)
    assert "lungs" not in json.dumps(found)


def test_dictation_is_what_is_written(
    stock_bundle: Path, tiny_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With proposals, of which some are wrong; and afterwards another report."""
    bundle = open_bundle(stock_bundle)
    job, _ = peers._job(bundle, None, None, None, 1)
    tokenizer = load_tokenizer(bundle.path(bundle.manifest.tokenizer))
    written = held_out_reports(tiny_pairs, tokenizer, studies=3, tokens=job.limit)
    short = held_out_reports(tiny_pairs, tokenizer, studies=3, tokens=3)
    assert [ids[:3] for ids in written.values()] == list(short.values())
    texts = {s.image: s.target for s in pairs_jsonl.read(tiny_pairs, CorpusConfig()).samples}
    said: list[Timings] = []

    def run_to_end(session: Session, study: Path) -> Report:
        report = latency.run_to_end(session, study)
        said.append(report.timings)
        return report

    monkeypatch.setattr(ours, "run_to_end", run_to_end)
    monkeypatch.setattr(Drafter, "passed", lambda *_: None)  # else this machine's times decide
    with ours.open_ours(job, drafts=True) as engine:
        for study, ids in written.items():
            answer = engine.draft(Picture(study, tmp_path / "none.png", ids))
            assert answer.ids == ids
            assert answer.text == texts[study]
    proposed, right = sum(t.drafted_tokens for t in said), sum(sum(t.accepted) for t in said)
    assert proposed > right > 0


def test_one_report_per_patient(stock_bundle: Path, tiny_pairs: Path, tmp_path: Path) -> None:
    bundle = open_bundle(stock_bundle)
    tokenizer = load_tokenizer(bundle.path(bundle.manifest.tokenizer))
    every = held_out_reports(tiny_pairs, tokenizer, studies=None, tokens=99)
    rows = [json.loads(line) for line in (tiny_pairs / "pairs.jsonl").read_text().splitlines()]
    held = [row for row in rows if row["split"] != "train"]
    assert len(every) == len(held) == len({row["patient"] for row in held}) > 2
    (tmp_path / "images").symlink_to(tiny_pairs / "images")
    same = [json.dumps({**row, "patient": "one"}) for row in held]
    (tmp_path / "pairs.jsonl").write_text("\n".join(same), "utf-8")
    assert len(held_out_reports(tmp_path, tokenizer, studies=None, tokens=99)) == 1


def test_no_study_is_drafted_from_memory(
    stock_bundle: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a round a session remembers its drafts, as in production; not from one to the next."""
    known: list[int] = []
    job, _ = peers._job(open_bundle(stock_bundle), None, None, TOKENS, 1)
    with ours.open_ours(job, drafts=True) as engine:
        memory = engine.session.drafter._memory  # type: ignore[union-attr]
        kept, clear = memory.add, memory.clear
        monkeypatch.setattr(memory, "add", lambda ids: (known.append(1), kept(ids)))
        monkeypatch.setattr(memory, "clear", lambda: (known.append(0), clear()))
        for image in (*images, *images):
            engine.draft(Picture(image, tmp_path / "none.png"))
    assert known == [1, 1, 0, 1, 1]


def test_the_language_model_alone(result: dict[str, Any]) -> None:
    alone = result["language_alone"]
    assert alone["prompt_tokens"] > 4
    assert 2 <= alone["new_tokens"] <= TOKENS
    ran = [name for name, row in alone["engines"].items() if row["ran"]]
    assert ran == [OURS, SOFT, RAW, *peers.LLAMA_CPP]
    overhead = alone["overhead"]
    assert (overhead["of"], overhead["limit"]) == (RAW, 1.03)
    assert set(overhead["ratios"]) == set(overhead["within_limit"]) == {OURS, SOFT}


def test_what_is_missing_is_named(result: dict[str, Any], stock_bundle: Path) -> None:
    engines = result["language_alone"]["engines"]
    assert engines[OPENVINO]["ran"] is False
    assert openvino_lm.VARIABLE in engines[OPENVINO]["reason"]
    assert "onnx:int8" in engines["ONNX Runtime"]["reason"]
    shown = table(result)
    for name in (*result["end_to_end"], *engines):
        assert name in shown
    assert openvino_lm.VARIABLE in shown
    assert peers.FEW in shown  # two studies conclude nothing


def test_no_text_and_no_file_name(result: dict[str, Any], images: list[Path]) -> None:
    text = json.dumps(result)
    for word in (*(image.stem for image in images), ".jpg", "lungs", "effusion", "/tmp"):
        assert word not in text, word


@pytest.mark.parametrize("first", ["onnx:fp32", "onnx:int8"])
def test_the_int8_tower_has_a_row_beside_another_default(
    tiny_run: Path, once: Callable[..., Path], images: list[Path], tmp_path: Path, first: str
) -> None:
    config = ExportConfig(vision=("onnx:fp32", "onnx:int8"), language=("gguf:F16",))
    bundle = open_bundle(once("two-towers", lambda path: export(tiny_run, path, config=config)))
    towers = sorted(bundle.manifest.vision, key=lambda artifact: artifact.name != first)
    swapped = replace(bundle, manifest=replace(bundle.manifest, vision=tuple(towers)))
    job, _ = peers._job(swapped, None, None, 2, 1)
    rows, _ = peers._end_to_end(
        job, [Picture(images[0], tmp_path / "none.png")], 1, lambda *_: None
    )
    ran = {name: row["settings"]["vision"] for name, row in rows.items() if row["ran"]}
    beside = {peers.INT8: "onnx:int8"} if first == "onnx:fp32" else {}
    assert ran == {OURS: first, PLAIN: first, **beside}


def test_a_bundle_without_mmproj(stock_bundle: Path) -> None:
    bundle = open_bundle(stock_bundle)
    plain = replace(bundle, manifest=replace(bundle.manifest, stock=()))
    job, _ = peers._job(plain, None, None, None, 1)
    assert "stock=true" in (llama_mtmd.is_available(job) or "")


def test_the_margin_is_that_of_our_choice(
    stock_bundle: Path, images: list[Path], tmp_path: Path
) -> None:
    bundle = open_bundle(stock_bundle)
    job, _ = peers._job(bundle, None, None, TOKENS, 1)
    picture = Picture(images[0], tmp_path / "none.png")
    with ours.open_ours(job, drafts=False) as engine:
        ids = engine.draft(picture).ids
        found = [engine.margin(picture, ids[:at]) for at in range(len(ids))]
        session = engine.session
        soft = session.vision.encode(open_study(session, images[0]).images.pixels)[0]
        session.language.rewind(0)
        rows = [session.language.prefill(layout(session.prompt, soft))]
        rows += [session.language.step(np.asarray([i], np.int32))[0] for i in ids[:-1]]
    assert [int(row.argmax()) for row in rows] == list(ids)
    assert found == pytest.approx([float(np.diff(np.sort(r)[-2:])[0]) for r in rows], abs=0.05)


def test_no_run_and_a_failing_interpreter(
    stock_bundle: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command: transformers without a run, and a python without OpenVINO."""
    monkeypatch.setenv(openvino_lm.VARIABLE, sys.executable)
    out = tmp_path / "peers.json"
    line = ["bench", "peers", str(stock_bundle), "--images", str(images[0]), "--llm", "gguf:F16"]
    line += ["--max-new-tokens", "4", "--repeats", "1", "--threads", "1", "--json", str(out)]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text("utf-8"))
    assert found["end_to_end"][MTMD]["ran"]
    for name in HF:
        assert found["end_to_end"][name] == {"ran": False, "reason": hf.NO_RUN}
    assert "openvino" in found["language_alone"]["engines"][OPENVINO]["reason"]
    assert "missing: " in done.output


def test_an_unfinished_run_is_no_peer(
    stock_bundle: Path, images: list[Path], tmp_path: Path
) -> None:
    found = peers.measure(
        stock_bundle, images[:1], run=tmp_path / "nothing", repeats=1, max_new_tokens=2, threads=1
    )
    for name in HF:
        row = found["end_to_end"][name]
        assert not row["ran"]
        assert "not a finished training run" in row["reason"]
        assert str(tmp_path) not in row["reason"]


def test_refusals(stock_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image", "utf-8")
    with pytest.raises(UsageError, match="none of 1 files is a usable"):
        peers.measure(stock_bundle, [tmp_path], repeats=1)
    with pytest.raises(UsageError, match="both name studies"):
        peers.measure(stock_bundle, [tmp_path], reports=tmp_path)
    with pytest.raises(UsageError, match="--limit counts the studies of --reports"):
        peers.measure(stock_bundle, [], limit=3)
    (tmp_path / "pairs.jsonl").write_text("", "utf-8")
    with pytest.raises(UsageError, match="no study with a whole report in val"):
        peers.measure(stock_bundle, [], reports=tmp_path)


def test_a_peer_that_says_something_else_is_listed() -> None:
    """Study 1 differs in its second token; the ratio is also given without it."""
    one = [[Answer((1, 2), "a b", 1.0)], [Answer((1, 2), "a b", 1.0)]]
    two = [[Answer((1, 2), "a b", 2.0)], [Answer((1, 3), "a c", 8.0)]]
    engine: Any = SimpleNamespace(weights="w", settings={})
    found = {OURS: one, PLAIN: one, "peer": two}
    row = peers._drafts_row(engine, found, "peer", lambda study, ids: study + len(ids) / 4)
    assert row["text"]["differ"] == [{"study": 1, "first_difference": 1, "margin": 1.25}]
    assert row["text"]["equal"] == 1
    assert row["against"][OURS]["ratio"] == pytest.approx(4.0)  # geometric mean of 2 and 8
    assert row["against_where_text_is_equal"][OURS]["ratio"] == pytest.approx(2.0)
    assert row["against_where_text_is_equal"][OURS]["studies"] == 1


def test_short_and_long_drafts_have_ratios_of_their_own() -> None:
    """10 s an image in both, 1 s a token beside 0.5 s: longer drafts differ more."""

    def answers(per_token: float) -> list[list[Answer]]:
        lengths = (2, 2, 8, 40)
        return [
            [Answer(tuple(range(n)), "x" * n, 10 + per_token * n)]
            for n in lengths
            for _ in range(8)
        ]

    engine: Any = SimpleNamespace(weights="w", settings={})
    found = {OURS: answers(0.5), PLAIN: answers(0.5), "peer": answers(1.0)}
    row = peers._drafts_row(engine, found, "peer", lambda *_: 0.0)
    short, middling, long = row["against_by_length"]
    assert [part["tokens"] for part in (short, middling, long)] == [(2, 2), (8, 8), (40, 40)]
    assert [part["against"][OURS]["studies"] for part in (short, middling, long)] == [16, 8, 8]
    assert short["against"][OURS]["ratio"] == pytest.approx(12 / 11)
    assert long["against"][OURS]["ratio"] == pytest.approx(50 / 30)
    assert peers._thirds([1] * 29) == []
    assert peers._thirds([7] * 30) == [((7, 7), [True] * 30)]


def test_openvino_is_timed_by_its_own_clock(
    stock_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that writes as many tokens as asked, then one less, then ends."""
    fake = tmp_path / "python"
    fake.write_text(
        f"#!{sys.executable}\nimport json, sys\nsys.stdin.readline()\n"
        "print('rx-edge ' + json.dumps({'version': '0'}), flush=True)\n"
        "for less in (0, 1):\n"
        "    asked = json.loads(sys.stdin.readline())\n"
        "    ids = [0] * (asked['tokens'] - less)\n"
        "    print('rx-edge ' + json.dumps({'ids': ids, 'seconds': 0.5}), flush=True)\n"
        "sys.exit('out of tokens')\n",
        encoding="utf-8",
    )
    fake.chmod(0o755)
    monkeypatch.setenv(openvino_lm.VARIABLE, str(fake))
    job, _ = peers._job(open_bundle(stock_bundle), None, None, 4, 1)
    with openvino_lm.OpenVinoLanguage(job) as engine:
        assert engine.write([1, 2], 3) == 0.5
        with pytest.raises(BackendError, match="wrote 2 tokens; 3 were asked for"):
            engine.write([1, 2], 3)
        with pytest.raises(BackendError, match="out of tokens"):
            engine.write([1, 2], 3)


def test_turns_come_in_an_order_of_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "REST", 0.0)
    order: list[tuple[str, int]] = []

    def turn(engine: Any, study: int, repeat: int) -> int:
        order.append((engine, study))
        return repeat

    engines: dict[str, Any] = {"a": "A", "b": "B", "c": "C"}
    found = turns.take_turns(engines, turn, 30, 2)
    assert found == {name: [[0, 1]] * 30 for name in "abc"}
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert [{study for _, study in round_} for round_ in rounds] == [{i} for i in range(30)] * 2
    orders = ["".join(engine for engine, _ in round_) for round_ in rounds]
    assert set(orders) == {"ABC", "ACB", "BAC", "BCA", "CAB", "CBA"}
    before: list[int] = []
    turns.take_turns(engines, lambda e, *_: before.append(e), 30, 2)  # type: ignore[func-returns-value]
    assert before == [engine for engine, _ in order]  # the same chance in every run


def test_paths_are_cut_to_names() -> None:
    cut = peers.without_directories
    assert cut("cannot load '/a/b/d.gguf': bad") == "cannot load 'd.gguf': bad"
    assert cut("and/or 1 / 2") == "and/or 1 / 2"
