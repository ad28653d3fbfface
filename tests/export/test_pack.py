"""The archive: complete, the same bytes each time, and refused here rather than at the hospital."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import rx_edge
from rx_edge.bundle import MANIFEST, open_bundle
from rx_edge.cli import packaging
from rx_edge.cli.common import Group
from rx_edge.errors import BundleError, ExportError, UsageError
from rx_edge_export.pack import SUMS, gather, pack
from tests.conftest import REPOSITORY

RX_EDGE = """Provides-Extra: cpu
Provides-Extra: sign
Requires-Dist: engine>=1
Requires-Dist: vision-engine; extra == "cpu"
Requires-Dist: signer; extra == "sign"
"""


def wheel(directory: Path, name: str, version: str, headers: str = "") -> Path:
    """An installable wheel without code."""
    stem = f"{name.replace('-', '_')}-{version}"
    path = directory / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{headers}\n"
            f"# {name}, the readme\n",
            "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
            "Tag: py3-none-any\n",
            "RECORD": "",
        }.items():
            archive.writestr(f"{stem}.dist-info/{file}", text)
    return path


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """What `rx-edge[cpu]` of this version needs, an older engine, and one that nobody needs."""
    directory = tmp_path / "my wheels"
    directory.mkdir()
    wheel(directory, "rx-edge", rx_edge.__version__, RX_EDGE)
    wheel(directory, "engine", "1.5")
    wheel(directory, "engine", "2.0")
    wheel(directory, "vision-engine", "3.1")
    wheel(directory, "unrelated", "1.0")
    return directory


def unpack(archive: Path, into: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(into, filter="data")
    (top,) = into.iterdir()
    return top


def test_the_archive_is_complete(tiny_bundle: Path, wheels: Path, tmp_path: Path) -> None:
    packed = pack(tiny_bundle, tmp_path / "out.tar", wheels=wheels)
    assert (tmp_path / "out.tar").stat().st_size == packed.bytes
    top = unpack(tmp_path / "out.tar", tmp_path / "unpacked")
    assert top.name == "rx-edge-tiny"
    assert open_bundle(top / "bundle").digest == open_bundle(tiny_bundle).digest
    assert {p.name for p in (top / "wheels").iterdir()} == {
        f"rx_edge-{rx_edge.__version__}-py3-none-any.whl", "engine-2.0-py3-none-any.whl",
        "vision_engine-3.1-py3-none-any.whl",
    }  # fmt: skip
    pins = (top / "constraints.txt").read_text("utf-8").split()
    assert pins == ["engine==2.0", f"rx-edge=={rx_edge.__version__}", "vision-engine==3.1"]
    assert packed.wheels == len(pins)
    assert "# rx-edge, the readme" in (top / "docs/README.md").read_text("utf-8")
    for text in (top / "install.sh", top / "docs/INSTALL.md"):
        assert "rx-edge[cpu]" in text.read_text("utf-8")
        assert "@PY" not in text.read_text("utf-8")
    assert os.access(top / "install.sh", os.X_OK)


def test_the_sums_cover_every_other_file(tiny_bundle: Path, wheels: Path, tmp_path: Path) -> None:
    pack(tiny_bundle, tmp_path / "out.tar", wheels=wheels)
    top = unpack(tmp_path / "out.tar", tmp_path / "unpacked")
    sums = dict(reversed(line.split("  ")) for line in (top / SUMS).read_text().splitlines())
    files = {p.relative_to(top).as_posix(): p for p in top.rglob("*") if p.is_file()}
    assert sums.keys() == files.keys() - {SUMS}
    for name, digest in sums.items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest, name


def test_equal_inputs_give_equal_bytes(tiny_bundle: Path, wheels: Path, tmp_path: Path) -> None:
    first = pack(tiny_bundle, tmp_path / "a.tar", wheels=wheels)
    os.utime(wheels / "engine-2.0-py3-none-any.whl", (1, 1))
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_bundle, copy)
    assert pack(copy, tmp_path / "b.tar", wheels=wheels).sha256 == first.sha256
    with tarfile.open(tmp_path / "a.tar") as tar:
        for member in tar.getmembers():
            assert (member.uid, member.gid, member.uname, member.mtime) == (0, 0, "", 0)


def test_it_names_no_path_of_this_machine(tiny_bundle: Path, wheels: Path, tmp_path: Path) -> None:
    pack(tiny_bundle, tmp_path / "out.tar", wheels=wheels)
    content = (tmp_path / "out.tar").read_bytes()
    for path in (tmp_path, REPOSITORY, tiny_bundle, Path(sys.prefix)):
        assert str(path).encode() not in content


def test_a_missing_wheel_is_found_here(
    tiny_bundle: Path, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (wheels / "vision_engine-3.1-py3-none-any.whl").rename(elsewhere / "vision_engine-3.1.whl")
    wheel(elsewhere, "vision-engine", "3.1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(elsewhere))  # no setting of this machine helps
    with pytest.raises(ExportError, match="vision-engine"):
        pack(tiny_bundle, tmp_path / "out.tar", wheels=wheels)
    assert not [p for p in tmp_path.iterdir() if "out.tar" in p.name]


def test_what_cannot_be_packed(tiny_bundle: Path, wheels: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.tar"
    with pytest.raises(UsageError, match="holds no wheels"):
        pack(tiny_bundle, out, wheels=tmp_path)
    with pytest.raises(UsageError, match="inside the bundle"):
        pack(tiny_bundle, tiny_bundle / "out.tar", wheels=wheels)
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    (bundle / "notes.txt").write_text("patient list", "utf-8")
    with pytest.raises(BundleError, match=r"'notes.txt' is not listed"):
        pack(bundle, out, wheels=wheels)
    (bundle / "notes.txt").unlink()
    text = (bundle / MANIFEST).read_text("utf-8")
    (bundle / MANIFEST).write_text(text.replace('"passed": true', '"passed": false'), "utf-8")
    with pytest.raises(BundleError, match="no passing verification"):
        pack(bundle, out, wheels=wheels)
    assert not out.exists()
    out.write_text("mine", "utf-8")
    with pytest.raises(UsageError, match="exists"):
        pack(tiny_bundle, out, wheels=wheels)
    assert out.read_text("utf-8") == "mine"


def test_an_installed_rx_edge_asks_for_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rx_edge, "__file__", str(tmp_path / "site-packages/rx_edge/__init__.py"))
    with pytest.raises(UsageError, match=r"--wheels DIR"):
        gather(tmp_path)


def test_a_signed_bundle_brings_what_checks_it(
    tiny_bundle: Path, wheels: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    (bundle / "model.sig").write_text("{}", "utf-8")
    with pytest.raises(ExportError, match="signer"):
        pack(bundle, tmp_path / "out.tar", wheels=wheels)
    wheel(wheels, "signer", "1.0")
    pack(bundle, tmp_path / "out.tar", wheels=wheels)
    top = unpack(tmp_path / "out.tar", tmp_path / "unpacked")
    assert (top / "bundle/model.sig").is_file()
    assert "verify-signature" in (top / "docs/INSTALL.md").read_text("utf-8")
    wheel(wheels, "rx-edge", rx_edge.__version__, RX_EDGE.replace("Provides-Extra: sign\n", ""))
    with pytest.raises(ExportError, match="no extra sign"):
        pack(bundle, tmp_path / "other.tar", wheels=wheels)


def install(top: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(top / "install.sh"), *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
        cwd=top.parent,
    )  # fmt: skip


def test_the_installer_refuses_before_it_writes(
    tiny_bundle: Path, wheels: Path, tmp_path: Path
) -> None:
    pack(tiny_bundle, tmp_path / "out.tar", wheels=wheels)
    top = unpack(tmp_path / "out.tar", tmp_path / "unpacked")
    other = tmp_path / "python9"
    other.write_text("#!/bin/sh\necho 9.9 linux pdp11\n", "utf-8")
    other.chmod(0o755)
    for arguments, environment, message in (
        ([str(tmp_path)], {"PYTHON": sys.executable}, "exists"),
        ([], {"PYTHON": str(other)}, "this is 9.9 linux pdp11"),
        ([], {"PYTHON": "no-such-python"}, "no-such-python is needed"),
    ):
        refused = install(top, *arguments, **environment)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert message in refused.stderr
    with (top / "bundle/tokenizer.json").open("ab") as stream:
        stream.write(b" ")
    refused = install(top, PYTHON=sys.executable)
    assert refused.returncode == 1
    assert "bundle/tokenizer.json" in refused.stderr
    assert "OK" not in refused.stderr
    assert not (top.parent / "rx-edge").exists()


def test_the_command(tiny_bundle: Path, wheels: Path, tmp_path: Path) -> None:
    app = typer.Typer(cls=Group, pretty_exceptions_enable=False)
    app.command()(packaging.pack)
    app.command()(packaging.keygen)  # a lone command would have no name
    out = tmp_path / "out.tar"
    arguments = ["pack", str(tiny_bundle), "--out", str(out), "--wheels", str(wheels)]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (0, "")
    assert hashlib.sha256(out.read_bytes()).hexdigest() in result.stderr
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_a_hospital_needs_neither_torch_nor_writers(tiny_bundle: Path) -> None:
    """`verify` and `pack` run where only `rx-edge[cpu]` is installed."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft', 'onnx', 'gguf', 'onnxscript', 'ml_dtypes',\n"
        "             'cyclonedx', 'model_signing', 'cryptography'): sys.modules[name] = None\n"
        "import rx_edge_export.pack, rx_edge_export.signing\n"
        "from pathlib import Path; from rx_edge.bundle import open_bundle\n"
        "from rx_edge_export.verify import verify\n"
        f"assert verify(open_bundle(Path({str(tiny_bundle)!r}))).passed"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
