"""transformers without telemetry, progress bars, chatter, or a network it was not asked for.

Everything in rx-edge that loads a Hugging Face model goes through `transformers()`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path
from typing import Any


def transformers() -> Any:
    """The transformers package, silenced. Environment set by the user wins."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    package = importlib.import_module("transformers")
    package.utils.logging.disable_progress_bar()
    package.utils.logging.set_verbosity_error()
    # peft 0.21 asks transformers 5 for an attribute that it renamed; nothing a user can act on
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    return package


def source(where: str) -> dict[str, Any]:
    """Arguments for `from_pretrained`: a directory never goes on line."""
    local = Path(where).is_dir()
    return {"pretrained_model_name_or_path": where, "local_files_only": local}
