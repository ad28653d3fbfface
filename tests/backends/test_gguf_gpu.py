"""A GGUF model on a GPU: what is found, what fits, and what is refused before anything is loaded.

No GPU is needed: ggml's registry is read for real (its CPU stands for a device), and a planted GPU
lets a CPU build take the GPU's way. What a GPU computes is not tested here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rx_edge.backends import gguf_engine, gguf_gpu, llm_gguf
from rx_edge.backends.gguf_gpu import WORKSPACE, Gpu
from rx_edge.errors import BackendError, DeviceMemoryError

IDS = np.asarray([1, 5, 9, 2], np.int32)


@pytest.fixture
def model(tiny_bundle: Path) -> Path:
    return tiny_bundle / "llm.F16.gguf"


def plant(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(gguf_gpu, "gpus", lambda _: (Gpu(0, "Planted 4090", free, 24 * 2**30),))


def test_a_cpu_build_finds_no_gpu_and_says_what_to_do(model: Path) -> None:
    assert gguf_gpu.gpus(gguf_engine.engine()) == ()
    with pytest.raises(BackendError, match="finds no GPU; `rx-edge doctor`"):
        llm_gguf.open(model, n_ctx=64, threads=1, device="cuda")
    with pytest.raises(BackendError, match="device is 'tpu'; valid: 'cpu', 'cuda'"):
        llm_gguf.open(model, n_ctx=64, threads=1, device="tpu")


def test_the_registry_is_ggmls_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_gpu, "_GPU_TYPES", (0,))  # the CPU, which every build has
    (found,) = gguf_gpu.gpus(gguf_engine.engine())
    assert found.index == 0
    assert found.name
    assert found.memory > 2**30
    assert 0 < found.memory_free <= found.memory


def test_a_model_takes_the_gpus_way(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []
    api = gguf_engine.engine()
    load, start = api.llama_model_load_from_file, api.llama_init_from_model

    def loading(path: Any, params: Any) -> Any:
        asked.append((params.n_gpu_layers, params.split_mode == api.LLAMA_SPLIT_MODE_NONE))
        return load(path, params)

    def starting(found: Any, params: Any) -> Any:
        asked.append((params.offload_kqv, params.op_offload))
        return start(found, params)

    monkeypatch.setattr(api, "llama_model_load_from_file", loading)
    monkeypatch.setattr(api, "llama_init_from_model", starting)
    with llm_gguf.open(model, n_ctx=64, threads=1) as on_cpu:
        wanted = on_cpu.prefill([IDS])
        assert on_cpu.device == "cpu"
    assert asked == [(0, False), (False, False)]
    asked.clear()
    plant(monkeypatch, 8 * 2**30)
    with llm_gguf.open(model, n_ctx=64, threads=1, device="cuda") as language:
        assert language.device == "cuda (Planted 4090)"
        np.testing.assert_array_equal(language.prefill([IDS]), wanted)
        with language.parallel(2) as slots:
            assert slots.slots == 2
    assert asked == [(gguf_engine.ALL_LAYERS, True), (True, True), (True, True)]


def test_what_does_not_fit_is_refused_before_it_is_read(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = model.stat().st_size

    def loaded(*_: Any) -> Any:
        raise AssertionError("a file that cannot fit was read")

    plant(monkeypatch, size + WORKSPACE - 1)
    with monkeypatch.context() as patch:
        patch.setattr(gguf_engine.engine(), "llama_model_load_from_file", loaded)
        with pytest.raises(DeviceMemoryError, match=r"Planted 4090 has 0\.\d GiB free.*weights"):
            llm_gguf.open(model, n_ctx=64, threads=1, device="cuda")


def test_a_cache_that_does_not_fit_frees_the_model(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = gguf_engine.engine()
    free = iter([2 * 2**30, WORKSPACE])  # before the weights, beside them
    monkeypatch.setattr(gguf_gpu, "gpus", lambda _: (Gpu(0, "Planted", next(free), 2**31),))
    freed: list[Any] = []
    release = api.llama_model_free
    monkeypatch.setattr(api, "llama_model_free", lambda m: (freed.append(m), release(m)))
    with pytest.raises(DeviceMemoryError, match="a KV cache of 64 tokens needs 0.5 GiB"):
        llm_gguf.open(model, n_ctx=64, threads=1, device="cuda")
    assert len(freed) == 1


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9 MiB on device 0: cudaMalloc "
         "failed: out of memory", DeviceMemoryError),
        ("llama_model_load: error loading model: tensor 'x' is missing", BackendError),
    ],
)  # fmt: skip
def test_an_allocation_that_fails_is_told_from_a_broken_file(
    model: Path, monkeypatch: pytest.MonkeyPatch, line: str, kind: type[Exception]
) -> None:
    def refused(*_: Any) -> None:
        gguf_engine._errors().append(line)

    plant(monkeypatch, 8 * 2**30)
    monkeypatch.setattr(gguf_engine.engine(), "llama_model_load_from_file", refused)
    with pytest.raises(BackendError, match="cannot load") as caught:
        llm_gguf.open(model, n_ctx=64, threads=1, device="cuda")
    assert type(caught.value) is kind
