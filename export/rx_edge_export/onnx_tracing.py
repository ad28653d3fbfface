"""What exports through torch.onnx need: quiet, and a graph without detours or traces of tools.

Does not cover: the export itself (`vision_onnx.py`, `llm_onnx.py`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def strip(model: Any) -> None:
    """Remove every text that is not needed to compute: it names source files of this machine."""
    graphs = [model.graph, *model.functions.values()]
    for holder in (model, *graphs, *_parts(graphs)):
        holder.doc_string = None
        holder.metadata_props.clear()


def drop_nan_guards(model: Any) -> None:
    """Remove what torch puts behind a softmax for rows that a mask hides altogether:
    Where(IsNaN(p), 0, p).

    No encoder hides a whole row, so it costs time for nothing; and a NaN must reach the runtime's
    checks, where it is an error, and not become attention to nothing.
    """
    for node in list(model.graph):
        if node.op_type != "Where":
            continue
        asked, probabilities = node.inputs[0].producer(), node.inputs[2]
        softmax = probabilities.producer()
        guard = asked and asked.op_type == "IsNaN" and asked.inputs[0] is probabilities
        if guard and softmax and softmax.op_type == "Softmax":
            ir.convenience.replace_all_uses_with(node.outputs[0], probabilities)
    RemoveUnusedNodesPass()(model)


def _parts(graphs: list[Any]) -> Iterator[Any]:
    for graph in graphs:
        yield from graph.inputs
        yield from getattr(graph, "initializers", {}).values()
        for node in graph.all_nodes():
            yield node
            yield from node.outputs


@contextmanager
def silence() -> Iterator[None]:
    """Torch's exporter warns about its own internals; a failure is raised, not logged."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
