"""Write the draft index `drafts.bin`: reports with every position in them, in sorted order.

Positions are ordered by the `DEPTH` tokens that follow and, where those are equal, by place: the
same reports give the same bytes. **The file holds the reports' text, as token ids.**

Does not cover: the layout and how it is read (`rx_edge.draft_index`), which reports go in
(`draft_corpus.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rx_edge.atomic import replacing
from rx_edge.draft_index import DEPTH, HEADER, MAGIC, VERSION, boundary
from rx_edge.errors import ExportError

Tokens = NDArray[np.uint32]


def write(out: Path, reports: Sequence[Tokens], tokenizer_sha256: str) -> dict[str, Any]:
    """Write the index of `reports`.

    Args:
        reports: ids (T,) each, the end token included where a report is complete.
        tokenizer_sha256: of the tokenizer.json whose ids these are, in hexadecimal.

    Returns:
        Numbers of reports and tokens.

    Raises:
        ExportError: no reports, more than the format can address, or `out` cannot be written.
    """
    if not reports:
        raise ExportError("a draft index needs reports; --drafts-from none leaves it out")
    width, tokens = token_width(reports), sum(len(r) for r in reports)
    if tokens + len(reports) >= 1 << 32:
        raise ExportError(f"{tokens} tokens are too many for a draft index; name fewer reports")
    text = np.full(tokens + len(reports) + 1, boundary(width), f"<u{width}")
    start = 1
    for report in reports:
        text[start : start + len(report)] = report
        start += len(report) + 1
    order = suffix_order(text, DEPTH)
    header = HEADER.pack(
        MAGIC, VERSION, width, len(reports), tokens, bytes.fromhex(tokenizer_sha256)
    )
    with replacing(out) as part, part.open("wb") as stream:
        stream.write(header)
        # the last boundary begins no report
        stream.write(order[order != len(text) - 1].astype("<u4").data)
        stream.write(text.data)
    return {"reports": len(reports), "tokens": tokens}


def token_width(reports: Sequence[Tokens]) -> int:
    """Bytes per token: 2 where no id needs more, the boundary's number included."""
    return 2 if max((int(r.max(initial=0)) for r in reports), default=0) < boundary(2) else 4


def suffix_order(text: NDArray[Any], depth: int) -> NDArray[np.int64]:
    """Positions of `text` (T,) ordered by `depth` tokens from there on, then by place.

    Doubling: what is ordered by n tokens is ordered by 2n when each position is ranked by its
    own rank and that of the position n further on. `depth` is a power of 2, at least 2.
    """
    rank = np.unique(text, return_inverse=True)[1].astype(np.int64)
    length = 1
    while True:
        key = rank * (int(rank.max()) + 2)
        key[:-length] += rank[length:] + 1  # what lies behind the end comes first
        order = np.argsort(key, kind="stable")
        length *= 2
        if length >= depth:
            return order
        key = key[order]
        rank[order[0]] = 0
        rank[order[1:]] = np.cumsum(key[1:] != key[:-1])
