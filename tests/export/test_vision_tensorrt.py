"""TensorRT-RTX takes what the exporter writes, for real and without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rx_edge.backends import tensorrt_engine
from rx_edge.errors import ExportError, UsageError
from rx_edge_export import vision_onnx as writer
from rx_edge_export import vision_tensorrt
from rx_edge_export.vision_quantize import to_fp8, to_fp16, to_int8
from tests.export.test_vision_onnx import encoder
from tests.export.test_vision_quantize import images
from tests.factories import IMAGE_SIZE

trt = pytest.importorskip("tensorrt_rtx_bindings", reason='pip install "rx-edge[tensorrt]"')


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tensorrt")
    source = root / "fp32.onnx"
    writer.write(encoder(root / "vit"), source, image_size=IMAGE_SIZE)
    to_fp16(source, root / "fp16.onnx")
    to_int8(source, root / "int8.onnx", images=images(), symmetric=True)
    to_fp8(source, root / "fp8.onnx", images=images())
    to_int8(source, root / "cpu.onnx", images=images(), reduce_range=True)
    return root


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "fp8"])
def test_engines_for_ada_and_blackwell(
    root: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    steps: list[tuple[str, int, int]] = []
    path = root / f"{name}.onnx"
    found = vision_tensorrt.check(path, progress=lambda *step: steps.append(step))
    assert found["flavour"] == "tensorrt_rtx"
    assert found["version"] == trt.__version__
    assert set(found["engines"]) == {"sm89", "sm120"}
    assert all(engine["bytes"] > 100_000 for engine in found["engines"].values())
    shape = [3, IMAGE_SIZE, IMAGE_SIZE]
    assert found["profile"] == [[1, *shape], [1, *shape], [4, *shape]]
    assert (found["soft_tokens"], found["width"]) == (4, 64)
    assert len({phase for phase, _, _ in steps}) > 3
    assert all(0 <= done <= total for _, done, total in steps)
    assert capfd.readouterr() == ("", "")  # libraries never print
    if name == "fp16":
        assert vision_tensorrt.check(path) == found


@pytest.mark.parametrize(
    ("name", "operator", "kind"),
    [
        ("fp16", "MatMul", "HALF"),
        ("int8", "QuantizeLinear", "INT8"),
        ("fp8", "QuantizeLinear", "FP8"),
    ],
)
def test_the_network_has_the_precision_of_the_file(
    root: Path, name: str, operator: str, kind: str
) -> None:
    library = tensorrt_engine.find()
    network = trt.Builder(library.logger).create_network(0)
    parser = trt.OnnxParser(network, library.logger)
    assert parser.parse_from_file(str(root / f"{name}.onnx"))
    names = {n.name for n in onnx.load(root / f"{name}.onnx").graph.node if n.op_type == operator}
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    kinds = {layer.get_output(0).dtype.name for layer in layers if layer.name in names}
    assert kinds == {kind}


def test_files_that_tensorrt_does_not_take(root: Path) -> None:
    with pytest.raises(
        ExportError, match=r"node '\w*_QuantizeLinear' \(QuantizeLinear\).*ero point"
    ):
        vision_tensorrt.check(root / "cpu.onnx")  # asymmetric
    with pytest.raises(ExportError, match="does not build for SM90 "):
        vision_tensorrt.check(root / "fp16.onnx", compute_capabilities=[(9, 0)])
    with pytest.raises(ExportError, match=r"none\.onnx' does not exist"):
        vision_tensorrt.check(root / "none.onnx")
    with pytest.raises(UsageError, match="no compute capability"):
        vision_tensorrt.check(root / "fp16.onnx", compute_capabilities=[])


def changed(root: Path, out: Path, change: Any) -> Path:
    model = onnx.load(root / "fp16.onnx")
    change(model.graph)
    onnx.save(model, out)
    return out


def test_the_message_names_the_broken_node(root: Path, tmp_path: Path) -> None:
    def unknown(graph: Any) -> None:
        (node,) = (n for n in graph.node if n.output[0] == "gelu")
        node.op_type, node.name = "Fnord", "the_broken_one"

    def mixed(graph: Any) -> None:
        (after,) = (n for n in graph.node if "gelu" in n.input)
        after.name = "the_mixed_one"
        for weight in graph.initializer:
            if weight.name == after.input[1]:
                wide = numpy_helper.to_array(weight).astype("float32")
                weight.CopyFrom(numpy_helper.from_array(wide, weight.name))

    with pytest.raises(ExportError, match=r"node 'the_broken_one' \(Fnord\)"):
        vision_tensorrt.check(changed(root, tmp_path / "a.onnx", unknown))
    with pytest.raises(ExportError, match=r"the_mixed_one.*(type|HALF|Half)"):
        vision_tensorrt.check(changed(root, tmp_path / "b.onnx", mixed))
    (tmp_path / "c.onnx").write_bytes((root / "fp16.onnx").read_bytes()[:5000])
    with pytest.raises(ExportError, match=r"cannot read '.*c\.onnx'"):
        vision_tensorrt.check(tmp_path / "c.onnx")


def test_other_signatures_are_refused(root: Path, tmp_path: Path) -> None:
    def half_output(graph: Any) -> None:
        graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
        graph.node[-1].CopyFrom(
            helper.make_node("Identity", graph.node[-1].input, graph.node[-1].output)
        )

    def fixed_batch(graph: Any) -> None:
        graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1

    def other_name(graph: Any) -> None:
        graph.input[0].name = graph.node[0].input[0] = "images"

    for number, change in enumerate((half_output, fixed_batch, other_name)):
        path = changed(root, tmp_path / f"{number}.onnx", change)
        with pytest.raises(ExportError, match=r"expected float32 pixel_values \(-1, 3, S, S\)"):
            vision_tensorrt.check(path)
