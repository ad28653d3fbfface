"""The TensorRT backend where there is no GPU: it builds, it caches, it refuses. No CPU fallback.

Fakes stand in for faults only: a library that does not load an engine, a disk that fails.
"""

from __future__ import annotations

import ctypes
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from rx_edge.backends import engine_cache, tensorrt_engine, vision_tensorrt
from rx_edge.backends.engine_cache import EngineKey, load_or_build
from rx_edge.errors import BackendError, MissingExtraError
from tests.backends.test_vision_onnx import SIZE, WIDTH, graph

KEY = EngineKey(
    onnx_sha256="a" * 64,
    flavour="tensorrt_rtx",
    version="1.7.1",
    compute_capability="SM89",
    gpu="NVIDIA RTX 4090",
    system="Linux-x86_64",
    profile="batch 1..4, tuned for 1",
    flags="strongly-typed",
)


class Workshop:
    """Counts what is built and loaded; `nulls` loads return None, as the library's do."""

    def __init__(self, nulls: int = 0, plan: bytes = b"plan") -> None:
        self.built, self.loaded, self.nulls, self.plan = 0, list[bytes](), nulls, plan

    def build(self) -> bytes:
        self.built += 1
        return self.plan

    def load(self, plan: bytes) -> str | None:
        self.loaded.append(plan)
        self.nulls -= 1
        return None if self.nulls >= 0 else f"engine of {plan.decode()}"

    def get(self, directory: Path, key: EngineKey = KEY) -> Any:
        return load_or_build(directory, key, self.build, self.load, lambda: "error 35")


def files(directory: Path) -> list[str]:
    return sorted(p.suffix for p in directory.iterdir())


# ---- the cache


