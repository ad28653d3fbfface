"""The report-corpus draft index `drafts.bin`: which words usually come next in a report?

Radiology reports are formulaic. The index finds where the last tokens of a draft stand in the
training reports and proposes how those went on; the language model checks the proposal, so it
changes the speed of a draft and never its words.

**The file holds the text of training reports, as token ids.** Whoever has the bundle can read it:
it must come from de-identified reports only. `rx-edge export --drafts-from none` leaves it out.

Layout, little endian (as are all machines that rx-edge runs on):

    HEADER
    uint32 (E,)               positions in `text`, ordered by the DEPTH tokens from there on
    uint16|uint32 (E + 1,)    text: reports, a boundary (the largest number) before and after each

Does not cover: writing it (`rx_edge_export.drafts`), and checking proposals (`rx_edge.runtime`).
"""

from __future__ import annotations

import mmap
import struct
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rx_edge.bundle import DRAFTS, Bundle
from rx_edge.closing import Closing
from rx_edge.errors import BundleError

MAGIC = b"rxdrafts"
VERSION = 1
# magic, version, bytes per token, reports, tokens without boundaries, sha256 of tokenizer.json
HEADER = struct.Struct("<8sIIQQ32s")
DEPTH = 32  # tokens by which positions are ordered: context and proposal together
LONGEST = 8  # tokens of context that are looked up; longer ones hardly find more
_SAMPLE = 64  # matches looked at to find the most frequent next token
# Few matches of few tokens promise too much. On IU reports (R2Gen split, 588 test reports) a
# chance is on average 0.017 from the share that came true; without doubt 0.070.
_DOUBT = 3.0


@dataclass(frozen=True)
class Proposal:
    """Token ids that probably come next, and for each the chance that it does.

    A chance counts given that all ids before it were right. Both are empty, or equally long.
    """

    ids: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()


