"""Blocks of two sides in turn: A B, B A, A B ..., each in a fresh process.

A drift of the machine (heat, neighbours) then falls on both sides alike. A side is a bundle with
the code, the interpreter and the settings that run it, so that two bundles, two versions of
rx-edge or two settings are all compared in the same way.

Does not cover: what a block does (`block.py`) and what the blocks say (`comparison.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rx_edge.errors import BackendError, BundleError, RxEdgeError, UsageError
from rx_edge_bench import block
from rx_edge_bench.environment import environment, fingerprint

SCHEMA = "rx-edge-blocks/1"
LONGEST = 1800.0  # seconds of one block; a process that hangs must not hold a pipeline for ever

Blocks = dict[str, Any]  # one JSON document of `SCHEMA`


@dataclass(frozen=True)
class Side:
    """What runs in each block of one side.

    Attributes:
        python: interpreter, perhaps of an environment with another rx-edge.
        source: a directory with an `rx_edge/` that goes before the interpreter's own; None = the
            interpreter's own, and for this very interpreter the code that runs now.
        options: more arguments of `block.py`, e.g. ("--threads=1",).
        environment: more environment variables.
    """

    bundle: Path
    python: Path = Path(sys.executable)
    source: Path | None = None
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def reference(bundle: Path, against: Path | None) -> tuple[Side, str]:
    """The side that `bundle` is compared with, and in words why it was taken for that.

    Args:
        against: another bundle, an interpreter with another rx-edge, or a source tree of one;
            None = the same bundle and code (for comparing options, or for an A/A run).

    Raises:
        UsageError: it is none of these.
    """
    if against is None:
        return Side(bundle), "the same bundle and code"
    if (against / "manifest.json").is_file():
        return Side(against), "another bundle (it has a manifest.json)"
    if (against / "rx_edge" / "__init__.py").is_file():
        return Side(bundle, source=against), "another source tree (it has an rx_edge/)"
    if against.is_file() and os.access(against, os.X_OK):
        # not resolved: the python of a virtual environment is a link out of it
        return Side(bundle, python=against.absolute()), "another interpreter (it is executable)"
    raise UsageError(
        f"{str(against)!r} is neither a bundle, nor a directory with an rx_edge/, nor an "
        "interpreter; name one of these"
    )


def measure_pairs(
    a: Side,
    b: Side,
    pairs: int,
    *,
    tick: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[Blocks, Blocks]:
    """Blocks of both sides, interleaved.

    Args:
        tick: called after every block with its side, its number and how many there are.

    Raises:
        RxEdgeError: a block failed; the message holds its last line.
    """
    found: dict[str, list[dict[str, Any]]] = {"A": [], "B": []}
    sides = {"A": a, "B": b}
    order = [name for pair in range(pairs) for name in ("BA" if pair % 2 else "AB")]
    for number, name in enumerate(order, 1):
        found[name].append(run_block(sides[name], name))
        tick(name, number, len(order))
    run = uuid.uuid4().hex
    return document(found["A"], "A", run), document(found["B"], "B", run)


def joined(first: Blocks, more: Blocks) -> Blocks:
    """One document of both; they were measured one after the other."""
    return {**first, "blocks": [*first["blocks"], *more["blocks"]]}


def measure_blocks(
    side: Side, count: int, *, tick: Callable[[str, int, int], None] = lambda *_: None
) -> Blocks:
    """Blocks of one side alone, for a file that is compared later."""
    blocks = []
    for number in range(1, count + 1):
        blocks.append(run_block(side, "A"))
        tick("A", number, count)
    return document(blocks, "A", uuid.uuid4().hex)


def run_block(side: Side, name: str) -> dict[str, Any]:
    """One fresh process; its JSON.

    Raises:
        UsageError, BundleError: as the block's exit code says.
        BackendError: it failed, hung, or wrote something else.
    """
    # -P: the directory of block.py must not come first, it holds a module named `statistics`
    command = [str(side.python), "-P", block.__file__, str(side.bundle), *side.options]
    try:
        done = subprocess.run(
            command,
            env=_environment(side),
            capture_output=True,
            text=True,
            check=False,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(
            f"a block of side {name} took more than {LONGEST:.0f} s; use a smaller study"
        ) from error
    except OSError as error:
        raise BackendError(f"{str(side.python)!r} does not start: {error.strerror}") from error
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        lines = done.stderr.strip().splitlines() or ["no message"]
        kind: type[RxEdgeError] = {2: UsageError, 3: BundleError}.get(done.returncode, BackendError)
        raise kind(
            f"a block of side {name} failed: {lines[-1].removeprefix('rx-edge: ')}"
        ) from error
    return found


def document(blocks: Sequence[dict[str, Any]], side: str, run: str) -> Blocks:
    """The file format: blocks of one side, and the machine.

    Args:
        run: what both sides of one interleaved run share; block i of A then pairs with i of B.
    """
    return {
        "schema": SCHEMA,
        "run": run,
        "side": side,
        "fingerprint": fingerprint(),
        "environment": environment(),
        "blocks": list(blocks),
    }


def _environment(side: Side) -> dict[str, str]:
    import rx_edge

    source = side.source
    if source is None and side.python == Path(sys.executable):
        source = Path(rx_edge.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(source or ""), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **({"PYTHONPATH": path} if path else {}), **side.environment}
