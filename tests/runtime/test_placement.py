"""Where a bundle runs, and what a draft says when that is a second choice.

A GPU is planted: the CPU's engines run in its place, with faults. What a GPU computes is not
tested here; that wrong numbers from one are refused is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rx_edge.backends import llm_gguf, vision_onnx
from rx_edge.bundle import Verdict, open_bundle
from rx_edge.config import RuntimeConfig
from rx_edge.errors import BackendError, BundleError, DeviceMemoryError
from rx_edge.runtime import placement
from rx_edge.runtime.session import open_checked, open_session
from rx_edge.types import Report
from rx_edge_bench.latency import run_to_end

CUDA, CPU = RuntimeConfig(device="cuda"), RuntimeConfig(device="cpu")


class Gpu:
    """What stands for the engines on a GPU.

    Attributes:
        tries: n_ctx of every language model that was asked for on it.
        room: the longest KV cache that fits.
        fault: raised instead of opening.
        factor: what vision (logits: where a constant is added) is multiplied by.
    """

    def __init__(self) -> None:
        self.tries: list[int] = []
        self.room, self.factor = 10**6, 1.0
        self.fault: Exception | None = None
        self.opened: list[Any] = []

    def language(self, inner: Callable[..., Any], path: Path, **options: Any) -> Any:
        if options.pop("device") == "cpu":
            return inner(path, **options)
        self.tries.append(options["n_ctx"])
        if self.fault:
            raise self.fault
        if options["n_ctx"] > self.room:
            raise DeviceMemoryError("Planted 4090 has 0.1 GiB free")
        model = inner(path, **options)
        model.device = "cuda (Planted 4090)"
        prefill = model.prefill
        model.prefill = lambda segments: self._bent(prefill(segments))
        self.opened.append(model)
        return model

    def vision(self, inner: Callable[..., Any], path: Path, **options: Any) -> Any:
        if options.pop("device") == "cpu":
            return inner(path, **options)
        model = inner(path, **options)
        model.device = "cuda (Planted 4090)"
        encode = model.encode
        model.encode = lambda images: encode(images) * self.factor
        self.opened.append(model)
        return model

    def _bent(self, logits: Any) -> Any:
        return logits * self.factor


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    for module, take in ((llm_gguf, found.language), (vision_onnx, found.vision)):
        inner = module.open
        monkeypatch.setattr(module, "devices", lambda: ("cuda", "cpu"))
        monkeypatch.setattr(
            module, "open", lambda path, take=take, inner=inner, **o: take(inner, path, **o)
        )
    return found


def drafted(session: Any) -> Report:
    return run_to_end(session, session.bundle.path(session.bundle.manifest.canaries[0]))


def test_auto_takes_the_gpu_and_an_order_is_followed(tiny_bundle: Path, gpu: Gpu) -> None:
    with open_session(tiny_bundle) as session:
        assert session.language.device == session.vision.device == "cuda (Planted 4090)"
        report = drafted(session)
        assert "gguf" in report.provenance["language"]
        assert report.provenance["language"].endswith("cuda (Planted 4090)")
        assert not any("processor" in flag or "GPU" in flag for flag in report.flags)
    gpu.tries.clear()
    with open_session(tiny_bundle, runtime=CPU) as session:
        assert session.language.device == session.vision.device == "cpu"
        assert drafted(session).token_ids == report.token_ids
    assert not gpu.tries


def test_too_little_memory_means_a_shorter_cache_then_the_processor(
    tiny_bundle: Path, gpu: Gpu
) -> None:
    gpu.room = 600
    with open_session(tiny_bundle, max_new_tokens=16) as session:
        assert gpu.tries == [1024, 256]  # 128 + 64 + soft tokens + 16, in steps of 64
        assert session.generate.n_ctx == 256
        (flag,) = [f for f in drafted(session).flags if "GPU" in f]
        assert flag.startswith("the language model has a context of 256 tokens only: the GPU has")
    gpu.room = 100
    gpu.tries.clear()
    with open_session(tiny_bundle, max_new_tokens=16) as session:
        assert gpu.tries == [1024, 256]
        assert session.language.device == "cpu"
        assert session.generate.n_ctx == 1024
        (flag,) = [f for f in drafted(session).flags if "GPU" in f]
        assert (
            flag == "the language model runs on the processor: the GPU has too little free memory"
        )
    with pytest.raises(DeviceMemoryError, match="Planted 4090 has"):
        open_session(tiny_bundle, runtime=CUDA)


def test_an_engine_that_fails_is_tried_once(tiny_bundle: Path, gpu: Gpu) -> None:
    gpu.fault = BackendError("libcublas.so.13 does not load")
    with open_session(tiny_bundle) as session:
        assert gpu.tries == [1024]  # a shorter cache would not help
        assert any(
            "runs on the processor: the GPU cannot be used (libcublas" in f
            for f in drafted(session).flags
        )
    with pytest.raises(BackendError, match="libcublas"):
        open_session(tiny_bundle, runtime=CUDA)


@pytest.mark.parametrize("factor", [1.05, -1.0, float("nan")])
def test_wrong_numbers_from_a_gpu_are_refused(tiny_bundle: Path, gpu: Gpu, factor: float) -> None:
    gpu.factor = factor
    with pytest.raises(BundleError, match=r"on cuda \(Planted 4090\) gives another soft prompt"):
        open_session(tiny_bundle)
    assert all(model._session is None for model in gpu.opened if hasattr(model, "_session"))


def test_wrong_logits_from_a_gpu_are_refused(
    tiny_bundle: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision_onnx, "devices", lambda: ("cpu",))
    gpu.factor = 1.3
    with pytest.raises(BundleError, match=r"Planted 4090\) gives other logits for golden/"):
        open_session(tiny_bundle)
    assert all(model._context is None for model in gpu.opened)


def test_what_was_never_verified_is_not_trusted_to_a_gpu(tiny_bundle: Path, gpu: Gpu) -> None:
    bundle = open_bundle(tiny_bundle)
    manifest = replace(bundle.manifest, verification=Verdict())
    with pytest.raises(BundleError, match="nothing to be compared with on this machine"):
        open_checked(replace(bundle, manifest=manifest))
    with open_checked(replace(bundle, manifest=manifest), runtime=CPU) as session:
        assert np.isfinite(session.language.prefill([np.asarray([1, 2], np.int32)])).all()


def test_tensorrt_has_no_second_device(tiny_bundle: Path) -> None:
    artifact = replace(open_bundle(tiny_bundle).vision(), format="vision_tensorrt")
    for runtime in (RuntimeConfig(), CPU, CUDA):
        assert placement.devices(artifact, runtime) == ("cuda",)
