"""Studies are read in processes of their own, ahead of the workers that draft.

Codecs hold Python's lock while they decode, so that a thread would stop the drafts. And a file
that crashes its codec, or never ends, costs its own study and not the list.

A process gets the bundle's recipe, then one JSON line of paths per study; it answers with one JSON
line and the float32 bytes of `StudyImages.pixels`. Nothing is unpickled, an indication never gets
there, and what a codec prints is dropped, since it may quote the file.

Does not cover: what reading is (`reading.py`), drafting (`worklist.py`).
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from rx_edge import errors
from rx_edge.closing import Closing
from rx_edge.config import ImageRecipe, PromptConfig
from rx_edge.config_io import from_mapping, to_mapping
from rx_edge.errors import BackendError, InputError, RxEdgeError
from rx_edge.runtime.reading import StudyImages, read_images
from rx_edge.types import StudyInput

PATIENCE = 120.0  # seconds for one study; a damaged JPEG-LS stream takes its codec 8
AHEAD = 2  # studies per reader that may wait, read, for a worker
READY = b"ready\n"


class Source(Protocol):
    """Studies for whoever asks next."""

    @property
    def stopped(self) -> bool:
        """Whether nobody wants them any more."""
        ...

    def next(self) -> Waiting | None:
        """The next study; None when there is none left."""
        ...

    def stop(self) -> None:
        """Nobody wants them any more; calling it again does nothing."""
        ...


@dataclass(frozen=True)
class Waiting:
    """A study on its way to a worker, its number, and what reading it ahead gave, if it was."""

    index: int
    study: StudyInput
    images: StudyImages | None = None
    error: RxEdgeError | None = None


class ReadAhead:
    """A `Source` of the same studies, read; they come as they are ready."""

    def __init__(
        self, source: Source, prompt: PromptConfig, recipe: ImageRecipe, *, readers: int
    ) -> None:
        """Start `readers` processes, which begin to read at once."""
        self._source = source
        self._read: queue.Queue[Waiting | BaseException | None] = queue.Queue(readers * AHEAD)
        self._readers = [Reader(prompt, recipe) for _ in range(readers)]
        self._at_work, self._lock = readers, threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(one,), name="rx-edge-reader", daemon=True)
            for one in self._readers
        ]
        for thread in self._threads:
            thread.start()

    @property
    def stopped(self) -> bool:
        """Whether nobody wants the studies any more."""
        return self._source.stopped

    def next(self) -> Waiting | None:
        """The next study that was read.

        Raises:
            BackendError: no process could be started.
        """
        found = self._read.get()
        if isinstance(found, BaseException):
            raise found
        if found is None:
            self._read.put(None)  # the other workers must see the end, too
        return found

    def stop(self) -> None:
        """End the processes, whatever they read."""
        self._source.stop()
        for reader in self._readers:
            reader.stop()
        for thread in self._threads:
            while thread.is_alive():  # it may wait for room in the queue
                with suppress(queue.Empty):
                    self._read.get_nowait()
                thread.join(0.01)
        with suppress(queue.Full):  # for workers that still wait
            self._read.put_nowait(None)

    def _run(self, reader: Reader) -> None:
        try:
            while not self.stopped and (waiting := self._source.next()) is not None:
                self._read.put(_with_images(waiting, reader))
        except BaseException as error:
            if not self.stopped:
                self._read.put(error)
        finally:
            reader.close()
            with self._lock:
                self._at_work -= 1
                last = not self._at_work
            if last:
                self._read.put(None)


def _with_images(waiting: Waiting, reader: Reader) -> Waiting:
    try:
        images = reader.read(waiting.study.images)
    except (errors.UsageError, InputError) as error:
        return Waiting(waiting.index, waiting.study, error=error)
    return Waiting(waiting.index, waiting.study, images)


class Reader(Closing):
    """One process that reads one study after the other. It belongs to one thread at a time."""

    def __init__(
        self, prompt: PromptConfig, recipe: ImageRecipe, *, patience: float = PATIENCE
    ) -> None:
        """Start it; `patience`: seconds for one study."""
        settings = {"prompt": to_mapping(prompt), "image": to_mapping(recipe)}
        self._settings, self._patience = _line(settings), patience
        self._ready = False
        self._closed, self._late = threading.Event(), threading.Event()
        self._process = self._started()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def read(self, paths: Sequence[Path]) -> StudyImages:
        """The images of one study, as `read_images` reads them.

        Raises:
            UsageError, InputError: as `read_images`; or the process ended over this study twice,
                or took too long.
            BackendError: the process does not start, or closed.
        """
        if self._closed.is_set():
            raise BackendError("this reader is closed")
        try:
            header, pixels = self._in_time(paths)
        except InputError:
            if self._late.is_set():
                raise
            header, pixels = self._in_time(paths)  # perhaps memory was short, and no fault of it
        if "error" in header:
            raise _error(header)
        return StudyImages(
            pixels=pixels,
            flags=tuple(header["flags"]),
            pixel_sha256=tuple(header["pixel_sha256"]),
            source_format=header["source_format"],
            read_seconds=header["read_seconds"],
            prepare_seconds=header["prepare_seconds"],
        )

    def stop(self) -> None:
        """From any thread: give up what is read now. The process writes nothing that matters."""
        self._closed.set()
        self._process.kill()

    def close(self) -> None:
        """End the process."""
        self._closed.set()
        _end(self._process)

    def _in_time(self, paths: Sequence[Path]) -> tuple[dict[str, Any], Any]:
        """The answer's header and pixels.

        Raises:
            InputError: the process ended over it, or took too long; there is a new one.
        """
        self._late.clear()
        timer = threading.Timer(self._patience, self._give_up)
        timer.start()
        try:
            return self._asked(paths)
        except EOFError:
            raise self._ended(paths) from None
        finally:
            timer.cancel()

    def _started(self) -> subprocess.Popen[bytes]:
        # the same rx_edge, wherever it was imported from; -P: not what lies in this directory
        root, inherited = str(Path(errors.__file__).parents[1]), os.environ.get("PYTHONPATH")
        path = os.pathsep.join([root, inherited] if inherited else [root])
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rx_edge.runtime.read_ahead"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
            )
        except OSError as error:
            raise BackendError(
                f"a process to read studies cannot be started: {error.strerror}; use --readers 0"
            ) from error
        self._ready = False
        return process

    def _asked(self, paths: Sequence[Path]) -> tuple[dict[str, Any], Any]:
        """The answer's header and pixels.

        Raises:
            EOFError: the process ended.
        """
        asked, answers = _pipes(self._process)
        question = _line([str(path) for path in paths])
        with suppress(OSError):  # it ended: reading the answer finds that out
            asked.write(question if self._ready else self._settings + question)
            asked.flush()
        if not self._ready and answers.readline() != READY:
            raise BackendError("the process that reads studies does not start; use --readers 0")
        self._ready = True
        line = answers.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        header = json.loads(line)
        shape = header.get("shape", [0])
        size = 4 * int(np.prod(shape))
        raw = answers.read(size)
        if len(raw) < size:
            raise EOFError
        return header, np.frombuffer(raw, "<f4").reshape(shape).astype(np.float32)

    def _give_up(self) -> None:
        self._late.set()
        self._process.kill()

    def _ended(self, paths: Sequence[Path]) -> RxEdgeError:
        """Start another process; why this one ended."""
        if self._closed.is_set():
            return BackendError("this reader is closed")
        _end(self._process)
        code = self._process.returncode
        self._process = self._started()
        if self._closed.is_set():  # by another thread, which knew only the old one
            return BackendError("this reader is closed")
        late = f"took more than {self._patience:.0f} s"
        why = late if self._late.is_set() else f"ended its reader ({code})"
        return InputError(
            f"{str(paths[0])!r} {why}: damaged, or made to do harm; export it again from the PACS"
        )


def main() -> None:
    """Answer until the questions end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks decides about Ctrl-C
    _no_core_dump()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a codec prints must not get between the answers
    serve(sys.stdin.buffer, answers)


