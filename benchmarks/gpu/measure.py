"""Measure a GPU machine without a network, in pieces of a few minutes.

    python benchmarks/gpu/measure.py --out DIR [--small] [--budget SECONDS] [--only STEP ...]
        [--repeats N] [--pieces DIR]

Steps leave DIR/STEP.json; the same command goes on where the last one ended. Exit codes: 0 done, or
told what is left; 1 a step failed; 2 the request makes no sense here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run what is left of the measurement."""
    for folder in (SOURCES, SOURCES / "export", SOURCES / "benchmarks"):
        sys.path.insert(0, str(folder))  # nothing of this tree need be installed
    from rx_edge.errors import RxEdgeError, UsageError
    from rx_edge_bench.gpu import plan

    asked = _arguments([step.name for step in plan.STEPS])
    try:
        job = plan.plan(
            asked.out, small=asked.small, pieces=asked.pieces,
            repeats=asked.repeats or (3 if asked.small else 10),
        )  # fmt: skip
        return plan.measure(job, plan.chosen(asked.only), asked.budget, _say)
    except RxEdgeError as error:
        sys.stderr.write(f"measure.py: {error}\n")
        return 2 if isinstance(error, UsageError) else 1


def _arguments(steps: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="results, models and installed pieces")
    add("--small", action="store_true", help="a tiny geometry on whatever is here")
    add(
        "--budget",
        type=float,
        default=540,
        metavar="SECONDS",
        help="begin no step that does not fit",
    )
    add("--only", nargs="+", default=[], metavar="STEP", help=f"of: {', '.join(steps)}")
    add("--repeats", type=int, default=0, help="of everything timed; 0 = 10, or 3 with --small")
    add("--pieces", type=Path, help="directory of carried wheels, sdists and .tar.xz trees")
    return parser.parse_args()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
