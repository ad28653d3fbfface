"""Engines kept under everything they depend on, so that a wrong one is never used.

An engine file is tied to one ONNX file, library version, GPU, system, profile and set of flags.
It counts only with a sidecar that holds its key and sha256: one that is damaged, stale,
half-written or does not load is built again.

Does not cover: building (`tensorrt_engine.py`), proof against somebody who can write to the
directory, and removing old engines: the directory may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rx_edge import machine
from rx_edge.errors import BackendError


@dataclass(frozen=True)
class EngineKey:
    """Everything that an engine depends on."""

    onnx_sha256: str
    flavour: str
    version: str
    compute_capability: str
    gpu: str
    system: str
    profile: str
    flags: str

    def name(self) -> str:
        """The engine's file name."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.engine"


def cache_dir() -> Path:
    """engines/ in rx-edge's cache."""
    return machine.cache_dir() / "engines"


def system() -> str:
    return f"{platform.system()}-{platform.machine()}"


def onnx_sha256(path: Path) -> str:
    """Of the graph and of the weights beside it, if they are in a file of their own."""
    digest = hashlib.sha256()
    for file in (path, path.with_name(path.name + ".data")):
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def load_or_build(
    directory: Path,
    key: EngineKey,
    build_plan: Callable[[], bytes],
    deserialise: Callable[[bytes], Any],
    reason: Callable[[], str] = lambda: "it gives no reason",
) -> Any:
    """A loaded engine: from the cache, else built and put there.

    Args:
        deserialise: returns None for a plan that the library cannot load, as the library does.
        reason: what the library said about the last plan that it could not load.

    Raises:
        BackendError: an engine did not load, was rebuilt once and did not load again, or the
            cache cannot be written.
    """
    path = directory / key.name()
    with _locked(path.with_suffix(".lock")):
        for _attempt in range(2):
            cached = _read(path, key)
            plan = cached if cached is not None else build_plan()
            engine = deserialise(plan)
            if engine is not None:
                if cached is None:
                    _store(path, key, plan)
                return engine
            _delete(path)
    raise BackendError(
        f"the engine for {key.gpu!r} was rebuilt and still does not load with {key.flavour} "
        f"{key.version} ({reason()}); check the driver and the free GPU memory with nvidia-smi"
    )


@contextmanager
def _usable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BackendError(
            f"the engine cache {str(directory)!r} cannot be used: {error.strerror or error}; "
            "set RX_EDGE_CACHE to a writable directory"
        ) from error


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _read(path: Path, key: EngineKey) -> bytes | None:
    """The cached plan, if it is whole and of this very key."""
    with _usable(path.parent):
        try:
            plan = path.read_bytes()
            about = json.loads(_sidecar(path).read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None
    wanted = {"key": asdict(key), "sha256": hashlib.sha256(plan).hexdigest()}
    return plan if about == wanted else None


def _store(path: Path, key: EngineKey, plan: bytes) -> None:
    """The engine, then its sidecar: without a matching one an engine does not count."""
    about = {"key": asdict(key), "sha256": hashlib.sha256(plan).hexdigest()}
    with _usable(path.parent):
        _replace(path, plan)
        _replace(_sidecar(path), json.dumps(about, indent=1, sort_keys=True).encode())


def _delete(path: Path) -> None:
    with _usable(path.parent):
        _sidecar(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _replace(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock: two processes must not build the same engine at once."""
    with _usable(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        stream = path.open("a")
    with stream:  # closing releases the lock
        if sys.platform != "win32":  # there, the renames alone keep the cache whole
            import fcntl

            with _usable(path.parent):
                fcntl.flock(stream, fcntl.LOCK_EX)
        yield
