"""What every export through torch.onnx needs: quiet, and a graph without traces of this machine.

Does not cover: the export itself (`vision_onnx.py`, `llm_onnx.py`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def strip(model: Any) -> None:
    """Remove every text that is not needed to compute: it names source files of this machine."""
    graphs = [model.graph, *model.functions.values()]
    for holder in (model, *graphs, *_parts(graphs)):
        holder.doc_string = None
        holder.metadata_props.clear()


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
