"""What a stage reports: metrics.jsonl, one line a step, and TensorBoard where it is asked for.

metrics.jsonl is the truth; TensorBoard is a view of it and may lose its last seconds in a kill.

Does not cover: the progress display (the command line's).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rx_edge.atomic import replacing
from rx_edge.optional import require


class Log:
    """Writes steps of one stage; on resume, those after the checkpoint are cut: they run again.

    Args:
        step: of the checkpoint.
        board: directory for TensorBoard, or None.

    Raises:
        MissingExtraError: `board` is given and tensorboard is not installed.
    """

    def __init__(self, path: Path, step: int, board: Path | None = None) -> None:
        self.path = path
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
        # a kill can leave half a line; it has no newline
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        with replacing(path) as part:
            part.write_text("".join(kept), encoding="utf-8")
        self._board: Any = None
        if board is not None:
            require("tensorboard", extra="tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(board), purge_step=step + 1)

    def write(self, **values: Any) -> None:
        """One step; `step` and `stage` are among the values."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if name not in ("step", "stage"):
                    self._board.add_scalar(name, value, values["step"])

    def sync(self) -> None:
        """Make what was written survive a power cut: before a checkpoint that counts on it."""
        with self.path.open("rb") as stream:
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._board is not None:
            self._board.close()
