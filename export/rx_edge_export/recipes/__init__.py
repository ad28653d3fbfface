"""Export recipes: what fits which machine. One TOML file = one `ExportConfig`.

Does not cover: whether a certain model fits (`plan.py` computes that for every export).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from rx_edge.config import ExportConfig
from rx_edge.config_io import load_toml, override
from rx_edge.errors import UsageError


def names() -> list[str]:
    """The recipes that come with rx-edge."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.toml"))


def load(recipe: str | None, overrides: Sequence[str] = ()) -> ExportConfig:
    """The recipe of that name or file, or the defaults; `overrides` are "key=value".

    Raises:
        UsageError: neither a file nor a name; the nearest name is given.
        ConfigError: an unknown key or a wrong value.
    """
    if recipe is None:
        return override(ExportConfig(), overrides, where="export")
    path = Path(recipe)
    if not recipe.endswith(".toml"):
        if recipe not in names():
            near = difflib.get_close_matches(recipe, names(), n=1, cutoff=0.0)
            raise UsageError(
                f"--recipe {recipe!r}: no such recipe; did you mean {near[0]!r}? "
                f"valid: {', '.join(names())}, or a .toml file"
            )
        path = Path(__file__).parent / f"{recipe}.toml"
    return override(load_toml(path, ExportConfig), overrides, where=recipe)
