"""A latency gate inside a lab's own pytest run. Inert unless a test asks for `latency_gate`.

    def test_not_slower(latency_gate):
        latency_gate("bundle/", baseline="baselines/this-machine.json")

Tests that use the fixture get the marker `latency_gate`, so that `-m "not latency_gate"` leaves
them out. A regression and missing data fail the test with the table; a suspicion is shown and
passes.

This module is imported by every pytest run of an environment with rx-edge: nothing but pytest is
imported at its top, so that nothing becomes slower and coverage sees every import of `rx_edge`.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rx_edge_bench.gate import Result

NAME = "latency_gate"


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known, for `--strict-markers`."""
    config.addinivalue_line("markers", f"{NAME}: compares a bundle's latency (rx-edge); minutes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use the fixture."""
    for item in items:
        if NAME in getattr(item, "fixturenames", ()):
            item.add_marker(NAME)


@pytest.fixture
def latency_gate(request: pytest.FixtureRequest) -> Callable[..., Result]:
    """`latency_gate(bundle, baseline=..., against=...)`: see `rx_edge_bench.gate.gate_bundle`."""

    def check(bundle: str | PathLike[str], **arguments: Any) -> Result:
        from rx_edge.errors import RxEdgeError
        from rx_edge_bench.gate import gate_bundle

        paths = {n: Path(v) for n, v in arguments.items() if isinstance(v, str | PathLike)}
        try:
            result = gate_bundle(Path(bundle), **{**arguments, **paths})
        except RxEdgeError as error:
            pytest.fail(f"latency gate: {error}", pytrace=False)
        request.node.add_report_section("call", "latency gate", result.table())
        if result.verdict in ("regression", "insufficient data"):
            pytest.fail(result.table(), pytrace=False)
        return result

    return check
