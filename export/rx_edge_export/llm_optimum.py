"""The same ONNX decoder by an independent route: Hugging Face optimum, in its own environment.

optimum-onnx needs transformers 4 and traces with another exporter, so a fault in ours and a
fault in theirs are unlikely to agree. It never shares an interpreter with rx-edge: this module
runs it as a program, then makes its graph take embeddings instead of token ids, and sends it
through the writer's own gate (`llm_onnx.publish`) against torch.

transformers 4 does not know `rope_parameters` and silently takes a rope_theta of 10000; the
copy of config.json that it is given says both.

Does not cover: precisions other than fp32, and everything that `llm_onnx` refuses.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rx_edge.backends import llm_onnx as reader
from rx_edge.errors import ExportError, MissingExtraError
from rx_edge_export import llm_onnx

VARIABLE = "RX_EDGE_OPTIMUM_PYTHON"
IDS = "input_ids"
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "ORT_DISABLE_TELEMETRY": "1",
}


def write(
    model_dir: Path,
    out: Path,
    *,
    pairing: str = "",
    name: str = "",
    python: Path | None = None,
) -> dict[str, Any]:
    """Write `model_dir` in fp32 as `out` and its `sidecars`, through optimum.

    Args:
        pairing, name: as for `llm_onnx.write`.
        python: interpreter of the environment that holds optimum; None = the one named by
            RX_EDGE_OPTIMUM_PYTHON.

    Returns:
        As `llm_onnx.write`.

    Raises:
        MissingExtraError: no such interpreter was named; the message says how to make one.
        ExportError: optimum failed, its graph cannot be made to take embeddings, or the result
            differs from torch. `out` is then left as it was.
    """
    interpreter = _interpreter(python)
    llm_onnx.check_directory(out)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        copy, made = Path(scratch) / "model", Path(scratch) / "onnx"
        context = prepare(model_dir, copy)
        _run(interpreter, copy, made)
        model = ir.load(made / "model.onnx")
        table = take_embeddings(model)
        part = llm_onnx.Part(model, table, model_dir, context)
        return llm_onnx.publish(part, out, tolerance=llm_onnx.TOLERANCE, pairing=pairing, name=name)


def prepare(model_dir: Path, copy: Path) -> int:
    """Link the weights into `copy` with a config.json that transformers 4 and 5 read alike.

    Returns:
        Tokens the model was trained for.
    """
    source = model_dir / "config.json"
    try:
        config = json.loads(source.read_text(encoding="utf-8"))
        context = int(config.get("max_position_embeddings") or config["n_positions"])
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"{str(source)!r} cannot be read: {error!r}") from error
    rope = dict(config.get("rope_parameters") or {})
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is not None:
        old, scaling = config.get("rope_theta", theta), config.get("rope_scaling")
        if old != theta:
            raise ExportError(
                f"{str(source)!r}: rope_theta is {old}, but rope_parameters says {theta}; keep one"
            )
        rope = {"rope_type": "default", **(scaling or {}), **rope, "rope_theta": theta}
        config["rope_theta"], config["rope_parameters"] = theta, rope
        if rope["rope_type"] != "default":
            config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for file in (*model_dir.glob("*.safetensors"), *model_dir.glob("*.safetensors.index.json")):
        (copy / file.name).symlink_to(file.resolve())
    return context


def take_embeddings(model: ir.Model) -> Any:
    """Remove the embedding lookup from `model`: its result becomes the input `inputs_embeds`.

    Returns:
        The embedding table float32 (V, D).

    Raises:
        ExportError: the graph has no single lookup, or needs the ids for something else.
    """
    graph = model.graph
    ids = next((value for value in graph.inputs if value.name == IDS), None)
    lookups = [] if ids is None else [node for node in graph.all_nodes() if _looks_up(node, ids)]
    if ids is None or len(lookups) != 1:
        raise ExportError(
            f"the graph has {len(lookups)} lookups of {IDS!r} in a constant table; one is expected"
        )
    (lookup,) = lookups
    weight = lookup.inputs[0]
    assert weight is not None
    assert weight.const_value is not None
    table = np.ascontiguousarray(weight.const_value.numpy(), np.float32)
    embeds = ir.Value(name=reader.EMBEDS, type=ir.TensorType(ir.DataType.FLOAT))
    rows = list(ids.shape or ["batch_size", "sequence_length"])
    embeds.shape = ir.Shape([*rows, table.shape[1]])
    graph.inputs[list(graph.inputs).index(ids)] = embeds
    lookup.outputs[0].replace_all_uses_with(embeds)
    names = _aliases(lookup.inputs[1], ids)
    _remove(graph, lookup)
    for use in [use for name in names for use in name.uses() if use.node.op_type == "Shape"]:
        use.node.attributes["end"] = ir.AttrInt64("end", 2)  # (batch, seq) of (batch, seq, D)
        use.node.replace_input_with(use.idx, embeds)
    _remove_unused(graph)
    for use in ids.uses():
        raise ExportError(f"the graph also gives {IDS!r} to {use.node.op_type}; not covered")
    if not weight.uses():
        del graph.initializers[str(weight.name)]
    return table


def _looks_up(node: ir.Node, ids: ir.Value) -> bool:
    """Whether `node` gathers rows of a constant table by `ids`."""
    if node.op_type != "Gather" or node.inputs[0] is None or node.inputs[0].const_value is None:
        return False
    return len(node.inputs[0].const_value.shape) == 2 and bool(_aliases(node.inputs[1], ids))


def _aliases(value: ir.Value | None, ids: ir.Value) -> list[ir.Value]:
    """`value`, what it was reshaped from, ... and `ids`; [] when it is not made from them."""
    found = []
    while value is not None:
        found.append(value)
        maker = value.producer()
        if value is ids:
            return found
        if maker is None or maker.op_type not in ("Reshape", "Cast", "Identity"):
            break
        value = maker.inputs[0]
    return []


def _remove_unused(graph: ir.Graph) -> None:
    """Nodes that only fed the lookup."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            _remove(graph, node)


def _remove(graph: ir.Graph, node: ir.Node) -> None:
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
    graph.remove(node)


def _interpreter(python: Path | None) -> Path:
    named = python or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is None:
        raise MissingExtraError(
            "optimum needs transformers 4, hence an environment of its own: python -m venv "
            'optimum-env && optimum-env/bin/pip install "rx-edge[optimum]", then set '
            f"{VARIABLE}=optimum-env/bin/python"
        )
    if not named.is_file():
        raise ExportError(f"the interpreter for optimum {str(named)!r} does not exist")
    return named


def _run(python: Path, model: Path, out: Path) -> None:
    """optimum's own checks only warn, so nothing but its exit code and its file counts."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [str(python), "-m", "optimum.exporters.onnx", "--model", str(model)]
    command += ["--task", "text-generation-with-past", "--dtype", "fp32", str(out)]
    try:
        done = subprocess.run(
            command, env={**environment, **_OFFLINE}, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ExportError(f"{str(python)!r} cannot be run: {error.strerror}") from error
    if done.returncode != 0 or not (out / "model.onnx").is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ExportError(
            f"optimum (run by {str(python)!r}) failed with code {done.returncode}: {lines[-1]}"
        )
