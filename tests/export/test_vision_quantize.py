"""fp16, int8 and fp8 files: close to fp32, the same bytes each time, the right types inside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from rx_edge.backends import vision_onnx as reader
from rx_edge.errors import ExportError
from rx_edge.types import FloatArray
from rx_edge_export import vision_onnx as writer
from rx_edge_export import vision_quantize
from rx_edge_export.vision_quantize import to_fp8, to_fp16, to_int8
from tests.export.test_vision_onnx import ROOT, Tiny, encoder
from tests.factories import IMAGE_SIZE

PAIRING = "c" * 64
COUNT = 4


def images(seed: int = 0, count: int = COUNT, size: int = IMAGE_SIZE) -> list[FloatArray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal((1, 3, size, size), np.float32) for _ in range(count)]


def write_all(root: Path, source: Path) -> dict[str, dict[str, Any]]:
    return {
        "fp16": to_fp16(source, root / "fp16.onnx"),
        "int8": to_int8(source, root / "int8.onnx", images=images(), reduce_range=True),
        "trt": to_int8(source, root / "trt.onnx", images=images(), symmetric=True),
        "fp8": to_fp8(source, root / "fp8.onnx", images=images()),
    }


class Files:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = root / "vision.onnx"
        writer.write(encoder(root / "vit"), self.source, image_size=IMAGE_SIZE, pairing=PAIRING)
        self.details = write_all(root, self.source)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("quantised"))


def tensors(path: Path) -> dict[str, Any]:
    return {t.name: t for t in onnx.load(path).graph.initializer}


def nodes(path: Path, *kinds: str) -> list[Any]:
    return [node for node in onnx.load(path).graph.node if node.op_type in kinds]


# what faithful files measure is about a third of these
@pytest.mark.parametrize(
    ("name", "error", "cosine"),
    [("fp16", 2e-3, 0.99999), ("int8", 0.1, 0.997), ("trt", 0.06, 0.999), ("fp8", 0.2, 0.99)],
)
def test_close_to_fp32_on_other_images(
    files: Files, name: str, error: float, cosine: float
) -> None:
    other = np.concatenate(images(seed=9, count=6))
    with (
        reader.open(files.source, threads=1) as fp32,
        reader.open(files.root / f"{name}.onnx", threads=1) as quantised,
    ):
        wanted, found = fp32.encode(other), quantised.encode(other)
        assert quantised.pairing == PAIRING
    if name != "trt":  # S8S8 saturates on CPUs without VNNI; TensorRT does not
        assert np.abs(found - wanted).max() < error * np.abs(wanted).max()
    details = files.details[name]
    assert 0 < details["max_error"] < error
    assert cosine < details["min_cosine"] < 1
    assert details["opset"] == writer.OPSET
    assert details["bytes"] == (files.root / f"{name}.onnx").stat().st_size


def test_measured_error_is_that_of_the_file(files: Files) -> None:
    both = []
    for name in ("vision", "int8"):
        with reader.open(files.root / f"{name}.onnx", threads=1) as backend:
            both.append(np.concatenate([backend.encode(image) for image in images()]))
    wanted, found = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in both)
    assert files.details["int8"]["max_error"] == pytest.approx(
        np.abs(found - wanted).max() / np.abs(wanted).max(), rel=1e-4
    )
    cosines = (found * wanted).sum(1) / np.linalg.norm(found, axis=1)
    assert files.details["int8"]["min_cosine"] == pytest.approx(
        (cosines / np.linalg.norm(wanted, axis=1)).min(), abs=1e-6
    )


@pytest.mark.parametrize("name", ["fp16", "trt", "fp8"])
def test_no_float32_between_input_and_output(files: Files, name: str) -> None:
    path = files.root / f"{name}.onnx"
    assert TensorProto.FLOAT not in {t.data_type for t in tensors(path).values()}
    casts = [(n.input[0], n.output[0]) for n in nodes(path, "Cast")]
    assert casts[0][0] == reader.INPUT
    assert casts[-1][1] == reader.OUTPUT
    assert len(casts) == 2
    graph = onnx.load(path).graph
    kinds = [v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)]
    assert kinds == [TensorProto.FLOAT, TensorProto.FLOAT]
    for tensor in tensors(path).values():  # the lowest float32 masks attention; it must not be inf
        assert np.isfinite(numpy_helper.to_array(tensor).astype(np.float32)).all()


def test_fp16_takes_half_the_space(files: Files) -> None:
    weights = sum(np.prod(t.dims) for t in tensors(files.source).values() if t.data_type == 1)
    saved = files.source.stat().st_size - files.details["fp16"]["bytes"]
    assert saved == pytest.approx(2 * weights, rel=0.05)
    measured = to_fp16(files.source, files.root / "real.onnx", images=images(3, 2))
    assert measured["max_error"] != files.details["fp16"]["max_error"]
    assert (files.root / "real.onnx").read_bytes() == (files.root / "fp16.onnx").read_bytes()


def test_int8_types_and_ranges(files: Files) -> None:
    for name, activation, largest in (("int8", TensorProto.UINT8, 64), ("trt", 3, 127)):
        path = files.root / f"{name}.onnx"
        constants = tensors(path)
        quantisers = nodes(path, "QuantizeLinear")
        assert len(quantisers) > 10
        assert {constants[n.input[2]].data_type for n in quantisers} == {activation}
        weights = {
            n.input[0]: n for n in nodes(path, "DequantizeLinear") if n.input[0] in constants
        }
        kinds = {n: numpy_helper.to_array(constants[n]) for n in weights}
        matrices = {n: values for n, values in kinds.items() if values.ndim > 1}
        assert len(matrices) == 15  # 6 in each of 2 layers, 2 in the projector, 1 convolution
        for matrix, values in matrices.items():
            assert values.dtype == np.int8
            assert np.abs(values.astype(int)).max() <= largest
            assert constants[weights[matrix].input[1]].dims[0] in values.shape  # per channel
        if name == "trt":
            assert len(kinds) == len(matrices)  # no int32 biases
            for node in nodes(path, "QuantizeLinear", "DequantizeLinear"):
                assert not numpy_helper.to_array(constants[node.input[2]]).any()


def test_attention_products_stay_floating(files: Files) -> None:
    made = {
        o: n.op_type for n in nodes(files.root / "trt.onnx", "DequantizeLinear") for o in n.output
    }
    products = nodes(files.root / "trt.onnx", "MatMul", "Gemm")
    assert len(products) == 18
    assert sum(made.get(n.input[1]) == "DequantizeLinear" for n in products) == 14


def test_fp8_types(files: Files) -> None:
    path = files.root / "fp8.onnx"
    constants = tensors(path)
    narrow = [t for t in constants.values() if t.data_type == TensorProto.FLOAT8E4M3FN and t.dims]
    assert len(narrow) == files.details["fp8"]["layers"] == 14
    for tensor in narrow:  # the scale uses the whole range
        values = np.abs(numpy_helper.to_array(tensor).astype(np.float32))
        assert 416 <= values.max() <= 448
    # q, k and v read one tensor: it is quantised once
    assert len(nodes(path, "QuantizeLinear")) == 10
    assert files.details["fp8"]["calibration_images"] == COUNT


@pytest.mark.parametrize(
    ("machine", "flags", "reduced", "words"),
    [
        ("x86_64", "fpu avx2 avx512_vnni", False, "avx512_vnni"),
        ("AMD64", "fpu avx_vnni avx2", False, "avx_vnni"),
        ("x86_64", "fpu avx2 avx512f", True, "no VNNI"),
        ("x86_64", None, True, "no VNNI"),
        ("aarch64", "asimd", False, "aarch64 is not x86"),
    ],
)
def test_range_follows_the_cpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    flags: str | None,
    reduced: bool,
    words: str,
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n", "utf-8")
    monkeypatch.setattr(vision_quantize, "CPUINFO", cpuinfo)
    monkeypatch.setattr("platform.machine", lambda: machine)
    source = tmp_path / "a.onnx"
    writer.write(Tiny(), source, image_size=4)
    details = to_int8(source, tmp_path / "b.onnx", images=images(size=4))
    assert details["reduce_range"] is reduced
    assert words in details["reason"]
    asked = to_int8(source, tmp_path / "c.onnx", images=images(size=4), reduce_range=not reduced)
    assert asked["reduce_range"] is not reduced
    assert "was asked for" in asked["reason"]
    largest = 64 if reduced else 127
    weights = tensors(tmp_path / "b.onnx").values()
    assert [
        np.abs(numpy_helper.to_array(t).astype(int)).max() for t in weights if len(t.dims) == 2
    ] == [largest]


def test_another_process_writes_the_same_bytes(files: Files, tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "from tests.export.test_vision_quantize import write_all\n"
        f"write_all(Path({str(tmp_path)!r}), Path({str(files.source)!r}))\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "export")])
    environment = {**os.environ, "PYTHONHASHSEED": "54321", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=tmp_path)
    for name in files.details:
        again, first = tmp_path / f"{name}.onnx", files.root / f"{name}.onnx"
        assert again.read_bytes() == first.read_bytes(), name


def test_nothing_of_this_machine_or_tool_is_inside(files: Files) -> None:
    for name in files.details:
        data = (files.root / f"{name}.onnx").read_bytes()
        for text in (str(ROOT), str(files.root), sys.prefix, "onnxruntime", "pytorch", ".py"):
            assert text.encode() not in data, (name, text)
        model = onnx.load(files.root / f"{name}.onnx")
        assert {p.key for p in model.metadata_props} == {"rx_edge.pairing"}
        assert [(o.domain, o.version) for o in model.opset_import] == [("", writer.OPSET)]


Writer = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("write", [to_int8, to_fp8])
def test_images_are_checked(files: Files, tmp_path: Path, write: Writer) -> None:
    (tmp_path / "a.onnx").write_bytes(b"older")
    cases: list[tuple[list[Any], str]] = [
        ([], "no calibration images; pass at least one radiograph"),
        ([np.zeros((3, IMAGE_SIZE, IMAGE_SIZE), np.float32)], "calibration image 0 is float32"),
        ([*images(), np.zeros((1, 3, 8, 8), np.float32)], r"image 4 is float32 \(1, 3, 8, 8\)"),
        ([images()[0].astype(np.float64)], "image 0 is float64"),
        ([np.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.nan, np.float32)], "NaN"),
    ]
    for given, words in cases:
        with pytest.raises(ExportError, match=words):
            write(files.source, tmp_path / "a.onnx", images=given)
    assert (tmp_path / "a.onnx").read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_overflow_is_refused(tmp_path: Path) -> None:
    module, source, out = Tiny(), tmp_path / "a.onnx", tmp_path / "b.onnx"
    cases = ((1e5, 1e-6, "weight '.*' holds 1e.05"), (6e4, 1.0, "activation '.*' reaches"))
    for largest, factor, words in cases:
        with torch.no_grad():
            module.weight.copy_(Tiny().weight * factor)
            module.weight[0, 0] = largest
        writer.write(module, source, image_size=4)
        with pytest.raises(ExportError, match=words):
            to_fp16(source, out)
        with pytest.raises(ExportError, match="float16 ends at 65504"):
            to_fp8(source, out, images=images(size=4))
        to_int8(source, tmp_path / "c.onnx", images=images(size=4))  # float32 elsewhere
    assert not out.exists()


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.onnx"
    writer.write(Tiny(), source, image_size=4)
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 2:
            values = numpy_helper.to_array(tensor).copy()
            values[0, 0] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, source)
    with pytest.raises(ExportError, match="holds nan"):
        to_fp16(source, tmp_path / "b.onnx")
    with pytest.raises(ExportError):
        to_int8(source, tmp_path / "b.onnx", images=images(size=4))
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_only_the_fp32_file_is_taken(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "b.onnx"
    for name in ("fp16", "int8", "fp8"):
        with pytest.raises(ExportError, match="is quantised already; pass the fp32 file"):
            to_fp16(files.root / f"{name}.onnx", out)
    with pytest.raises(ExportError, match="does not exist"):
        to_fp16(tmp_path / "none.onnx", out)
    (tmp_path / "text.onnx").write_text("no model", "utf-8")
    with pytest.raises(ExportError, match="cannot load"):
        to_fp16(tmp_path / "text.onnx", out)
    old = onnx.load(files.source)
    old.opset_import[0].version = 18
    onnx.save(old, tmp_path / "old.onnx")
    with pytest.raises(ExportError, match=r"old\.onnx"):
        to_fp8(tmp_path / "old.onnx", out, images=images())
    with pytest.raises(ExportError, match="cannot be written"):
        to_fp16(files.source, tmp_path / "nowhere" / "b.onnx")
    monkeypatch.setattr(vision_quantize, "SIZE_LIMIT", 1000)
    with pytest.raises(ExportError, match="up to 1000 can be quantised"):
        to_fp16(files.source, out)
    assert not out.exists()


def test_weights_in_a_file_of_their_own_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.onnx"
    monkeypatch.setattr(writer, "SINGLE_FILE_LIMIT", 100)
    writer.write(Tiny(), source, image_size=4, pairing=PAIRING)
    assert (tmp_path / "a.onnx.data").is_file()
    for write in (to_fp16, to_int8, to_fp8):
        details = write(source, tmp_path / "b.onnx", images=images(size=4))
        assert details["min_cosine"] > 0.9  # one layer of 4 outputs, some of them nearly 0
        with reader.open(tmp_path / "b.onnx", threads=1) as backend:
            assert backend.pairing == PAIRING
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data", "b.onnx"]
    assert capfd.readouterr() == ("", "")
