"""Block-wise weight quantisation of an ONNX graph's MatMuls, by ONNX Runtime's own quantiser.

Every MatMul whose weight is a constant (K, N) becomes `MatMulNBits`: blocks of 32 numbers share
one scale and one zero point. The quantiser is given one MatMul at a time: memory stays near one
weight, no protobuf limit is met, and each weight can have its own number of bits.

"int4" is what onnxruntime-genai calls k_quant_mixed, after llama.cpp's Q4_K_M: the value and
down projections of the first and last eighth of the layers and of every third between, and the
output head, get 8 bits; everything else gets 4, but where K is an odd number of blocks (8).

Does not cover: calibration data, activations (CPU kernels round them to int8 as they run),
Gemm and Gather.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from rx_edge.types import FloatArray

BLOCK = 32  # numbers along K that share a scale
ACCURACY_LEVEL = 4  # activations in int8: the only fast path on a CPU; CUDA ignores it
DOMAIN = "com.microsoft"
SCOPES = "pkg.torch.onnx.name_scopes"  # torch's exporter: module path of each node

_SENSITIVE = re.compile(
    r"\.(?:layers|h)\.(?P<layer>\d+)\.(?:self_attn\.v_proj|mlp\.down_proj|attn\.c_attn|mlp\.c_proj)$"
)


def quantise(model: ir.Model, bits_of: Callable[[str], int], *, k_quant: bool) -> None:
    """Quantise every constant MatMul weight of `model` in place.

    Args:
        bits_of: module path such as "model.layers.0.mlp.down_proj" -> 4 or 8.
        k_quant: llama.cpp's search for the best scale and offset (slow), else round to nearest.
    """
    model.opset_imports[DOMAIN] = 1
    for node in list(model.graph.all_nodes()):
        weight = node.inputs[1].const_value if node.op_type == "MatMul" and node.inputs[1] else None
        if weight is not None and len(weight.shape) == 2:
            bits = bits_of(_module(node))
            matrix = weight.numpy()
            if k_quant and _blocks_are_odd(len(matrix)):
                bits = 8
            _replace(model.graph, node, _blocks(matrix, bits, k_quant))


def mixed_bits(layers: int) -> Callable[[str], int]:
    """`bits_of` for k_quant_mixed with this many layers."""

    def bits(module: str) -> int:
        if module.rpartition(".")[2] == "lm_head":
            return 8
        found = _SENSITIVE.search(module)
        return 8 if found and sensitive(int(found["layer"]), layers) else 4

    return bits


def sensitive(layer: int, layers: int) -> bool:
    """Whether this layer gets more bits in k_quant_mixed."""
    eighth = layers / 8
    return layer < eighth or layer >= 7 * eighth or (layer - round(eighth)) % 3 == 2


def _blocks_are_odd(rows: int) -> bool:
    """Whether K gives an odd number of blocks: onnxruntime's k_quant cannot pack their 4 bits."""
    return -(-rows // BLOCK) % 2 == 1


def histogram(model: ir.Model) -> dict[str, int]:
    """How many matrix products with a weight are of which kind, e.g. {"MatMulNBits 8": 211}."""
    kinds: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        if node.op_type == "MatMulNBits":
            kinds[f"MatMulNBits {node.attributes['bits'].as_int()}"] += 1
        elif node.op_type in ("MatMul", "Gemm") and node.inputs[1] is not None:
            weight = node.inputs[1].const_value
            if weight is not None:
                kinds[f"{node.op_type} {weight.dtype.name}"] += 1
    return dict(sorted(kinds.items()))


def _module(node: ir.Node) -> str:
    """Path of the torch module whose forward made this node; the last scope is the call."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "['', '']"))
    return str(scopes[-2])


def _replace(graph: ir.Graph, node: ir.Node, product: onnx.ModelProto) -> None:
    """Turn `node` into the MatMulNBits of `product`, keeping its place and its output."""
    (made,) = (n for n in product.graph.node if n.op_type == "MatMulNBits")
    tensors = {tensor.name: tensor for tensor in product.graph.initializer}
    old = node.inputs[1]
    assert old is not None
    stem = old.name
    node.op_type, node.domain = made.op_type, DOMAIN
    for attribute in made.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(value))
    node.resize_inputs(len(made.input))
    for index, source in enumerate(made.input[1:], start=1):
        suffix = ("blocks", "scales", "zero_points")[index - 1]
        array = onnx.numpy_helper.to_array(tensors[source])
        tensor = ir.tensor(array, name=f"{stem}.{suffix}")
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
        value = ir.Value(name=tensor.name, const_value=tensor, type=kind, shape=shape)
        if tensor.name not in graph.initializers:
            graph.register_initializer(value)
        node.replace_input_with(index, graph.initializers[str(tensor.name)])
    if not old.uses():
        del graph.initializers[str(old.name)]


def _blocks(weight: FloatArray, bits: int, k_quant: bool) -> onnx.ModelProto:
    """A one-node model whose MatMul with `weight` (K, N) was quantised."""
    node = onnx.helper.make_node("MatMul", ["a", "w"], ["y"], name="product")
    value = onnx.helper.make_tensor_value_info
    kind = onnx.helper.np_dtype_to_tensor_dtype(weight.dtype)
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [value("a", kind, ["rows", weight.shape[0]])],
        [value("y", kind, ["rows", weight.shape[1]])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, 1)]
    with _quiet():
        from onnxruntime.quantization import matmul_nbits_quantizer as engine

        config: Any
        if k_quant:
            config = engine.KQuantWeightOnlyQuantConfig(
                customized_weight_config={"product": {"bits": bits}}
            )
        else:
            config = engine.DefaultWeightOnlyQuantConfig(
                block_size=BLOCK, bits=bits, accuracy_level=ACCURACY_LEVEL, is_symmetric=False
            )
        quantiser = engine.MatMulNBitsQuantizer(
            onnx.helper.make_model(graph, opset_imports=opsets),
            block_size=BLOCK,
            accuracy_level=ACCURACY_LEVEL,
            algo_config=config,
        )
        quantiser.process()
    made: onnx.ModelProto = quantiser.model.model
    return made


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser configures the root logger, logs, prints a progress bar, and divides by 0."""
    root, guard = logging.getLogger(), logging.NullHandler()
    disabled = logging.root.manager.disable
    root.addHandler(guard)  # logging.basicConfig does nothing where there is a handler
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(guard)
