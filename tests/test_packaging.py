"""What is shipped: the wheel works outside the repository, and the house rules hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import rx_edge
from tests.conftest import REPOSITORY

PACKAGES = ("rx_edge", "export/rx_edge_export", "benchmarks/rx_edge_bench")


def sources() -> list[Path]:
    return [p for package in PACKAGES for p in (REPOSITORY / package).rglob("*.py")]


def test_the_wheel_runs_outside_the_repository(tmp_path: Path) -> None:
    """Build, install without dependencies next to the installed ones, and run the command."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
            wheel,
        ],
        check=True,
        capture_output=True,
    )
    # its dependencies come from this environment; rx_edge itself must not
    import typer

    site = Path(typer.__file__).parents[1]
    code = (
        f"import sys; sys.path.append({str(site)!r});"
        "import rx_edge, rx_edge_export, rx_edge_bench;"
        "assert 'venv' in rx_edge.__file__, rx_edge.__file__;"
        "from rx_edge.cli import app; app(['--version'])"
    )
    result = subprocess.run(
        [python, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    assert result.stdout.strip() == f"rx-edge {rx_edge.__version__}", result.stderr


def test_recipes_and_split_files_are_in_the_wheel_tree() -> None:
    assert (REPOSITORY / "rx_edge/train/recipes/demo.toml").is_file()
    assert (REPOSITORY / "rx_edge/train/data/splits/iu_r2gen.json").is_file()


def test_files_stay_short_and_say_what_they_are() -> None:
    for path in sources():
        text = path.read_text("utf-8")
        if text.strip():
            assert text.startswith('"""'), f"{path} has no module docstring"
        assert len(text.splitlines()) <= 420, f"{path} is too long: split by meaning"


def test_only_the_command_line_prints_or_exits() -> None:
    for path in sources():
        if path.parent.name != "cli":
            text = path.read_text("utf-8")
            assert not re.search(r"(?<![\w.])print\(|sys\.exit\(", text), path


def test_no_two_modules_hold_the_same_default() -> None:
    """The banner and the numbers of `config.py` are written once."""
    banner = "NOT FOR DIAGNOSTIC USE"
    holders = [p.name for p in sources() if banner in p.read_text("utf-8")]
    assert holders == ["config.py"]


def test_version_and_changelog_agree() -> None:
    changelog = (REPOSITORY / "CHANGELOG.md").read_text("utf-8")
    assert re.search(rf"^## \[?{re.escape(rx_edge.__version__)}", changelog, re.MULTILINE)


def test_readme_names_every_command() -> None:
    from rx_edge.cli import app

    readme = (REPOSITORY / "README.md").read_text("utf-8")
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        assert f"rx-edge {name}" in readme, name
    for target in ("make demo", "make test"):
        assert target in readme


def test_the_formats_table_tells_the_tolerances_in_force() -> None:
    from rx_edge_export import tolerances

    table = (REPOSITORY / "export/README.md").read_text("utf-8")
    for precision in (*tolerances.PREFILL_KL, *tolerances.SOFT_PROMPT):
        assert precision in table
