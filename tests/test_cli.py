"""The command line as a user meets it: exit codes, one clear line, JSON and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rx_edge.cli import app
from tests.demo_studies import demo_study
from tests.shared_data import shared

runner = CliRunner()


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "rx_edge.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "RX_EDGE_BUNDLE"},
    )


def one_clear_line(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in result.stderr.splitlines() if line.startswith("rx-edge: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return lines[0]


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout.split()[0]) == (0, "rx-edge")


@pytest.mark.parametrize(
    "arguments",
    [
        ("study", "worklist", ".", ".", "--slots", "1,x"),
        ("study", "worklist", ".", ".", "--slots", "0"),
        ("study", "export-memory", ".", "--layers", "2", "x"),
    ],
)
def test_counts_that_are_none_are_usage_errors(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "Invalid value for" in result.stderr


def test_importing_stays_light() -> None:
    """Importing the command line or the runtime leaves torch alone."""
    torch = ("torch", "transformers", "peft")
    for what, heavy in (
        ("rx_edge.cli", (*torch, "numpy", "pydicom", "rich")),
        ("rx_edge.runtime.pipeline", torch),
        ("rx_edge.runtime.session", torch),
    ):
        code = f"import sys, {what}; sys.exit(len({set(heavy)} & sys.modules.keys()))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, what


def test_a_whole_report_leaves_torch_alone(tiny_bundle: Path, phantom_study: Path) -> None:
    code = (
        "import sys; from rx_edge.cli import app\n"
        f"arguments = [{str(phantom_study)!r}, '--bundle', {str(tiny_bundle)!r}, '--json']\n"
        "try: app(['report', *arguments])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_report_streams_text_with_the_banner(tiny_bundle: Path, phantom_study: Path) -> None:
    result = run("report", phantom_study, "--bundle", tiny_bundle, "--max-new-tokens", 6)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("AI DRAFT")
    assert "language: llm_gguf Q8_0 on cpu" in result.stderr


def test_report_json_is_one_document(tiny_bundle: Path, phantom_study: Path) -> None:
    result = run(
        "report", phantom_study, phantom_study, "--bundle", tiny_bundle, "--json",
        "--max-new-tokens", 6,
    )  # fmt: skip
    entries = json.loads(result.stdout)["reports"]
    assert len(entries) == 2
    assert entries[0]["text"] == entries[1]["text"]
    assert entries[0]["status"] == "draft"
    assert len(entries[0]["provenance"]["bundle_sha256"]) == 64


def test_report_of_two_views_and_an_indication(
    asking_bundle: Path, phantom_study: Path, tmp_path: Path
) -> None:
    """However the indication comes, the draft is the same, and nothing repeats it."""
    lateral, words = tmp_path / "lateral.dcm", "Jane Q. Public, cough."
    lateral.write_bytes(phantom_study.read_bytes())
    text = tmp_path / "why.txt"
    text.write_text(words + "\n", "utf-8")
    command = ["report", phantom_study, "--lateral", lateral, "--bundle", asking_bundle, "--json"]
    command += ["--max-new-tokens", 12]
    texts = []
    for more, typed in (
        (["--indication", words], None),
        (["--indication-file", text], None),
        (["--indication-file", "-"], words),
    ):
        result = runner.invoke(app, [*map(str, command), *map(str, more)], input=typed)
        assert result.exit_code == 0, result.stderr
        assert "Public" not in result.output
        (entry,) = json.loads(result.stdout)["reports"]
        assert (entry["provenance"]["views"], entry["provenance"]["indication"]) == ("2", "yes")
        assert entry["study"] == str(phantom_study)
        texts.append(entry["token_ids"])
    assert texts[0] == texts[1] == texts[2]
    plain = runner.invoke(app, [*map(str, command)])
    assert json.loads(plain.stdout)["reports"][0]["token_ids"] != texts[0]


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (2, ["--lateral", "{study}"], "--lateral belongs to one study; name one image, not 2"),
        (2, ["--indication", "Jane"], "--indication belongs to one study"),
        (2, ["--indication-file", "-"], "--indication-file belongs to one study"),
        (1, ["--indication", "Jane", "--indication-file", "-"], "exclude each other"),
        (1, ["--lateral", "absent.dcm"], "'absent.dcm' does not exist"),
        (1, ["--indication-file", "absent.txt"], "'absent.txt' cannot be read"),
        (1, ["--indication-file", "{study}"], "is not UTF-8 text"),
        (1, ["--lateral", "{study}"], "reads one image of a study"),
        (1, ["--indication", "Jane"], "trained without indications"),
    ],
)
def test_what_makes_no_sense_is_usage(
    tiny_bundle: Path, phantom_study: Path, images: int, options: list[str], message: str
) -> None:
    given = [option.format(study=phantom_study) for option in options]
    command = ["report", *[str(phantom_study)] * images, "--bundle", str(tiny_bundle), *given]
    result = runner.invoke(app, command)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Jane" not in result.output
    assert result.stdout == ""


def test_a_failed_study_does_not_hide_the_others(
    tiny_bundle: Path, phantom_study: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    result = run("report", broken, phantom_study, "--bundle", tiny_bundle, "--json",
                 "--max-new-tokens", 4)  # fmt: skip
    assert result.returncode == 1
    entries = json.loads(result.stdout)["reports"]
    assert "error" in entries[0]
    assert "text" in entries[1]


def test_verify_json_lists_every_stage(tiny_bundle: Path) -> None:
    result = run("verify", tiny_bundle, "--json")
    verdict = json.loads(result.stdout)
    assert (result.returncode, verdict["passed"]) == (0, True)
    assert all({"stage", "value", "tolerance"} <= s.keys() for s in verdict["stages"])


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_no_such_image_is_usage(tiny_bundle: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "nothing" if kind == "missing" else tmp_path
    result = run("report", path, "--bundle", tiny_bundle)
    assert result.returncode == 2
    assert str(path) in one_clear_line(result)


def test_bad_files_fail_with_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.dcm"
    text.write_text("this is a text file, whatever its name says\n" * 20, encoding="utf-8")
    result = run("report", text, "--bundle", tiny_bundle)
    assert result.returncode == 1
    assert "notes.dcm" in one_clear_line(result)


def test_a_ct_slice_is_refused(tiny_bundle: Path) -> None:
    ct = shared("data/dicom/ct_syntaxes/CTImage.dcm")
    result = run("report", ct, "--bundle", tiny_bundle)
    assert result.returncode == 1
    assert "CT" in one_clear_line(result)


def test_a_truncated_dicom_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    content = demo_study("RG1_J2KR.dcm").read_bytes()
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(content[: len(content) // 2])
    result = run("report", cut, "--bundle", tiny_bundle)
    assert result.returncode == 1
    one_clear_line(result)


def test_an_unknown_recipe_key_is_usage_and_writes_nothing(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tiny_recipe.read_text("utf-8").replace("threads", "treads"), "utf-8")
    result = run("train", recipe, "--out", tmp_path / "run")
    assert result.returncode == 2
    assert "did you mean 'threads'" in one_clear_line(result)
    assert not (tmp_path / "run").exists()


def test_bundle_problems_exit_3(tmp_path: Path, phantom_study: Path) -> None:
    for command in (["report", phantom_study, "--bundle", tmp_path], ["verify", tmp_path]):
        result = run(*command)
        assert result.returncode == 3
        assert "refused" in one_clear_line(result)


def test_export_of_an_unfinished_run_fails(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    result = run("export", tmp_path / "run", "--out", tmp_path / "bundle")
    assert result.returncode == 1
    assert "not a finished training run" in one_clear_line(result)
    assert not (tmp_path / "bundle").exists()


def test_models_add_and_list(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RX_EDGE_CACHE", str(tmp_path))
    assert runner.invoke(app, ["models", "add", "mine", str(tiny_base / "llama")]).exit_code == 0
    rows = json.loads(runner.invoke(app, ["models", "list", "--json"]).stdout)
    assert {"mine", "smollm2-135m"} <= {row["name"] for row in rows}
    refused = runner.invoke(app, ["models", "add", "bad", str(tmp_path)])
    assert refused.exit_code == 1
    assert "config.json" in refused.stderr


def test_a_missing_extra_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    result = runner.invoke(app, ["models", "fetch"])
    assert result.exit_code == 1
    assert 'pip install "rx-edge[train]"' in result.stderr


def test_a_bench_result_is_json(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    result = runner.invoke(app, ["bench", str(tiny_bundle), "--repeats", "3", "--json", str(out)])
    assert result.exit_code == 0, result.stderr
    assert json.loads(out.read_text("utf-8"))["schema"] == "rx-edge-latency/2"
    assert runner.invoke(app, ["bench", str(tiny_bundle), "--repeats", "1"]).exit_code == 2


def test_train_and_export_from_the_command_line(tiny_recipe: Path, tmp_path: Path) -> None:
    run_dir, bundle = tmp_path / "run", tmp_path / "bundle"
    small = ["--set", "stages.0.epochs=1.0", "--set", "stages.1.epochs=2.0"]
    trained = runner.invoke(app, ["train", str(tiny_recipe), "--out", str(run_dir), *small])
    assert trained.exit_code == 0, trained.stderr
    exported = runner.invoke(
        app, ["export", str(run_dir), "--out", str(bundle), "--llm", "gguf:F16"]
    )
    assert exported.exit_code == 0, exported.stderr
    assert "verified" in exported.stderr


@pytest.mark.slow
def test_demo_is_up_to_date_the_second_time(demo_bundle: Path) -> None:
    from tests.conftest import DEMO_RUN

    result = run("demo", "--out", demo_bundle, "--run", DEMO_RUN)
    assert result.returncode == 0, result.stderr
    assert "up to date" in result.stderr
    assert "Frontal chest radiograph." in result.stdout
    assert "time_to_first_token" in result.stdout
