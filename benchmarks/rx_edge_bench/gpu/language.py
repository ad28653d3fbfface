"""The random model's language half as production runs it: prompt, tokens, verify passes, replay.

The prompt is a report's: text, 64 embeddings in the place of the image, text. The model's choice
is computed every time and then replaced, so that no text ends early.

`decode` runs token by token beside llama-bench's loop in the same process, in turns; `widths` times
one pass per number of tokens; `replay` accepts proposals as the demo model did in
`results/drafts-demo-cpu2.json`, through the product's own loop.

Does not cover: whether a 7B model would accept as many.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from rx_edge.backends import gguf_engine, gguf_gpu, llm_gguf
from rx_edge.backends.base import Segment
from rx_edge.backends.llm_gguf import GgufLanguage
from rx_edge.config import GenerateConfig
from rx_edge.errors import BackendError
from rx_edge.machine import physical_cores
from rx_edge.runtime.decoding import Draft, greedy
from rx_edge.runtime.decoding import decode as decode_draft
from rx_edge.runtime.drafting import WIDTHS, Drafter
from rx_edge.runtime.tuning import seconds_per_pass
from rx_edge.types import FloatArray, IntArray, Timings
from rx_edge_bench.gpu.artefacts import gguf
from rx_edge_bench.gpu.plan import Job, figure
from rx_edge_bench.latency import median, spread
from rx_edge_bench.peer_engines.base import random_ids
from rx_edge_bench.peer_engines.llama_common import Context
from rx_edge_bench.peer_engines.llama_raw import LlamaRaw
from rx_edge_bench.peer_engines.ours import NO_END
from rx_edge_bench.resources import roofline

if TYPE_CHECKING:
    from rx_edge.runtime.session import Session

POSITIONS, EMBEDDINGS = 89, 64  # of the demo model's prompt
TOKENS = 100
DRAFTS = Path(__file__).resolve().parents[2] / "results" / "drafts-demo-cpu2.json"

Accepted = tuple[int, int]  # tokens proposed in a pass, and how many of them came true


@dataclass(frozen=True)
class Written:
    """Seconds of one text, and its passes."""

    prefill: float
    first: float
    decode: float
    passes: int

    @property
    def total(self) -> float:
        """From the prompt to the last token."""
        return self.prefill + self.decode


class Llama(LlamaRaw):
    """llama-bench's loop on a file of ours, where the job runs."""

    def __init__(self, job: Job, path: Path) -> None:
        """Open it with llama.cpp's defaults.

        Raises:
            BackendError: llama.cpp refuses, or there is no room for it.
        """
        self._api = gguf_engine.engine()
        gpu = gguf_gpu.first(self._api) if job.gpu else None
        self._model = gguf_engine.load_model(self._api, path, gpu)
        n_ctx, threads = GenerateConfig().n_ctx, physical_cores()
        try:
            self._context = Context(self._api, self._model, n_ctx=n_ctx, threads=threads)
        except BaseException:
            self._api.llama_model_free(self._model)
            raise
        self._vocab = int(self._api.llama_vocab_n_tokens(self._context.vocab))


class Replayed(Drafter):
    """Proposes random tokens, of which as many come true as in a record, whatever the model says.

    Without a record left it proposes nothing: every pass is over one token.
    """

    def __init__(self, record: Iterable[Accepted], n_vocab: int) -> None:
        super().__init__(None, NO_END, 0)
        self._record, self._vocab = iter(record), n_vocab
        self._script: deque[int] = deque()
        self._drawn = np.random.default_rng(0)

    def propose(self, ids: Sequence[int], room: int) -> IntArray:
        """The next pass of the record, cut to a width that passes have."""
        proposed, accepted = next(self._record, (0, 0))
        proposed = max(w for w in WIDTHS if w <= min(proposed, room) + 1) - 1
        accepted = min(proposed, accepted)
        tokens: IntArray = self._drawn.integers(0, self._vocab, proposed + 1, dtype=np.int32)
        other = (int(tokens[accepted]) + 1) % self._vocab
        self._script = deque([*tokens[:accepted].tolist(), other])
        return tokens[:proposed]

    def __call__(self, logits: FloatArray) -> int:
        """Chooses as production does, and says what the record wants."""
        greedy(logits)
        return self._script.popleft() if self._script else 0


