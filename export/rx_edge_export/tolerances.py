"""How far each precision may be from the fp32 model, per stage. The table of export/README.md.

Limits sit well above what faithful exports measure and well below what a fault does: see the
README for both figures. A precision without an entry cannot be verified, hence not shipped.
"""

from __future__ import annotations

from rx_edge.errors import ExportError

PIXELS = 1e-3  # max abs difference of the normalised tensor; one 8-bit grey level is 1.7e-2
MERGE = 1e-3  # max abs logit difference of merged and unmerged, relative to the largest logit
TOKENIZER = 0.0  # texts whose ids differ
ADAPTER = 0.2  # KL(trained || bundle) / KL(trained || base LM): 0 has the adapter, 1 lost it

SOFT_PROMPT = {"fp32": 1e-3}  # max abs difference relative to the largest number
PREFILL_KL = {"F32": 1e-5, "F16": 1e-4, "Q8_0": 3e-2}  # nats, KL(trained || bundle)
# a greedy token may differ only where the trained model itself hardly prefers its own (logits)
TOKEN_MARGIN = {"F32": 0.05, "F16": 0.1, "Q8_0": 0.75}


def limit(table: dict[str, float], precision: str) -> float:
    """The tolerance of `precision`.

    Raises:
        ExportError: the table has none.
    """
    if precision not in table:
        raise ExportError(
            f"no tolerance is defined for precision {precision!r}; valid: {', '.join(table)}"
        )
    return table[precision]
