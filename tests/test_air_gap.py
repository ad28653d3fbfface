"""A packed bundle is installed, verified and run on a machine that has no network."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from rx_edge.config import DRAFT_BANNER
from rx_edge_export.pack import pack
from tests.no_network import no_network

pytestmark = pytest.mark.slow

NETWORK = (
    "import socket; s = socket.socket(); s.settimeout(5); "
    "raise SystemExit(s.connect_ex(('1.1.1.1', 443)) == 0)"
)


def offline(*command: object, home: Path) -> subprocess.CompletedProcess[str]:
    """Run without a network, and with nothing of this machine's settings or caches."""
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(home),
        "RX_EDGE_CACHE": str(home / "cache"),
        "PIP_NO_INDEX": "1",
        "LANG": "C.UTF-8",
        "PYTHON": sys.executable,
        **{k: v for k, v in os.environ.items() if k.startswith("OMP_")},
    }
    return subprocess.run(
        [*no_network(), *map(str, command)],
        capture_output=True, text=True, check=False, env=environment, cwd=home,
    )  # fmt: skip


def test_install_verify_and_report_without_a_network(
    tiny_bundle: Path, phantom_study: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    assert offline(sys.executable, "-c", NETWORK, home=home).returncode == 0
    pack(tiny_bundle, tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar") as archive:
        archive.extractall(home, filter="data")
    top = home / "rx-edge-tiny"

    installed = offline("sh", top / "install.sh", home / "env", home=home)
    assert installed.returncode == 0, installed.stderr
    assert "ready:" in installed.stderr
    commands = home / "env" / "bin"
    verified = offline(commands / "rx-edge", "verify", top / "bundle", "--json", home=home)
    assert verified.returncode == 0, verified.stderr
    draft = offline(
        commands / "rx-edge", "report", phantom_study, "--bundle", top / "bundle",
        "--max-new-tokens", 8, home=home,
    )  # fmt: skip
    assert draft.returncode == 0, draft.stderr
    assert draft.stdout.startswith(DRAFT_BANNER)

    names = offline(commands / "python", "-m", "pip", "list", "--format=freeze", home=home).stdout
    pins = (top / "constraints.txt").read_text("utf-8").lower().split()
    assert set(pins) <= set(names.lower().split())
    assert not [
        n for n in names.lower().split() if n.startswith(("torch", "transformers", "onnx="))
    ]