def decode(job: Job, precision: str) -> dict[str, Any]:
    """Prefill, time to the first token and decode speed, beside llama-bench's loop.

    Raises:
        BackendError: the file is missing, or does not run on the device.
    """
    path = gguf(job, precision)
    ours: list[Written] = []
    theirs: list[float] = []
    with ExitStack() as stack:
        language = stack.enter_context(opened(job, path))
        llama = _beside(job, path, stack)
        prompt, ids = segments(language), random_ids(POSITIONS, language.n_vocab, 0)
        for turn in range(job.repeats + 1):
            ours.append(write(language, prompt, Replayed((), language.n_vocab)))
            if isinstance(llama, Llama):
                theirs.append(llama.write(ids, TOKENS))
            if turn == 0:  # both have warmed up
                ours, theirs = [], []
        device = language.device
    ratio = spread([w.total / seconds for w, seconds in zip(ours, theirs, strict=False)])
    beside = f"{ratio['median']:.3f} of llama-bench's time" if theirs else "llama-bench: no"
    speed, bound = spread([w.passes / w.decode for w in ours]), _bound(job, path, ours)
    share = f"{100 * bound['share']:.0f} % of the bandwidth" if bound else "bandwidth unknown"
    return {
        "device": device, "positions": POSITIONS, "embeddings": EMBEDDINGS, "tokens": TOKENS,
        "prefill": spread([w.prefill for w in ours]),
        "time_to_first_token": spread([w.first for w in ours]),
        "tokens_per_second": speed,
        "report": spread([w.total for w in ours]),
        "llama_bench_report": spread(theirs) if theirs else {"unavailable": llama},
        "report_against_llama_bench": ratio,
        "roofline": bound,
        "line": f"{speed['median']:.1f} tok/s, {share}, {beside}",
    }  # fmt: skip


def _beside(job: Job, path: Path, stack: ExitStack) -> Llama | str:
    """llama-bench's loop beside ours, or why not: a card may hold one model and not two."""
    try:
        return stack.enter_context(Llama(job, path))
    except BackendError as error:
        return str(error)


def _bound(job: Job, path: Path, ours: Sequence[Written]) -> dict[str, float] | None:
    """The share of the measured bandwidth that decoding reaches; None where it is unknown."""
    bandwidth = figure(job, "ceilings", "bytes_per_second")
    if bandwidth is None:
        return None
    return roofline(read_bytes(path), median([w.decode / w.passes for w in ours]), bandwidth)


def widths(job: Job, precision: str) -> dict[str, Any]:
    """Seconds of one pass per number of tokens.

    Raises:
        BackendError: the file is missing, or does not run on the device.
    """
    with opened(job, gguf(job, precision)) as language:
        session = cast("Session", SimpleNamespace(language=language))
        seconds = {width: seconds_per_pass(session, width) for width in WIDTHS}
    relative = {width: s / seconds[1] for width, s in seconds.items()}
    return {
        "seconds": {str(width): s for width, s in seconds.items()},
        "relative": {str(width): r for width, r in relative.items()},
        "line": ", ".join(f"{width} tokens {r:.2f}x" for width, r in relative.items()),
    }


