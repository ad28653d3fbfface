"""Training recipes that come with rx-edge. One TOML file = one `TrainRecipe`.

Does not cover: reading one (`rx_edge.config_io`) and running it (`rx_edge.train.run`).
"""

from __future__ import annotations

import difflib
from pathlib import Path

from rx_edge.errors import UsageError


def names() -> list[str]:
    """The recipes that come with rx-edge."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.toml"))


def find(recipe: str) -> Path:
    """The file of a shipped recipe's name; what ends in .toml is a path already.

    Raises:
        UsageError: no such name; the nearest one and all others are given.
    """
    if recipe.endswith(".toml"):
        return Path(recipe)
    if recipe not in names():
        near = difflib.get_close_matches(recipe, names(), n=1, cutoff=0.0)
        raise UsageError(
            f"recipe {recipe!r}: no such recipe; did you mean {near[0]!r}? "
            f"valid: {', '.join(names())}, or a .toml file"
        )
    return Path(__file__).parent / f"{recipe}.toml"
