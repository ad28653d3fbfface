"""OpenVINO GenAI in an interpreter of its own, which stays open between answers.

It may need other packages than rx-edge, so `RX_EDGE_OPENVINO_PYTHON` names a python that has
openvino-genai. Requests and answers are lines of JSON; the worker times itself, so that passing
them costs it nothing. It reads our GGUF, and takes no soft prompt: token ids only.

Does not cover: images; GPUs.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rx_edge.closing import Closing
from rx_edge.errors import BackendError
from rx_edge_bench.peer_engines.base import Job

VARIABLE = "RX_EDGE_OPENVINO_PYTHON"
TIMEOUT = 1800  # seconds for one answer: it converts the GGUF when it loads it
MARK = "rx-edge "  # what OpenVINO itself prints has no such start
_WORKER = """
import json, sys, time
asked = json.loads(sys.stdin.readline())
import numpy, openvino, openvino_genai
pipe = openvino_genai.LLMPipeline(asked["file"], "CPU", **asked["settings"])
def answer(what):
    sys.stdout.write("\\nrx-edge " + json.dumps(what) + "\\n")
    sys.stdout.flush()
answer({"version": openvino_genai.__version__})
for line in sys.stdin:
    asked = json.loads(line)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = asked["tokens"]
    config.do_sample = False
    config.apply_chat_template = False
    if asked["end"] is None:
        config.ignore_eos = True
    else:
        config.stop_token_ids = {asked["end"]}
        config.eos_token_id = asked["end"]
    tensor = openvino.Tensor(numpy.asarray([asked["ids"]], numpy.int64))
    started = time.perf_counter()
    found = pipe.generate(tensor, config)
    seconds = time.perf_counter() - started
    answer({"ids": [int(t) for t in found.tokens[0]], "seconds": seconds})
"""


def is_available() -> str | None:
    """None, or why it cannot run here."""
    if os.environ.get(VARIABLE):
        return None
    return (
        f"{VARIABLE} is not set: name the python of an environment with "
        "openvino-genai and openvino-tokenizers"
    )


class Worker(Closing):
    """The other interpreter with one GGUF loaded."""

    def __init__(self, file: Path, settings: Mapping[str, str]) -> None:
        """Start it.

        Raises:
            BackendError: it did not answer; the last line of its errors, without paths, says why.
        """
        self._file = str(file.resolve())
        # closed by `close`: it must outlive this call
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        try:
            self._process = subprocess.Popen(
                [os.environ.get(VARIABLE, ""), "-c", _WORKER],
                env={**variables, "DO_NOT_TRACK": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
            )
        except OSError as error:
            self._stderr.close()
            kind = type(error).__name__  # its text names the file
            raise BackendError(f"the interpreter of {VARIABLE} does not start: {kind}") from error
        try:
            self.version = str(
                self._ask({"file": self._file, "settings": dict(settings)})["version"]
            )
        except BaseException:
            self.close()
            raise

    def generate(
        self, ids: Sequence[int], tokens: int, *, end: int | None
    ) -> tuple[list[int], float]:
        """Greedy ids (at most `tokens`, the end token included) and the seconds they took.

        Args:
            end: the token that ends a text; None = write exactly `tokens` tokens.

        Raises:
            BackendError: it ended or gave no answer.
        """
        found = self._ask({"ids": list(ids), "tokens": tokens, "end": end})
        return found["ids"], found["seconds"]

    def close(self) -> None:
        """End it; idempotent."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream:
                with contextlib.suppress(BrokenPipeError):  # it ended with a request unread
                    stream.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(TIMEOUT, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith(MARK):
                    found: dict[str, Any] = json.loads(line.removeprefix(MARK))
                    return found
        except BrokenPipeError:
            pass  # it ended: its errors say why
        finally:
            timer.cancel()
        raise BackendError(f"OpenVINO GenAI ended: {self._last_error()}")

    def _last_error(self) -> str:
        self._process.wait()
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr if line.strip()] or ["no message"]
        return lines[-1].replace(self._file, Path(self._file).name)


class OpenVinoLanguage(Closing):
    """The language model with OpenVINO GenAI's defaults, 8-bit KV cache included."""

    def __init__(self, job: Job) -> None:
        """Load the GGUF there.

        Raises:
            BackendError: it does not start or cannot read the file.
        """
        threads = {"INFERENCE_NUM_THREADS": str(job.threads)}
        self._worker = Worker(job.llm, threads)
        self.weights = job.artifact.name
        self.settings: dict[str, Any] = {**threads, "version": self._worker.version}

    def write(self, prompt: Sequence[int], tokens: int) -> float:
        """Seconds for its own greedy text of `tokens` tokens."""
        ids, seconds = self._worker.generate(prompt, tokens, end=None)
        if len(ids) != tokens:
            raise BackendError(f"OpenVINO GenAI wrote {len(ids)} tokens; {tokens} were asked for")
        return seconds

    def close(self) -> None:
        """End the other interpreter."""
        self._worker.close()