def replay(job: Job, precision: str) -> dict[str, Any]:
    """A report of `TOKENS` tokens with the demo model's acceptance, beside one without proposals.

    Raises:
        BackendError: the file or the record is missing, or the file does not run on the device.
    """
    passes = cycle(record())
    drafted: list[Written] = []
    plain: list[Written] = []
    with opened(job, gguf(job, precision)) as language:
        prompt = segments(language)
        for turn in range(job.repeats + 1):
            drafted.append(write(language, prompt, Replayed(passes, language.n_vocab)))
            plain.append(write(language, prompt, Replayed((), language.n_vocab)))
            if turn == 0:
                drafted, plain = [], []
    with_, without = (spread([w.total for w in side]) for side in (drafted, plain))
    tokens_per_pass = (TOKENS - 1) * len(drafted) / sum(w.passes for w in drafted)
    return {
        "record": f"results/{DRAFTS.name}: the demo model's acceptance, not a 7B model's",
        "tokens": TOKENS, "report": with_, "report_without": without,
        "tokens_per_pass": tokens_per_pass,
        "line": f"{TOKENS} tokens in {1e3 * with_['median']:.1f} ms, without proposals "
        f"{1e3 * without['median']:.1f} ms; {tokens_per_pass:.2f} tokens per pass",
    }  # fmt: skip


def record() -> list[Accepted]:
    """Every pass of the demo model over 220 real images, in a fixed random order.

    How many tokens each pass had proposed was not recorded, only their sum: every pass with
    proposals gets the mean, rounded up to a width, or the width that its accepted ones need. A pass
    that ended a draft counts as one that chose another token.

    Raises:
        BackendError: the record is not there.
    """
    try:
        work = json.loads(DRAFTS.read_text(encoding="utf-8"))["settings"]["all on"]["work"]
    except OSError as error:
        raise BackendError(f"{DRAFTS.name} is not here; run from a source checkout") from error
    accepted = [int(n) for n, times in work["accepted"].items() for _ in range(times)]
    passes = sum(int(n) * times for n, times in work["decode_passes"].items())
    usual = _proposals(work["drafted_tokens"] / len(accepted))
    found = [(max(usual, _proposals(a)), a) for a in accepted]
    found += [(0, 0)] * (passes - len(accepted))
    np.random.default_rng(0).shuffle(found)
    return [(int(proposed), int(taken)) for proposed, taken in found]


def _proposals(least: float) -> int:
    """Of the narrowest pass that holds so many."""
    return next(width - 1 for width in WIDTHS if width - 1 >= least)


def opened(job: Job, path: Path) -> GgufLanguage:
    """The production backend with its defaults, on the job's device."""
    return llm_gguf.open(path, n_ctx=GenerateConfig().n_ctx, threads=0, device=job.device)


def segments(language: GgufLanguage) -> list[Segment]:
    """A prompt of `POSITIONS`, `EMBEDDINGS` of which are soft."""
    drawn = np.random.default_rng(0)
    ids = np.asarray(random_ids(POSITIONS - EMBEDDINGS, language.n_vocab, 0), np.int32)
    soft = drawn.standard_normal((EMBEDDINGS, language.n_embd), np.float32)
    half = len(ids) // 2
    return [ids[:half], soft, ids[half:]]


def write(language: GgufLanguage, prompt: list[Segment], drafter: Replayed) -> Written:
    """One text of `TOKENS` tokens through the product's loop."""
    timings = Timings()
    growing = Draft(end=NO_END, limit=TOKENS, choose=drafter, drafter=drafter, timings=timings)
    started = time.perf_counter()
    language.rewind(0)
    logits = language.prefill(prompt)
    prefilled = time.perf_counter()
    stream: Iterator[object] = decode_draft(language, logits, growing, drafter)
    next(stream)
    first = time.perf_counter()
    deque(stream, maxlen=0)
    ended = time.perf_counter()
    if growing.finish != "length":
        raise BackendError(f"a text ended by {growing.finish!r} after {len(growing.ids)} tokens")
    return Written(prefilled - started, first - started, ended - prefilled, timings.decode_passes)


def read_bytes(path: Path) -> int:
    """Weights that a pass over one token reads: all but an embedding table of its own."""
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())
