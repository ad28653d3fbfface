"""Where the shared, never committed test data is: RX_EDGE_SHARED, else `<repo>/../shared`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(
    os.environ.get("RX_EDGE_SHARED") or Path(__file__).resolve().parents[1].parent / "shared"
)


def shared(relative: str) -> Path:
    """The path of `relative` under the shared folder; the calling test is skipped without it."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"shared data {relative!r} is absent: set RX_EDGE_SHARED")
    return path
