"""The mutation suite: faults that ship wrong models elsewhere, planted one by one.

Every fault must be refused by a stage that names it, none by the accident of a crash. The table
of fault and stage is published in `export/README.md`; a test keeps the two equal.

Three ways to plant: into the exporter's code while it exports (`test_mutations_exporter.py`), into
a finished bundle whose manifest is made to agree, which is what a careless hand does
(`test_mutations_bundle.py`), and into the runtime's code (`test_mutations_runtime.py`). Faults of
two views and of the indication are in `test_two_views.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests.export import (
    test_mutations_bundle,
    test_mutations_exporter,
    test_mutations_runtime,
    test_two_views,
)

README = Path(__file__).resolve().parents[2] / "export" / "README.md"


def faults() -> Iterator[tuple[str, str]]:
    """Every fault of all tables, and the stage that catches it."""
    views = (test_two_views.IN_A_BUNDLE, test_two_views.IN_THE_RUNTIME)
    tables = (
        test_mutations_exporter.AT_EXPORT,
        test_mutations_bundle.IN_A_BUNDLE,
        test_mutations_runtime.IN_THE_RUNTIME,
    )
    for table in (*tables, *views):
        for fault, (_, stage) in table.items():
            yield fault, stage


def test_the_published_list_is_this_one() -> None:
    published = re.findall(r"^\| ([^|]+) \| `(\w+)` \|$", README.read_text("utf-8"), re.MULTILINE)
    assert len(published) >= 25
    assert sorted(published) == sorted(faults())
