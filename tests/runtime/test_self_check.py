"""An engine built on this machine is compared before it is used; fakes stand for broken engines."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rx_edge.backends import registry, vision_onnx
from rx_edge.bundle import Artifact, Bundle, Verdict, open_bundle
from rx_edge.errors import BundleError
from rx_edge.runtime.self_check import LIMITS
from rx_edge.runtime.session import open_checked


class Engine:
    """ONNX Runtime in the place of an engine, with a fault."""

    device = "some GPU"

    def __init__(self, inner: Any, factor: float) -> None:
        self.inner, self.factor, self.closed = inner, factor, False
        self.pairing = inner.pairing

    def encode(self, images: Any) -> Any:
        return self.inner.encode(images) * self.factor

    def close(self) -> None:
        self.closed = True
        self.inner.close()


@pytest.fixture
def built_here(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bundle whose vision is "vision_tensorrt", and what its engine multiplies by."""
    engines: list[Engine] = []
    faithful = registry.load

    def with_factor(factor: float, **details: Any) -> tuple[Bundle, Artifact, list[Engine]]:
        def load(name: str) -> Any:
            if name != "vision_tensorrt":
                return faithful(name)

            class Module:
                @staticmethod
                def devices() -> tuple[str, ...]:
                    return ("cuda",)

                @staticmethod
                def open(path: Path, **_: Any) -> Engine:
                    engines.append(Engine(vision_onnx.open(path, threads=1), factor))
                    return engines[-1]

            return Module

        monkeypatch.setattr(registry, "load", load)
        bundle = open_bundle(tiny_bundle)
        artifact = dataclasses.replace(
            bundle.vision(), format="vision_tensorrt", precision="fp16", details=details
        )
        return bundle, artifact, engines

    return with_factor


def test_a_faithful_engine_is_used(built_here: Any) -> None:
    bundle, artifact, _ = built_here(1.0001, **{LIMITS: [5e-3, 1e-3]})
    with open_checked(bundle, vision=artifact) as session:
        assert "vision_tensorrt fp16 on some GPU" in session.notes[0]


@pytest.mark.parametrize("factor", [1.01, -1.0, 0.0, float("nan")])
def test_a_broken_engine_is_refused_and_closed(built_here: Any, factor: float) -> None:
    bundle, artifact, engines = built_here(factor, **{LIMITS: [5e-3, 1e-3]})
    with pytest.raises(BundleError, match="tensorrt:fp16 on some GPU gives another soft prompt"):
        open_checked(bundle, vision=artifact)
    assert [e.closed for e in engines] == [True]


def test_an_engine_without_limits_is_refused(built_here: Any) -> None:
    bundle, artifact, engines = built_here(1.0)
    manifest = dataclasses.replace(bundle.manifest, verification=Verdict())
    bundle = dataclasses.replace(bundle, manifest=manifest)
    with pytest.raises(BundleError, match="has nothing to be compared with"):
        open_checked(bundle, vision=artifact)
    assert engines[0].closed
