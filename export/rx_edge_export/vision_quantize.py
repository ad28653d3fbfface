"""The fp32 vision file -> fp16, int8 and fp8 files of the same signature and pairing.

    to_fp16   weights and arithmetic float16; ONNX Runtime on any device, and TensorRT
    to_int8   static QDQ calibrated on real images; `symmetric` (TensorRT) or not (CPU)
    to_fp8    E4M3 QDQ around the linear layers, float16 elsewhere; TensorRT

Input and output stay float32, so that the reader and the caller cannot tell the files apart. In the
files for TensorRT all arithmetic between them is float16: its networks are strongly typed, and a
float32 weight next to float16 activations is refused.

An activation beyond float16 becomes infinite on a GPU, while ONNX Runtime's CPU kernels compute in
float32 and hide it. Hence the largest activation of the fp32 file is measured, not the result only.

Does not cover: whether the measured error is acceptable (`tolerances.py` and the caller; only NaN
and infinite numbers are refused here), bf16, and language models.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from rx_edge.atomic import replacing
from rx_edge.backends import vision_onnx as reader
from rx_edge.backends.base import PAIRING_KEY
from rx_edge.errors import BackendError, ExportError
from rx_edge.optional import require
from rx_edge.types import FloatArray
from rx_edge_export import vision_rewrite
from rx_edge_export.vision_rewrite import FP16_MAX, FP32_MAX

SIZE_LIMIT = 1_800_000_000  # bytes of source; the quantiser holds it in one protobuf (2 GiB)
MINIMUM_OPSET = 19  # the first with float8 and with float16 scales in Q/DQ
CPUINFO = Path("/proc/cpuinfo")

_QUANTISED = ["MatMul", "Gemm", "Conv"]


def to_fp16(src: Path, out: Path, *, images: Sequence[FloatArray] = ()) -> dict[str, Any]:
    """Weights and arithmetic in float16, input and output float32.

    Args:
        src: written by `vision_onnx.write`.
        images: what to measure on, each float32 (1, 3, S, S); seeded random numbers if empty.

    Returns:
        {"bytes", "opset", "max_error", "min_cosine", "largest_activation"}. `max_error` is
        relative to the largest number of the fp32 file, `min_cosine` is over soft tokens.

    Raises:
        ExportError: a weight or an activation does not fit float16, or `src` is not such a file.
    """
    source = _Source(src)
    checked = source.check(images) if len(images) else source.random(3)
    model = source.load()
    vision_rewrite.halve(model)
    largest = _largest_activation(source.load(), checked)
    return {**_publish(model, source, out, checked), "largest_activation": largest}


def to_int8(
    src: Path,
    out: Path,
    *,
    images: Sequence[FloatArray],
    symmetric: bool = False,
    reduce_range: bool | None = None,
) -> dict[str, Any]:
    """Static int8 with ranges from `images`: weights per channel, activations per tensor.

    Args:
        images: real radiographs, prepared as for the model, each float32 (1, 3, S, S).
        symmetric: False = unsigned activations, float32 elsewhere, for ONNX Runtime on CPUs.
            True = signed with zero points 0, float16 elsewhere, for TensorRT.
        reduce_range: 7 bits instead of 8; None chooses by this machine's CPU.

    Returns:
        {"bytes", "opset", "max_error", "min_cosine", "reduce_range", "reason",
        "calibration_images"}, and "largest_activation" if symmetric.

    Raises:
        ExportError: no or wrong images, the quantiser failed, or the result is not finite.
    """
    source = _Source(src)
    checked = source.check(images)
    reduced, reason = _range(symmetric, reduce_range)
    extra: dict[str, Any] = {}
    if symmetric:
        extra["largest_activation"] = _largest_activation(source.load(), checked)
    model = _quantise(source, checked, symmetric=symmetric, reduce_range=reduced)
    if symmetric:
        vision_rewrite.halve(model)
    # the integer kernels of this CPU say nothing about TensorRT's: compute Q and DQ as written
    summary = _publish(model, source, out, checked, as_written=symmetric)
    return {
        **summary,
        **extra,
        "reduce_range": reduced,
        "reason": reason,
        "calibration_images": len(checked),
    }


def to_fp8(src: Path, out: Path, *, images: Sequence[FloatArray]) -> dict[str, Any]:
    """E4M3 weights and inputs of every linear layer, scale = largest / 448; float16 elsewhere.

    Args and errors are those of `to_int8`.

    Returns:
        {"bytes", "opset", "max_error", "min_cosine", "largest_activation",
        "calibration_images", "layers"}; `layers` counts the linear layers in fp8.
    """
    source = _Source(src)
    checked = source.check(images)
    model = source.load()
    largest = _largest_activation(model, checked)
    layers = vision_rewrite.linear_layers(model)
    if not layers:
        raise ExportError(f"{str(src)!r} has no linear layer with constant weights; nothing to do")
    vision_rewrite.quantise_fp8(
        model, layers, _amax(model, [node.input[0] for node in layers], checked)
    )
    vision_rewrite.halve(model)
    return {
        **_publish(model, source, out, checked, as_written=True),
        "largest_activation": largest,
        "calibration_images": len(checked),
        "layers": len(layers),
    }


class _Source:
    """The fp32 file: checked, measured and loaded."""

    def __init__(self, path: Path) -> None:
        files = [path, path.with_name(path.name + ".data")]
        size = sum(file.stat().st_size for file in files if file.is_file())
        if size > SIZE_LIMIT:
            raise ExportError(
                f"{str(path)!r} has {size} bytes; up to {SIZE_LIMIT} can be quantised: "
                "use the fp32 file"
            )
        try:
            reader.open(path, threads=0).close()  # refuses any other signature
        except BackendError as error:
            raise ExportError(str(error)) from error
        self.path = path
        model = self.load()
        self.pairing = {p.key: p.value for p in model.metadata_props}.get(PAIRING_KEY, "")
        self.opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self.size: int = model.graph.input[0].type.tensor_type.shape.dim[2].dim_value
        self._refuse_other(model)

    def load(self) -> Any:
        return onnx.load(self.path)

    def _refuse_other(self, model: Any) -> None:
        if self.opset < MINIMUM_OPSET:
            raise ExportError(
                f"{str(self.path)!r} has opset {self.opset}; {MINIMUM_OPSET} is needed: "
                "export it again with this version"
            )
        nested = {helper.AttributeProto.GRAPH, helper.AttributeProto.GRAPHS}
        if model.functions or any(a.type in nested for n in model.graph.node for a in n.attribute):
            raise ExportError(f"{str(self.path)!r} has functions or subgraphs; export it again")
        types = {tensor.data_type for tensor in model.graph.initializer}
        if types & {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.UINT8}:
            raise ExportError(f"{str(self.path)!r} is quantised already; pass the fp32 file")

    def check(self, images: Sequence[FloatArray]) -> list[FloatArray]:
        wanted = (1, 3, self.size, self.size)
        if not len(images):
            raise ExportError(
                "no calibration images; pass at least one radiograph prepared as for the model, "
                f"float32 {wanted}"
            )
        for number, image in enumerate(images):
            if image.shape != wanted or image.dtype != np.float32:
                raise ExportError(
                    f"calibration image {number} is {image.dtype} {image.shape}; "
                    f"prepare it with the model's recipe: float32 {wanted}"
                )
            if not np.isfinite(image).all():
                raise ExportError(f"calibration image {number} has NaN or infinite numbers")
        return list(images)

    def random(self, count: int) -> list[FloatArray]:
        generator, shape = np.random.default_rng(0), (1, 3, self.size, self.size)
        return [generator.standard_normal(shape, np.float32) for _ in range(count)]


def _publish(
    model: Any, source: _Source, out: Path, images: list[FloatArray], *, as_written: bool = False
) -> dict[str, Any]:
    """Strip, check and measure `model`, then let it appear as `out`."""
    vision_rewrite.strip(model, source.pairing)
    with replacing(out) as part:
        part.write_bytes(model.SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(part, full_check=True)
            reader.open(part, threads=0).close()
            wanted = _encode(source.path, images)
            found = _encode(part, images, as_written=as_written)
        except (
            BackendError,
            onnx.checker.ValidationError,
            onnx.shape_inference.InferenceError,
        ) as error:
            raise ExportError(f"the converted vision model is not usable: {error}") from error
        size = part.stat().st_size
    return {"bytes": size, "opset": source.opset, **_difference(found, wanted)}


def _encode(path: Path, images: list[FloatArray], *, as_written: bool = False) -> FloatArray:
    """Soft prompts (images, N, D); `as_written` computes every node, fusing none."""
    if not as_written:
        with reader.open(path, threads=0) as backend:
            return np.concatenate([backend.encode(image) for image in images])
    session = _session(str(path), optimise=False)
    found = np.concatenate([session.run(None, {reader.INPUT: image})[0] for image in images])
    if not np.isfinite(found).all():
        raise BackendError("it returns NaN or infinite numbers on the given images")
    return found


def _difference(found: FloatArray, wanted: FloatArray) -> dict[str, float]:
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (found, wanted))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return {
        "max_error": float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(np.float64).tiny)),
        "min_cosine": float(cosines.min()),
    }


def _session(model: str | bytes, *, optimise: bool) -> Any:
    ort: Any = require("onnxruntime", extra="cpu")
    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _largest_activation(model: Any, images: list[FloatArray]) -> float:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    computed = {name for node in inferred.node for name in node.output}
    names = [
        value.name
        for value in (*inferred.value_info, *inferred.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT and value.name in computed
    ]
    amax = _amax(model, names, images)
    name, largest = max(amax.items(), key=lambda item: item[1])
    if largest > FP16_MAX:
        raise ExportError(
            f"activation {name!r} reaches {largest:.3g}; float16 ends at {FP16_MAX:.0f}: "
            "use the fp32 or the asymmetric int8 file"
        )
    return largest


def _amax(model: Any, names: Sequence[str], images: list[FloatArray]) -> dict[str, float]:
    """The largest magnitude of every tensor of `names` over all images, masks apart."""
    measured = onnx.ModelProto()
    measured.CopyFrom(model)
    names = list(dict.fromkeys(names))
    for number, name in enumerate(names):
        # reduced inside the graph: attention maps of all layers would not fit in memory
        measured.graph.node.append(helper.make_node("Abs", [name], [f"_abs{number}"]))
        top = helper.make_node("ReduceMax", [f"_abs{number}"], [f"_amax{number}"], keepdims=0)
        measured.graph.node.append(top)
        value = helper.make_tensor_value_info(f"_amax{number}", TensorProto.FLOAT, [])
        measured.graph.output.append(value)
    session = _session(measured.SerializeToString(), optimise=True)
    outputs = [f"_amax{number}" for number in range(len(names))]
    rows = np.array([session.run(outputs, {reader.INPUT: image}) for image in images])
    rows[~(rows < FP32_MAX)] = 0.0
    return dict(zip(names, rows.max(axis=0).tolist(), strict=True))


# ---- int8


def _range(symmetric: bool, asked: bool | None) -> tuple[bool, str]:
    """Whether to use 7 bits, and why, as a sentence."""
    if asked is not None:
        return asked, f"reduce_range={asked} was asked for."
    if symmetric:
        return False, "8 bits: TensorRT adds products in 32 bits, which cannot overflow."
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False, f"8 bits: {platform.machine()} is not x86, whose 16-bit sums overflow."
    flags = CPUINFO.read_text("utf-8").split() if CPUINFO.is_file() else []
    found = [flag for flag in ("avx512_vnni", "avx_vnni") if flag in flags]
    if found:
        return False, f"8 bits: this CPU has {found[0]}; on one without VNNI sums would overflow."
    return True, (
        "7 bits: this CPU has no VNNI (avx512_vnni, avx_vnni), so its 16-bit sums of 8-bit "
        "products would overflow."
    )


def _quantise(
    source: _Source, images: list[FloatArray], *, symmetric: bool, reduce_range: bool
) -> Any:
    ort: Any = require("onnxruntime", extra="cpu")
    ort.disable_telemetry_events()
    quantization: Any = require("onnxruntime.quantization", extra="cpu")

    class Images(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(images)

        def get_next(self) -> dict[str, FloatArray] | None:
            image = next(self._left, None)
            return None if image is None else {reader.INPUT: image}

    kind = quantization.QuantType
    options: dict[str, Any] = {
        "ActivationSymmetric": symmetric,
        "WeightSymmetric": True,
        "MatMulConstBOnly": True,  # heeded by the quantiser's other formats only: see `products`
    }
    if symmetric:  # TensorRT has no int32 biases, and takes float sums out of an int8 layer
        options["QuantizeBias"] = False
        options["OpTypesToExcludeOutputQuantization"] = _QUANTISED
    with tempfile.TemporaryDirectory() as scratch:
        prepared, quantised = Path(scratch) / "prepared.onnx", Path(scratch) / "int8.onnx"
        try:
            quantization.quant_pre_process(source.path, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                quantised,
                Images(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=_QUANTISED,
                nodes_to_exclude=vision_rewrite.products(onnx.load(prepared)),
                per_channel=True,
                reduce_range=reduce_range,
                activation_type=kind.QInt8 if symmetric else kind.QUInt8,
                weight_type=kind.QInt8,
                extra_options=options,
            )
        except Exception as error:  # the quantiser raises many kinds, none documented
            name = str(source.path)
            raise ExportError(f"onnxruntime cannot quantise {name!r}: {error}") from error
        return onnx.load(quantised)
