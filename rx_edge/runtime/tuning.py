"""How fast is this machine? Threads and the cost of a pass, measured once and remembered.

The number of threads and the seconds of a pass per width (`drafting.py`) differ from machine to
machine and from precision to precision. `rx-edge tune` measures them for one language model; the
result is kept in the cache and read by every later session. Nothing here changes what is drafted:
without a profile, or with a wrong one, drafts are only slower.

Does not cover: vision (ONNX Runtime and TensorRT choose their own threads), latency (`bench`).
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rx_edge.atomic import replacing
from rx_edge.machine import cache_dir, cpu_model, physical_cores
from rx_edge.runtime.drafting import WIDTHS

if TYPE_CHECKING:
    from rx_edge.runtime.session import Session

VERSION = 1
PREFIX = 64  # tokens in the KV cache before a timed pass: a prompt's usual length
REPEATS = 5
NEARLY = 1.02  # more threads must be at least this much faster: fewer leave room for vision


@dataclass(frozen=True)
class Profile:
    """One language model on one machine.

    Attributes:
        threads: the fastest number for a pass over one token.
        pass_seconds: median seconds of a pass, by the number of tokens in it.
        by_threads: median seconds of a pass over one token, by threads.
    """

    threads: int
    pass_seconds: dict[int, float]
    by_threads: dict[int, float]


def stored(session: Session) -> Profile | None:
    """What was measured for this session's language model on this machine, or None."""
    try:
        raw = json.loads(_path(session).read_text(encoding="utf-8"))
        return Profile(
            int(raw["threads"]),
            {int(width): float(s) for width, s in raw["pass_seconds"].items()},
            {int(count): float(s) for count, s in raw["by_threads"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def measure(session: Session, tick: Callable[[str], None] = lambda _: None) -> Profile:
    """Time passes of every width, with every sensible number of threads, and remember them.

    Raises:
        BackendError: the engine failed.
        ExportError: the cache cannot be written.
    """
    by_threads: dict[int, float] = {}
    set_threads = getattr(session.language, "set_threads", None)
    threads = session.generate.threads or physical_cores()
    if set_threads and not session.generate.threads:
        for count in _candidates(physical_cores()):
            tick(f"{count} threads")
            set_threads(count)
            by_threads[count] = seconds_per_pass(session, 1)
        fastest = min(by_threads.values())
        threads = next(c for c, s in by_threads.items() if s <= fastest * NEARLY)
        set_threads(threads)
    pass_seconds = {}
    for width in WIDTHS:
        tick(f"{width} tokens per pass")
        pass_seconds[width] = seconds_per_pass(session, width)
    profile = Profile(threads, pass_seconds, by_threads)
    path = _path(session)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(asdict(profile), indent=1) + "\n", encoding="utf-8")
    apply(session, profile)
    return profile


def apply(session: Session, profile: Profile) -> None:
    """Use a profile in a session; threads only where the bundle and the user leave them open."""
    set_threads: Any = getattr(session.language, "set_threads", None)
    if set_threads and not session.generate.threads:
        set_threads(profile.threads)
    if session.drafter:
        for width, seconds in profile.pass_seconds.items():
            session.drafter.passed(width, seconds)


def _candidates(cores: int) -> list[int]:
    """1, 2, 4 ... and every core, ascending."""
    return sorted({2**power for power in range(cores.bit_length())} | {cores})


def seconds_per_pass(session: Session, width: int) -> float:
    """Median seconds of a pass over `width` tokens after a prompt; the first one is a warm-up."""
    language, ids = session.language, np.arange(PREFIX + width, dtype=np.int32)
    language.rewind(0)
    language.prefill([ids[:PREFIX]])
    taken = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        language.step(ids[PREFIX:])
        taken.append(time.perf_counter() - started)
        language.rewind(PREFIX)
    return statistics.median(taken[1:])


def _path(session: Session) -> Path:
    bundle, artifact = session.bundle, session.artifact
    key = {
        "version": VERSION,
        "file": bundle.manifest.files[artifact.file].sha256,
        "device": session.language.device,
        "cpu": cpu_model(),
        "cores": physical_cores(),
        "threads": session.generate.threads,
        "system": f"{platform.system()}-{platform.machine()}",
        "engine": session.language.version,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_dir() / "speed" / f"{name}.json"
