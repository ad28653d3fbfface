"""Other engines beside ours: the same text on the same file, and nothing left out in silence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rx_edge.backends import gguf_engine
from rx_edge.bundle import open_bundle
from rx_edge.cli import studies
from rx_edge.errors import UsageError
from rx_edge_bench import peer_check
from rx_edge_bench.peer_check import SCHEMA, Said, check, first_difference, judge
from rx_edge_bench.peer_engines.openvino_lm import VARIABLE

TIE = 0.02  # logits
PROMPTS = ("The heart size is normal.", "There is a pleural effusion.", "")


@pytest.fixture(autouse=True)
def _no_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def test_llama_cpp_python_says_the_same(tiny_bundle: Path) -> None:
    result = check(tiny_bundle, "gguf:F16", PROMPTS, max_new_tokens=24, threads=1)
    assert (result["schema"], result["artifact"]) == (SCHEMA, "gguf:F16")
    for name, flash in peer_check.LLAMA_CPP.items():
        peer = result["peers"][name]
        assert peer["ran"]
        assert peer["settings"]["flash_attn"] is flash
        assert peer["same_prompt_ids"] == len(PROMPTS)
        if flash == gguf_engine.FLASH_ATTENTION:
            assert peer["identical"] == len(PROMPTS)
        for said in peer["prompts"]:  # with the other attention only a tie may fall otherwise
            assert said["identical"] or said["margin"] < TIE
        assert "/" not in json.dumps(peer)
    assert max(result["new_tokens"]) > 3  # else there was nothing to compare


def test_a_peer_that_runs_another_file_is_caught(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the peer read the weights of another prompt: the difference has a place and size."""
    faithful = peer_check._llama_cpp

    def swapped(
        session: Any, file: Path, texts: Any, prompts: Any, *rest: int, **more: bool
    ) -> Any:
        return faithful(session, file, texts, [*prompts[1:], prompts[0]], *rest, **more)

    monkeypatch.setattr(peer_check, "_llama_cpp", swapped)
    result = check(tiny_bundle, "gguf:F16", PROMPTS[:2], max_new_tokens=24, threads=1)
    peer = result["peers"]["llama-cpp-python"]
    assert (peer["same_prompt_ids"], peer["identical"]) == (0, 0)
    for verdict in peer["prompts"]:
        assert not verdict["identical"]
        assert verdict["first_difference"] >= 0
        assert verdict["margin"] > 0


def test_a_missing_peer_is_reported(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = check(tiny_bundle, "gguf:F16", PROMPTS[:1], threads=1)["peers"]["openvino-genai"]
    assert peer["ran"] is False
    assert VARIABLE in peer["reason"]
    for python, reason in (
        ("/nonexistent/python", "FileNotFoundError"),
        (sys.executable, "openvi"),
    ):
        monkeypatch.setenv(VARIABLE, python)
        peer = check(tiny_bundle, "gguf:F16", PROMPTS[:1], threads=1)["peers"]["openvino-genai"]
        assert peer["ran"] is False
        assert reason in peer["reason"]
        assert "prompts" not in peer


def test_the_other_interpreter_is_asked_and_judged(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for OpenVINO that ends at once: the protocol works, and the end is a token."""
    fake = tmp_path / "python"
    fake.write_text(
        f"#!{sys.executable}\nimport json, sys\nasked = json.loads(sys.stdin.readline())\n"
        "assert sys.argv[1] == '-c' and asked['file'].endswith('llm.F16.gguf')\n"
        "print('noise\\nrx-edge ' + json.dumps({'version': '0'}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    end = json.loads(line)['end']\n"
        "    print('rx-edge ' + json.dumps({'ids': [end], 'seconds': 0.5}), flush=True)\n",
        encoding="utf-8",
    )
    fake.chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(fake))
    result = check(tiny_bundle, "gguf:F16", PROMPTS[:1], max_new_tokens=8, threads=1)
    assert result["bundle_sha256"] == open_bundle(tiny_bundle).digest
    peer = result["peers"]["openvino-genai"]
    assert (peer["ran"], peer["identical"]) == (True, 0)
    assert peer["prompts"][0]["first_difference"] == 0


def test_the_commands_write_one_document(tiny_bundle: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    for command in (studies.peers, studies.imatrix, studies.deployment_loss):
        app.command()(command)
    out = tmp_path / "peers.json"
    line = ["peers", str(tiny_bundle), "--llm", "gguf:F16", "--prompt", "The heart", "--threads"]
    done = CliRunner().invoke(app, [*line, "1", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text("utf-8"))["prompts"] == ["The heart"]
    for name in ("imatrix", "deployment-loss"):
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


def test_what_cannot_be_compared_is_refused(tiny_bundle: Path) -> None:
    for prompts, tokens in (((), 8), (PROMPTS, 0)):
        with pytest.raises(UsageError, match="peers need a GGUF artefact"):
            check(tiny_bundle, "gguf:F16", prompts, max_new_tokens=tokens)


def test_difference_and_margin() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2], [1]) == 1
    assert first_difference([], [4]) == 0
    ours = Said((5, 6), (2.0, 1.0, 0.25))
    assert judge(ours, [5, 6], str) == {
        "identical": True, "first_difference": None, "margin": None,
    }  # fmt: skip
    assert judge(ours, [5, 7], str)["margin"] == 1.0
    assert judge(ours, [5, 6, 7], str) == {
        "identical": False, "first_difference": 2, "margin": 0.25,
    }  # fmt: skip
