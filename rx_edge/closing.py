"""A context manager whose exit is `close()`: for everything that holds a file or an engine."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Closing:
    """`with` closes it."""

    def close(self) -> None:
        """Free what is held; calling it again does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
