"""Latency results: their structure and their honesty, never how fast they are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rx_edge.errors import UsageError
from rx_edge.runtime.session import Session, open_session
from rx_edge_bench import (
    attention,
    cold_start,
    latency,
    latency_page,
    levers,
    resources,
    worklist_study,
)
from rx_edge_export import phantom


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("patient-doe")
    paths = [root / f"doe-{number}.dcm" for number in range(4)]
    for number, path in enumerate(paths):
        phantom.write_dicom(path, phantom.display(number), "MONOCHROME2")
    return paths


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Session]:
    with open_session(tiny_bundle, language="F16", max_new_tokens=20) as opened:
        yield opened


@pytest.fixture(scope="module")
def result(session: Session, studies: list[Path]) -> dict[str, Any]:
    return latency.measure(session, studies, repeats=2)


def test_every_stage_has_a_spread(result: dict[str, Any]) -> None:
    assert result["schema"] == latency.SCHEMA
    assert set(result["seconds"]) == {*latency.STAGES, "time_to_first_sentence"}
    for stage, spread in result["seconds"].items():
        assert spread["n"] == 8, stage
        assert spread["least"] <= spread["q1"] <= spread["median"] <= spread["q3"], stage
        assert "p90" not in spread  # eight drafts carry no such quantile
    total, first = result["seconds"]["total"], result["seconds"]["time_to_first_token"]
    assert total["median"] > first["median"] > result["seconds"]["vision"]["median"]


def test_the_work_is_counted(result: dict[str, Any], session: Session) -> None:
    work = result["work"]
    assert work["identical_drafts"]
    assert work["cached_tokens"] == {str(len(session.prompt.before)): 8}
    assert sum(work["new_tokens"].values()) == 8
    assert work["tokens_per_pass"] >= 1.0
    assert result["memory"]["peak_rss_bytes"] >= result["memory"]["rss_bytes_last"] > 1e6
    assert result["memory"]["growth_bytes_per_report"] is None  # too few reports to say
    assert result["roofline"]["share"] > 0
    assert result["energy"]["source"]


def test_no_text_and_no_file_name(result: dict[str, Any]) -> None:
    assert "doe" not in json.dumps(result)
    assert "radiograph." not in json.dumps(result)


def test_too_few_drafts_are_refused(session: Session, studies: list[Path]) -> None:
    with pytest.raises(UsageError, match="too few"):
        latency.measure(session, studies[:2], repeats=1)


def test_quantiles_need_samples() -> None:
    assert "p90" in latency.spread([1.0] * 64)
    assert "p99" not in latency.spread([1.0] * 64)
    assert "p99" in latency.spread([1.0] * 662)
    assert latency.spread([]) == {"n": 0}


def test_growth_is_the_slope_of_the_second_half() -> None:
    leaking = [10_000 * n for n in range(100)]
    assert resources.memory(leaking)["growth_bytes_per_report"] == pytest.approx(10_000)
    warmed = [*range(0, 5_000, 100), *[5_000] * 50]
    assert resources.memory(warmed)["growth_bytes_per_report"] == pytest.approx(0, abs=1e-6)


def test_energy_is_read_from_the_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = tmp_path / "intel-rapl:0"
    domain.mkdir()
    (domain / "energy_uj").write_text("1000000")
    monkeypatch.setattr(resources, "RAPL", tmp_path)
    meter = resources.Energy()
    (domain / "energy_uj").write_text("3500000")
    assert meter.joules() == pytest.approx(2.5)
    (domain / "energy_uj").write_text("10")  # the counter has wrapped
    assert meter.joules() is None
    monkeypatch.setattr(resources, "RAPL", tmp_path / "none")
    assert resources.Energy().joules() is None


def test_the_page_shows_every_stage_and_loads_nothing(result: dict[str, Any]) -> None:
    html = latency_page.page(result)
    for stage in latency.STAGES:
        assert f">{stage}<" in html
    assert "<svg" in html
    assert not re.search(r"(src|href)=\"https?:", html)
    assert html == latency_page.page(result)


def test_each_lever_is_switched_off_in_turn(tiny_bundle: Path, studies: list[Path]) -> None:
    found = levers.measure(tiny_bundle, studies[:2], repeats=2, language="F16", without="gguf:Q8_0")
    assert set(found["settings"]) == {
        "all on", "drafts off", "prefix_cache off", "fused_prefill off", "gguf:F16 -> gguf:Q8_0",
    }  # fmt: skip
    on = found["settings"]["all on"]
    assert on["against_all_on"]["total"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    for name, off in found["settings"].items():
        assert off["seconds"]["total"]["n"] == 4, name
        if "->" not in name:
            assert off["changed_drafts"] == [], name
    assert set(found["settings"]["prefix_cache off"]["work"]["cached_tokens"]) == {"0"}
    assert found["settings"]["drafts off"]["work"]["drafted_tokens"] == 0
    assert "What each lever brings" in latency_page.page(found)


def test_a_ratio_has_an_interval() -> None:
    rng = np.random.default_rng(0)

    def drafts(factor: float) -> list[Any]:
        from rx_edge.types import Report, Timings

        return [
            latency.Drafted(
                n,
                Report("", "", (), (), "end", Timings(total=factor * rng.normal(1, 0.02)), {}),
                0.0,
            )
            for n in range(30)
        ]

    found = levers.ratio(drafts(1.0), drafts(1.5), "total")
    assert found["low"] < 1.5 < found["high"] < 1.6


def test_a_worklist_is_measured_against_one_by_one(tiny_bundle: Path, studies: list[Path]) -> None:
    found = worklist_study.measure(
        tiny_bundle, studies, vision="onnx:fp32", slots=(1, 2), repeats=1
    )
    assert "vision: vision_onnx fp32 on cpu (asked for)" in found["runs"]
    assert set(found["ways"]) == {
        "one by one", "one by one, drafts off", "workers of 1 slots", "workers of 2 slots",
    }  # fmt: skip
    for way in found["ways"].values():
        assert way["reports_per_second"] > 0
    with pytest.raises(UsageError, match="too few"):
        worklist_study.measure(tiny_bundle, studies[:2])


def test_a_cold_start_is_a_fresh_process(tiny_bundle: Path, studies: list[Path]) -> None:
    found = cold_start.measure(tiny_bundle, studies[0], repeats=1)
    first = found["process_start_to_first_token"]
    assert first["warm"]["n"] == first["cold"]["n"] == 1
    assert 0 < first["warm"]["median"] <= found["process_start_to_end"]["warm"]["median"]


def test_attention_is_compared_on_studies(session: Session, studies: list[Path]) -> None:
    found = attention.measure(session, studies[:2])
    assert set(found["flash_attention"]) == {"on", "off"}
    for setting in found["flash_attention"].values():
        assert setting["tokens"] > 10
        assert setting["seconds"]["prompt"]["n"] == 2
        for width in setting["by_tokens_per_pass"].values():
            assert 0 <= width["other_choices"] <= setting["tokens"]
            assert width["largest_difference"] < 0.1  # a tiny model: rounding, not another draft