def test_second_load_comes_from_the_cache(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "engines"
    first, second = Workshop(), Workshop(plan=b"other")
    assert first.get(directory) == second.get(directory) == "engine of plan"
    assert (first.built, second.built) == (1, 0)
    assert files(directory) == [".engine", ".json", ".lock"]
    about = json.loads((directory / KEY.name()).with_suffix(".json").read_text("utf-8"))
    assert about["key"]["gpu"] == "NVIDIA RTX 4090"


@pytest.mark.parametrize("field", list(EngineKey.__dataclass_fields__))
def test_every_part_of_the_key_counts(tmp_path: Path, field: str) -> None:
    Workshop().get(tmp_path)
    other = Workshop(plan=b"other")
    assert other.get(tmp_path, replace(KEY, **{field: "another"})) == "engine of other"
    assert other.built == 1


def test_engine_under_another_keys_name_is_stale(tmp_path: Path) -> None:
    Workshop().get(tmp_path)
    other = replace(KEY, version="1.8.0")
    for suffix in (".engine", ".json"):
        old = (tmp_path / KEY.name()).with_suffix(suffix)
        old.rename((tmp_path / other.name()).with_suffix(suffix))
    workshop = Workshop(plan=b"fresh")
    assert workshop.get(tmp_path, other) == "engine of fresh"
    assert workshop.loaded == [b"fresh"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped byte": flip,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "no sidecar": lambda path: path.with_suffix(".json").unlink(),
    "flipped byte in the sidecar": lambda path: flip(path.with_suffix(".json")),
    "sidecar is no JSON": lambda path: path.with_suffix(".json").write_bytes(b"\xff{"),
    "no engine": Path.unlink,
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damaged_engine_is_never_loaded(tmp_path: Path, damage: str) -> None:
    Workshop().get(tmp_path)
    DAMAGES[damage](tmp_path / KEY.name())
    workshop = Workshop(plan=b"fresh")
    assert workshop.get(tmp_path) == "engine of fresh"
    assert workshop.loaded == [b"fresh"]
    again = Workshop()
    assert again.get(tmp_path) == "engine of fresh"
    assert again.built == 0


def test_engine_that_does_not_load_is_rebuilt_once(tmp_path: Path) -> None:
    Workshop().get(tmp_path)
    workshop = Workshop(nulls=1, plan=b"fresh")
    assert workshop.get(tmp_path) == "engine of fresh"
    assert workshop.loaded == [b"plan", b"fresh"]
    assert workshop.built == 1

    hopeless = Workshop(nulls=9)
    with pytest.raises(BackendError, match=r"RTX 4090' was rebuilt and still does not load"):
        hopeless.get(tmp_path)
    assert hopeless.built == 1
    assert files(tmp_path) == [".lock"]


def test_fresh_engine_that_does_not_load_is_not_kept(tmp_path: Path) -> None:
    workshop = Workshop(nulls=9)
    with pytest.raises(
        BackendError, match=r"still does not load with tensorrt_rtx 1\.7\.1 \(error 35\)"
    ):
        workshop.get(tmp_path)
    assert workshop.built == 2
    assert files(tmp_path) == [".lock"]


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    workshop = Workshop()

    def fail() -> bytes:
        raise BackendError("node 'x' is unknown")

    with pytest.raises(BackendError, match="node 'x'"):
        load_or_build(tmp_path, KEY, fail, workshop.load)
    assert files(tmp_path) == [".lock"]
    workshop.get(tmp_path)  # the lock is free again


def test_interrupted_write_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Workshop().get(tmp_path)
    original, calls = engine_cache._replace, list[Path]()

    def second_fails(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(path, data)

    other = replace(KEY, gpu="another")
    monkeypatch.setattr(engine_cache, "_replace", second_fails)
    with pytest.raises(BackendError, match="No space left on device; set RX_EDGE_CACHE"):
        Workshop(plan=b"half").get(tmp_path, other)
    monkeypatch.undo()
    assert (tmp_path / other.name()).read_bytes() == b"half"
    workshop = Workshop(plan=b"whole")
    assert workshop.get(tmp_path, other) == "engine of whole"
    assert workshop.loaded == [b"whole"]


def test_failing_disk_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BackendError, match="No space left"):
        Workshop().get(tmp_path)
    assert files(tmp_path) == [".lock"]
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match="the engine cache '.*file/engines' cannot be used"):
        Workshop().get(tmp_path / "file" / "engines")


def test_two_at_once_build_once(tmp_path: Path) -> None:
    running, most, built, found = 0, 0, 0, list[Any]()

    def slow() -> bytes:
        nonlocal running, most, built
        running, built = running + 1, built + 1
        most = max(most, running)
        time.sleep(0.2)
        running -= 1
        return b"plan"

    def work() -> None:
        found.append(load_or_build(tmp_path, KEY, slow, Workshop().load))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["engine of plan"] * 4
    assert (built, most) == (1, 1)


def test_directory_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("RX_EDGE_CACHE", raising=False)
    assert engine_cache.cache_dir() == tmp_path / "xdg" / "rx-edge" / "engines"
    monkeypatch.setenv("RX_EDGE_CACHE", str(tmp_path))
    assert engine_cache.cache_dir() == tmp_path / "engines"


def test_weights_beside_the_graph_are_part_of_the_hash(tmp_path: Path) -> None:
    path, data = tmp_path / "a.onnx", tmp_path / "a.onnx.data"
    path.write_bytes(b"graph")
    hashes = [engine_cache.onnx_sha256(path)]
    for weights in (b"", b"one", b"two"):
        data.write_bytes(weights)
        hashes.append(engine_cache.onnx_sha256(path))
    assert len(set(hashes)) == 4


# ---- building, for real


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx_bindings", reason='pip install "rx-edge[tensorrt]"')


def test_build_needs_no_gpu(rtx: Any, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    plan = vision_tensorrt.build(
        graph(tmp_path / "a.onnx"),
        max_batch=2,
        compute_capability=(8, 9),
        progress=lambda *step: steps.append(step),
    )
    assert isinstance(plan, bytes)
    assert len(plan) > 1000
    assert {done == total for _, done, total in steps} == {False, True}


def test_error_in_the_callback_ends_the_build(rtx: Any, tmp_path: Path) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt(phase)

    with pytest.raises(KeyboardInterrupt):
        vision_tensorrt.build(graph(tmp_path / "a.onnx"), progress=stop)


def test_build_names_the_broken_node(rtx: Any, tmp_path: Path) -> None:
    path = graph(tmp_path / "a.onnx")
    model = onnx.load(path)
    model.graph.node[1].op_type, model.graph.node[1].name = "Fnord", "the_broken_one"
    onnx.save(model, path)
    with pytest.raises(BackendError, match=r"node 'the_broken_one' \(Fnord\): "):
        vision_tensorrt.build(path)
    with pytest.raises(BackendError, match=r"does not build for SM90 \(it does for SM75, "):
        vision_tensorrt.build(graph(path), compute_capability=(9, 0))
    with pytest.raises(BackendError, match="max_batch is 0"):
        vision_tensorrt.build(path, max_batch=0)
    with pytest.raises(BackendError, match="does not exist; export it again"):
        vision_tensorrt.build(tmp_path / "none.onnx")
    with pytest.raises(BackendError, match="expected float32 pixel_values"):
        vision_tensorrt.build(graph(path, names=("image", "soft_prompt")))


def fake_engine(trt: Any, **changes: Any) -> Any:
    """A loaded engine cannot be had without a GPU; this one says what it is told to."""
    about = {
        "names": ("pixel_values", "soft_prompt"),
        "dtypes": (trt.DataType.FLOAT, trt.DataType.FLOAT),
        "shapes": ((-1, 3, SIZE, SIZE), (-1, 3, WIDTH)),
        "largest": 4,
    } | changes
    at = about["names"].index
    return SimpleNamespace(
        num_io_tensors=2,
        get_tensor_name=lambda number: about["names"][number],
        get_tensor_mode=lambda name: (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)[at(name)],
        get_tensor_dtype=lambda name: about["dtypes"][at(name)],
        get_tensor_shape=lambda name: about["shapes"][at(name)],
        get_tensor_profile_shape=lambda name, number: [
            (batch, 3, SIZE, SIZE) for batch in (1, 1, about["largest"])
        ],
    )


def test_engine_of_another_signature_is_refused(rtx: Any, tmp_path: Path) -> None:
    check, path = tensorrt_engine.engine_signature, tmp_path / "a.onnx"
    found = check(rtx, fake_engine(rtx), path, max_batch=4)
    assert found == tensorrt_engine.Signature(SIZE, 3, WIDTH)
    half = rtx.DataType.HALF
    for changes in (
        {"names": ("image", "soft_prompt")},
        {"dtypes": (half, rtx.DataType.FLOAT)},
        {"dtypes": (rtx.DataType.FLOAT, half)},
        {"shapes": ((1, 3, SIZE, SIZE), (1, 3, WIDTH))},
        {"shapes": ((-1, 1, SIZE, SIZE), (-1, 3, WIDTH))},
        {"shapes": ((-1, 3, SIZE, SIZE), (-1, WIDTH))},
    ):
        with pytest.raises(BackendError, match="export it again"):
            check(rtx, fake_engine(rtx, **changes), path, max_batch=4)
    with pytest.raises(BackendError, match="has the profile"):
        check(rtx, fake_engine(rtx, largest=8), path, max_batch=4)


# ---- what cannot run is said, and nothing runs elsewhere


def test_missing_package_gives_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = {"tensorrt_rtx": ("no_such_rtx",), "tensorrt": ("no_such_trt",)}
    monkeypatch.setattr(tensorrt_engine, "FLAVOURS", missing)
    reason = vision_tensorrt.is_available()
    assert reason is not None
    assert reason.endswith('pip install "rx-edge[tensorrt]"')
    with pytest.raises(MissingExtraError, match="rx-edge.tensorrt."):
        vision_tensorrt.open(graph(tmp_path / "a.onnx"), threads=1)


def test_old_tensorrt_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old_trt.py").write_text("__version__ = '10.9.0'\nBuilder = None\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tensorrt_engine, "FLAVOURS", {"tensorrt_rtx": (), "tensorrt": ("old_trt",)})
    reason = vision_tensorrt.is_available()
    assert reason is not None
    assert "old_trt 10.9.0 is installed; 11 or newer is needed" in reason


def test_no_gpu_is_an_error_and_never_a_cpu(
    rtx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)  # also where the test machine has a GPU
    monkeypatch.setenv("RX_EDGE_CACHE", str(tmp_path / "cache"))
    reason = vision_tensorrt.is_available()
    assert reason is not None
    assert reason.startswith("no NVIDIA GPU")
    with pytest.raises(BackendError, match="no NVIDIA GPU: the driver library .* is absent"):
        vision_tensorrt.open(graph(tmp_path / "a.onnx"), threads=0)
    assert not (tmp_path / "cache").exists()


def test_arguments_are_checked_first(tmp_path: Path) -> None:
    path = graph(tmp_path / "a.onnx")
    with pytest.raises(BackendError, match="device is 'cpu'"):
        vision_tensorrt.open(path, threads=0, device="cpu")
    with pytest.raises(BackendError, match="threads is -1"):
        vision_tensorrt.open(path, threads=-1)
    with pytest.raises(BackendError, match="does not exist"):
        vision_tensorrt.open(tmp_path / "none.onnx", threads=0)


def test_metadata_is_read_without_the_onnx_package(tmp_path: Path) -> None:
    path = graph(tmp_path / "a.onnx")
    assert vision_tensorrt.onnx_metadata(path) == {}
    model = onnx.load(path)
    big = np.zeros(100_000, np.float32).tobytes()
    tensor = helper.make_tensor("big", TensorProto.FLOAT, [100_000], big, raw=True)
    model.graph.initializer.append(tensor)
    wanted = {"rx_edge.pairing": "f" * 64, "other": "größer", "empty": ""}
    helper.set_model_props(model, wanted)
    onnx.save(model, path)
    assert vision_tensorrt.onnx_metadata(path) == wanted
    data = path.read_bytes()
    for broken in (data[:-5], b"\xff" * 20, b"no model at all"):
        path.write_bytes(broken)
        with pytest.raises(BackendError, match="is no ONNX file"):
            vision_tensorrt.onnx_metadata(path)