class DraftIndex(Closing):
    """A memory-mapped `drafts.bin`. Reading it needs no lock; many threads may propose.

    Attributes:
        tokenizer_sha256: of the tokenizer.json whose ids these are, in hexadecimal.
        n_reports: training reports in it.
        n_tokens: their tokens.
    """

    def __init__(self, buffer: mmap.mmap) -> None:
        _, _, width, self.n_reports, self.n_tokens, digest = HEADER.unpack_from(buffer)
        self.tokenizer_sha256: str = digest.hex()
        middle = HEADER.size + 4 * (self.n_reports + self.n_tokens)
        self._buffer = buffer
        text = memoryview(buffer)[middle:]
        self._order: memoryview[int] = memoryview(buffer)[HEADER.size : middle].cast("I")
        self._text: memoryview[int] = text.cast("H") if width == 2 else text.cast("I")
        self._boundary = boundary(width)

    @classmethod
    def open(cls, path: Path) -> DraftIndex:
        """Map the file; nothing but its header is read.

        Raises:
            BundleError: it cannot be read, is none, is damaged, or is newer than this code.
        """
        try:
            with path.open("rb") as stream:
                _check(path, stream.read(HEADER.size), path.stat().st_size)
                return cls(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            raise _refused(path, f"it cannot be read ({error.strerror})") from error

    def propose(self, context: Sequence[int], limit: int) -> Proposal:
        """How the reports went on after the longest end of `context` that is in them.

        Args:
            context: ids of the draft so far; empty = the report begins.
            limit: most ids wanted; about 24 can be had. A proposal ends with its report.
        """
        # the boundary as a token is none of the text's; -1 is nowhere
        tail = [-1 if t == self._boundary else int(t) for t in context[-LONGEST:]]
        if len(context) < LONGEST:
            tail.insert(0, self._boundary)
        for start in range(len(tail)):
            low, high = self._find(tail[start:])
            if low < high:
                return self._walk(low, high, len(tail) - start, limit)
        return Proposal()

    def close(self) -> None:
        """Give the mapping back; the index cannot be used any more."""
        self._order.release()
        self._text.release()
        self._buffer.close()

    def _find(self, pattern: list[int]) -> tuple[int, int]:
        """The part of the order whose positions begin with `pattern`."""
        text, length = self._text, len(pattern)

        def begins(position: int) -> list[int]:
            return text[position : position + length].tolist()

        low = bisect_left(self._order, pattern, key=begins)
        if low == len(self._order) or begins(self._order[low]) != pattern:
            return low, low
        return low, bisect_right(self._order, pattern, low, key=begins)

    def _walk(self, low: int, high: int, length: int, limit: int) -> Proposal:
        """Follow the most frequent next token of the matches, which all have `length` tokens."""
        text, order = self._text, self._order
        ids: list[int] = []
        chances: list[float] = []
        while len(ids) < limit and length < DEPTH:
            token, matches = text[order[low] + length], high - low
            if token != text[order[high - 1] + length]:  # sorted: else it is the same for all
                low, high = self._most(low, high, length)
                token = text[order[low] + length]
            if token == self._boundary:
                break
            ids.append(token)
            chances.append((high - low) / (matches + _DOUBT / length))
            length += 1
        return Proposal(tuple(ids), tuple(chances))

    def _most(self, low: int, high: int, length: int) -> tuple[int, int]:
        """The matches whose token after `length` tokens is the most frequent (of equals the
        smallest id); among many matches, of those that every n-th match shows."""
        text, order = self._text, self._order
        step = -(-(high - low) // _SAMPLE)
        seen = [text[p + length] for p in order[low:high:step]]
        counts = Counter(seen)  # in ascending order, as the matches are
        token = max(counts, key=counts.__getitem__)
        if step == 1:
            low += seen.index(token)
            return low, low + counts[token]

        def following(position: int) -> int:
            return text[position + length]

        low = bisect_left(order, token, low, high, key=following)
        return low, bisect_right(order, token, low, high, key=following)


def open_drafts(bundle: Bundle) -> DraftIndex | None:
    """The bundle's draft index; None when it has none.

    Raises:
        BundleError: the file is refused, or its ids are those of another tokenizer.
    """
    if bundle.drafts is None:
        return None
    index = DraftIndex.open(bundle.drafts)
    tokenizer = bundle.manifest.files[bundle.manifest.tokenizer].sha256
    if index.tokenizer_sha256 != tokenizer:
        index.close()
        raise _refused(
            bundle.drafts,
            f"its token ids are of tokenizer {index.tokenizer_sha256[:8]}..., "
            f"the bundle's is {tokenizer[:8]}...",
        )
    return index


def boundary(width: int) -> int:
    """What stands between reports where a token takes `width` bytes: no token's id."""
    return (1 << 8 * width) - 1


def size(n_reports: int, n_tokens: int, width: int) -> int:
    """Bytes of the file."""
    entries = n_reports + n_tokens
    return HEADER.size + 4 * entries + width * (entries + 1)


def _check(path: Path, head: bytes, found: int) -> None:
    if not head.startswith(MAGIC):
        raise _refused(path, "it is no draft index")
    if len(head) < HEADER.size:
        raise _refused(path, f"it ends after {len(head)} bytes")
    _, version, width, n_reports, n_tokens, _ = HEADER.unpack(head)
    if version != VERSION:
        raise _refused(path, f"its format is {version}, this rx-edge reads {VERSION}")
    if width not in (2, 4) or not n_reports:
        raise _refused(path, f"{n_reports} reports of {width}-byte tokens cannot be")
    wanted = size(n_reports, n_tokens, width)
    if found != wanted:
        raise _refused(path, f"it has {found} bytes, its header says {wanted}")


def _refused(path: Path, reason: str) -> BundleError:
    return BundleError(
        f"draft index {str(path)!r} is refused: {reason}; export the model again, "
        f"or with --drafts-from none for a bundle without {DRAFTS}"
    )