def serve(asked: IO[bytes], answers: IO[bytes]) -> None:
    """Answer every line of `asked` but the first, which holds the settings."""
    answers.write(READY)
    answers.flush()
    settings = json.loads(asked.readline() or b"{}")
    prompt = from_mapping(PromptConfig, settings.get("prompt", {}), where="prompt")
    recipe = from_mapping(ImageRecipe, settings.get("image", {}), where="image")
    for line in asked:
        try:
            found = read_images([Path(path) for path in json.loads(line)], prompt, recipe)
        except RxEdgeError as error:
            answers.write(_line({"error": type(error).__name__, "message": str(error)}))
        else:
            header = {name: value for name, value in vars(found).items() if name != "pixels"}
            answers.write(_line({**header, "shape": found.pixels.shape}))
            answers.write(np.ascontiguousarray(found.pixels, "<f4").data)
        answers.flush()


def _line(value: Any) -> bytes:
    return json.dumps(value).encode("ascii") + b"\n"


def _error(header: dict[str, Any]) -> RxEdgeError:
    kind = getattr(errors, header["error"], BackendError)
    found: RxEdgeError = kind(header["message"])
    return found


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin
    assert process.stdout
    return process.stdin, process.stdout


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in _pipes(process):
        with suppress(OSError):  # a question that was never read
            pipe.close()


def _no_core_dump() -> None:
    """A crash must not write pixels, or a patient's name, to the disk."""
    with suppress(ImportError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
