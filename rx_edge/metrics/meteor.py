"""METEOR 1.5 as pycocoevalcap runs it: its own jar in a Java process, `-l en -norm`.

The jar gives 23 statistics a study that add up, and a score for any sum of them. So METEOR is a
function of sums over studies like every other metric here, and its intervals are exact.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from rx_edge.errors import BackendError
from rx_edge.metrics.bootstrap import Table
from rx_edge.metrics.nlg import Tokens
from rx_edge.optional import require

JAR = "meteor-1.5.jar"
_SEPARATOR = " ||| "
# columns of its statistics: words of draft and reference, matched words of both, and chunks
LENGTHS, MATCHES, CHUNKS = [0, 1], [21, 22], 20


def missing() -> str | None:
    """Why METEOR cannot be computed here, and what to do; None when it can."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return 'pycocoevalcap is not installed: pip install "rx-edge[eval]"'
    if shutil.which("java") is None:
        return "no `java` on the PATH: install a JRE, e.g. apt-get install default-jre-headless"
    return None


class Meteor:
    """A running METEOR; a context manager. One thread at a time."""

    def __init__(self) -> None:
        """Start the process: seconds, for its paraphrase table.

        Raises:
            MissingExtraError: pycocoevalcap is not installed.
            BackendError: Java does not start.
        """
        package = Path(str(require("pycocoevalcap.meteor.meteor", extra="eval").__file__)).parent
        try:
            self._java = subprocess.Popen(
                ["java", "-Xmx2G", "-jar", JAR, "-", "-", "-stdio", "-l", "en", "-norm"],
                cwd=package,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            raise BackendError(f"METEOR: java does not start ({error}); install a JRE") from error

    def sums(self, references: Sequence[Tokens], drafts: Sequence[Tokens]) -> Table:
        """The statistics of every study, (studies, 23).

        Raises:
            BackendError: the process ended.
        """
        rows = []
        for reference, draft in zip(references, drafts, strict=True):
            line = _SEPARATOR.join(("SCORE", _plain(reference), _plain(draft)))
            rows.append([float(v) for v in self._ask(line, 1)[0].split()])
        found = np.asarray(rows, np.float64)
        # the jar forgives the one chunk of a perfect draft, also when it adds studies up
        perfect = (found[:, CHUNKS] == 1.0) & (found[:, LENGTHS] == found[:, MATCHES]).all(1)
        found[perfect, CHUNKS] = 0.0
        return found

    def figure(self, sums: Table) -> Table:
        """METEOR in [0, 1] of each row of sums (R, 23) -> (R,)."""
        lines = (" ".join(str(v) for v in row) for row in sums.tolist())
        # it answers with a score a row, and one for all rows together
        found = self._ask(_SEPARATOR.join(("EVAL", *lines)), len(sums) + 1)
        return np.asarray([float(v) for v in found[:-1]], np.float64)

    def _ask(self, line: str, answers: int) -> list[str]:
        assert self._java.stdin is not None
        assert self._java.stdout is not None
        try:
            self._java.stdin.write(line + "\n")
            self._java.stdin.flush()
        except OSError as error:
            raise BackendError(f"METEOR: java ended ({error}); is 2 GB of memory free?") from error
        found = [self._java.stdout.readline().strip() for _ in range(answers)]
        if not found[-1]:
            raise BackendError("METEOR: java ended without an answer; is 2 GB of memory free?")
        return found

    def __enter__(self) -> Meteor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._java.kill()
        self._java.communicate()  # closes the pipes


def _plain(tokens: Tokens) -> str:
    """A report's tokens without what the line protocol would take for a separator."""
    return " ".join(t for t in tokens if "|||" not in t)
