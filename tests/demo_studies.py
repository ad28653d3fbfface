"""Where the demo's DICOM studies are: RX_EDGE_DEMO_STUDIES, the data folder of `pydicom-data`.

pydicom's own look-up is not used because it downloads what it does not find.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def demo_study(name: str) -> Path:
    """The path of one study such as "RG1_UNCR.dcm"; the calling test is skipped without it."""
    folder = os.environ.get("RX_EDGE_DEMO_STUDIES")
    if not folder:
        pytest.skip("RX_EDGE_DEMO_STUDIES is not set: the folder of pydicom-data's *.dcm files")
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"RX_EDGE_DEMO_STUDIES holds no {name}")
    return path
