"""Changes of a vision graph in place: float16, fp8 linear layers, no traces of tools.

Does not cover: reading, measuring and writing files (`vision_quantize.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper, numpy_helper

from rx_edge.backends import vision_onnx as reader
from rx_edge.backends.base import PAIRING_KEY
from rx_edge.errors import ExportError

FP16_MAX = float(np.finfo(np.float16).max)  # 65504
FP32_MAX = float(np.finfo(np.float32).max)  # and infinity stand for "masked" in attention
FP16_TINY = float(np.finfo(np.float16).smallest_normal)  # 6.1e-5; smaller scales lose digits
FP8_MAX = 448.0  # of E4M3

_PRODUCTS = ("MatMul", "Gemm")
_DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


def strip(model: Any, pairing: str) -> None:
    """Keep what computes and the pairing; tools leave their names, versions and paths."""
    graph = model.graph
    model.producer_name, model.producer_version, model.domain = "rx-edge", "", ""
    for holder in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        holder.doc_string = ""
        del holder.metadata_props[:]
    del graph.value_info[:]
    if pairing:
        helper.set_model_props(model, {PAIRING_KEY: pairing})
    used = {node.domain for node in graph.node}
    kept = [o for o in model.opset_import if o.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def halve(model: Any) -> None:
    """float32 -> float16 for everything between input and output."""
    graph = model.graph
    for tensor in [*graph.initializer, *_attribute_tensors(graph)]:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(_to_half(tensor), tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in _DTYPE_ATTRIBUTES and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
        for names in (node.input, node.output):
            names[:] = [_half_name(name) for name in names]
    cast_in = helper.make_node(
        "Cast", [reader.INPUT], [_half_name(reader.INPUT)], "cast_in", to=TensorProto.FLOAT16
    )
    cast_out = helper.make_node(
        "Cast", [_half_name(reader.OUTPUT)], [reader.OUTPUT], "cast_out", to=TensorProto.FLOAT
    )
    graph.node.insert(0, cast_in)
    graph.node.append(cast_out)
    del graph.value_info[:]  # they say float32


def _half_name(name: str) -> str:
    return f"{name}_fp16" if name in (reader.INPUT, reader.OUTPUT) else str(name)


def _attribute_tensors(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("value_float", "value_floats"):  # Constant; float32 by definition
                raise ExportError(f"node {node.name!r} has a float attribute; export it again")
            if attribute.type == helper.AttributeProto.TENSOR:
                yield attribute.t


def _to_half(tensor: Any) -> Any:
    values = numpy_helper.to_array(tensor)
    masked = np.abs(values) >= FP32_MAX
    largest = np.abs(values[~masked]).max(initial=0.0)
    if not largest <= FP16_MAX:  # NaN fails as well
        raise ExportError(
            f"weight {tensor.name!r} holds {largest:.3g}; float16 ends at {FP16_MAX:.0f}: "
            "use the fp32 or the asymmetric int8 file"
        )
    return np.where(masked, np.sign(values) * FP16_MAX, values).astype(np.float16)


def products(model: Any) -> list[str]:
    """Names of the products of two activations: attention loses most in int8."""
    linear = {node.output[0] for node in linear_layers(model)}
    found = [n for n in model.graph.node if n.op_type in _PRODUCTS and n.output[0] not in linear]
    if not all(node.name for node in found):
        raise ExportError("a product of two activations has no name; export the fp32 file again")
    return [node.name for node in found]


def linear_layers(model: Any) -> list[Any]:
    """MatMul and Gemm nodes with an activation on the left and constant weights on the right."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type in _PRODUCTS
        and node.input[1] in constants
        and node.input[0] not in constants
    ]


def quantise_fp8(model: Any, layers: list[Any], amax: dict[str, float]) -> None:
    """Put Q and DQ around inputs and weights of `layers`, one scale for each tensor.

    Args:
        amax: the largest magnitude of every layer's input.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    zero = numpy_helper.from_array(np.zeros((), ml_dtypes.float8_e4m3fn), "fp8_zero")
    added, done, weights = {}, set(), set()
    graph.initializer.append(zero)
    for node in layers:
        x, w = node.input[0], node.input[1]
        if x not in done:
            done.add(x)
            scale = _add_scale(graph, x, amax[x])
            q = helper.make_node("QuantizeLinear", [x, scale, zero.name], [f"{x}_q"], f"{x}_q")
            dq = helper.make_node(
                "DequantizeLinear", [f"{x}_q", scale, zero.name], [f"{x}_dq"], f"{x}_dq"
            )
            added[x] = [q, dq]
        if w not in weights:
            weights.add(w)
            values = numpy_helper.to_array(tensors[w])
            scale = _add_scale(graph, w, float(np.abs(values).max()))
            step = numpy_helper.to_array(graph.initializer[-1])
            narrow = np.clip(values / step, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
            graph.initializer.append(numpy_helper.from_array(narrow, f"{w}_q"))
            added[w] = [
                helper.make_node(
                    "DequantizeLinear", [f"{w}_q", scale, zero.name], [f"{w}_dq"], f"{w}_dq"
                )
            ]
        node.input[0], node.input[1] = f"{x}_dq", f"{w}_dq"
    _insert(graph, added)


def _add_scale(graph: Any, name: str, largest: float) -> str:
    """A scale that float16 holds exactly, as float32."""
    if not largest <= FP8_MAX * FP16_MAX:  # NaN fails as well
        raise ExportError(f"{name!r} reaches {largest:.3g}, too much for fp8; use the fp32 file")
    scale = np.float16(max(largest / FP8_MAX, FP16_TINY))
    graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), f"{name}_scale"))
    return f"{name}_scale"


def _insert(graph: Any, added: dict[str, list[Any]]) -> None:
    """Put the nodes of every tensor right after the node that makes it; drop unused weights."""
    nodes = list(graph.node)
    made = {name for node in nodes for name in node.output}
    ordered = [new for name, news in added.items() if name not in made for new in news]
    for node in nodes:
        ordered.append(node)
        ordered.extend(new for name in node.output for new in added.get(name, ()))
    del graph.node[:]
    graph.node.extend(ordered)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
