"""Model directories and a bundle that the exporter tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from rx_edge_export.export import export
from tests.export.planting import SMALL
from tests.factories import tiny_llama_dir


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_dir(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A copy of the model directory that a test may damage."""
    target = tmp_path / "hf"
    target.mkdir()
    for file in llama.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.fixture(scope="session")
def int8_bundle(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mutations") / "bundle"
    export(tiny_run, out, config=SMALL)
    return out
