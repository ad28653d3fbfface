"""The ONNX Runtime backend on hand-made graphs: it computes, and it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rx_edge.backends import onnx_engine, vision_onnx
from rx_edge.errors import BackendError

SIZE, WIDTH = 4, 5


def graph(
    path: Path,
    *,
    names: tuple[str, str] = ("pixel_values", "soft_prompt"),
    shape_in: tuple[Any, ...] = ("batch", 3, SIZE, SIZE),
    shape_out: tuple[Any, ...] = ("batch", 3, WIDTH),
    kind: int = TensorProto.FLOAT,
    scale: float = 1.0,
) -> Path:
    """Three soft tokens, one for each channel: rows @ weights."""
    weights = (weight_matrix() * scale).astype(helper.tensor_dtype_to_np_dtype(kind))
    target = np.array([0, 3, SIZE * SIZE], np.int64)  # 0: the batch as it is
    nodes = [
        helper.make_node("Reshape", [names[0], "target"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weights"], [names[1]]),
    ]
    constants = [
        numpy_helper.from_array(target, "target"),
        numpy_helper.from_array(weights, "weights"),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info(names[0], kind, shape_in)],
            [helper.make_tensor_value_info(names[1], kind, shape_out)],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, path)
    return path


def weight_matrix() -> Any:
    return np.random.default_rng(0).normal(size=(SIZE * SIZE, WIDTH)).astype(np.float32)


def images(batch: int) -> Any:
    return np.random.default_rng(1).normal(size=(batch, 3, SIZE, SIZE)).astype(np.float32)


@pytest.mark.parametrize("batch", [1, 3])
def test_encode(tmp_path: Path, batch: int) -> None:
    with vision_onnx.open(graph(tmp_path / "a.onnx"), threads=1) as backend:
        found = backend.encode(images(batch))
        assert (backend.device, backend.pairing) == ("cpu", "")
    assert found.dtype == np.float32
    wanted = images(batch).reshape(batch, 3, -1) @ weight_matrix()
    assert np.abs(found - wanted).max() < 1e-5


def test_idle_threads_leave_the_cores_to_llama_cpp(tmp_path: Path) -> None:
    with vision_onnx.open(graph(tmp_path / "a.onnx"), threads=2) as backend:
        options = backend._session.get_session_options()
        assert options.get_session_config_entry(onnx_engine.STOP_SPINNING) == "1"


@pytest.mark.parametrize(
    "signature",
    [
        {"names": ("image", "soft_prompt")},
        {"names": ("pixel_values", "hidden")},
        {"kind": TensorProto.FLOAT16},
        {"kind": TensorProto.DOUBLE},
        {"shape_in": (1, 3, SIZE, SIZE), "shape_out": (1, 3, WIDTH)},
        {"shape_in": ("batch", 3, "height", "width")},
        {"shape_in": ("batch", 3, 2, 8)},
        {"shape_in": ("batch", 3, SIZE * SIZE)},
        {"shape_in": ("batch", 1, SIZE, 3 * SIZE)},
    ],
    ids=str,
)
def test_other_signatures_are_refused(tmp_path: Path, signature: dict[str, Any]) -> None:
    path = graph(tmp_path / "a.onnx", **signature)
    with pytest.raises(BackendError, match=r"a\.onnx' maps .* expected float32 pixel_values"):
        vision_onnx.open(path, threads=1)


def bad_images() -> list[Any]:
    nan = images(1)
    nan[0, 0, 0, 0] = np.nan
    return [
        pytest.param(images(1)[0], "shape", id="rank"),
        pytest.param(images(1)[:, :1], "shape", id="channels"),
        pytest.param(images(1)[:, :, :2], "shape", id="size"),
        pytest.param(images(1)[:0], "shape", id="empty"),
        pytest.param(images(1).astype(np.float64), "float64", id="dtype"),
        pytest.param(nan, "image tensor holds NaN", id="nan"),
    ]


@pytest.mark.parametrize(("array", "message"), bad_images())
def test_bad_images_are_refused(tmp_path: Path, array: Any, message: str) -> None:
    with (
        vision_onnx.open(graph(tmp_path / "a.onnx"), threads=1) as backend,
        pytest.raises(BackendError, match=message),
    ):
        backend.encode(array)


def test_nonfinite_output_is_an_error(tmp_path: Path) -> None:
    path = graph(tmp_path / "a.onnx", scale=float("inf"))
    with (
        vision_onnx.open(path, threads=1) as backend,
        pytest.raises(BackendError, match="returned NaN"),
    ):
        backend.encode(images(1))


def test_closed_backend_refuses(tmp_path: Path) -> None:
    backend = vision_onnx.open(graph(tmp_path / "a.onnx"), threads=1)
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.encode(images(1))


def test_open_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendError, match=r"missing\.onnx' does not exist"):
        vision_onnx.open(tmp_path / "missing.onnx", threads=1)
    (tmp_path / "a.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"cannot load .*a\.onnx"):
        vision_onnx.open(tmp_path / "a.onnx", threads=1)
    with pytest.raises(BackendError, match="device is 'tpu'"):
        vision_onnx.open(graph(tmp_path / "a.onnx"), threads=1, device="tpu")
    assert capfd.readouterr() == ("", "")


class _Session:
    """An onnxruntime that takes the CPU although CUDA was asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def test_a_slower_device_is_never_taken_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    path = graph(tmp_path / "a.onnx")
    providers = ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    with pytest.raises(BackendError, match=r"has no CUDAExecutionProvider.*rx-edge\[gpu\]"):
        vision_onnx.open(path, threads=1, device="cuda")
    providers.append("CUDAExecutionProvider")
    monkeypatch.setattr(onnxruntime, "InferenceSession", _Session)
    with pytest.raises(BackendError, match=r"asked for CUDA.* but uses CPUExecutionProvider"):
        vision_onnx.open(path, threads=1, device="cuda")


def test_bound_buffers_give_what_a_run_gives(tmp_path: Path) -> None:
    """The way a GPU runs, on the CPU's provider: buffers per batch size, results that stay."""
    with vision_onnx.open(graph(tmp_path / "a.onnx"), threads=1) as backend:
        wanted = {batch: backend.encode(images(batch)) for batch in (1, 3)}
        other = backend.encode(-images(1))
        backend._bound = onnx_engine.BoundRuns(backend._session, "cpu")
        first = backend.encode(images(1))
        assert np.array_equal(first, wanted[1])
        assert np.array_equal(backend.encode(images(3)), wanted[3])
        assert np.array_equal(backend.encode(-images(1)), other)
        assert np.array_equal(backend.encode(images(3)[::-1])[0], wanted[3][2])  # not contiguous
        assert np.array_equal(first, wanted[1])  # later runs do not write into it
        assert set(backend._bound._sizes) == {1, 3}


@pytest.mark.parametrize("refused", ["when loaded", "in its first run"])
def test_a_graph_that_cannot_be_captured_runs_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    path, asked = graph(tmp_path / "a.onnx"), []
    real = onnx_engine.session

    def session(path: Path, *, device: str, provider_options: Any, **settings: Any) -> Any:
        asked.append(provider_options[device])
        if refused == "when loaded" and "enable_cuda_graph" in provider_options[device]:
            raise BackendError("not all nodes have been partitioned to the CUDA EP")
        return real(path, device="cpu", **settings)

    monkeypatch.setattr(onnx_engine, "session", session)
    # the session is the CPU's: a run with buffers on a GPU that is not there fails
    vision_onnx.open(path, threads=1, device="cuda").close()
    assert asked == [{"use_tf32": "0", "enable_cuda_graph": "1"}, {"use_tf32": "0"}]
