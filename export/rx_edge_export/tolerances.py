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

# length of the difference / length of the soft prompt (Euclidean, over all N x D numbers)
SOFT_PROMPT = {"fp32": 1e-4, "fp16": 5e-3, "int8": 0.15, "fp8": 0.2}
# | length of the soft prompt / length of the trained one - 1 |: a wrong scale is no noise
SOFT_PROMPT_SCALE = {"fp32": 1e-5, "fp16": 1e-3, "int8": 0.02, "fp8": 0.03}
# nats, KL(trained || bundle) after the prompt, the trained soft prompt given
PREFILL_KL = {
    "F32": 1e-5, "F16": 1e-4, "Q8_0": 1e-2, "Q6_K": 2e-2, "Q5_K_M": 0.05, "Q4_K_M": 0.2,
    "IQ4_NL": 0.3, "fp32": 1e-5, "fp16": 1e-4, "int8": 1e-2, "int4": 0.3,
}  # fmt: skip
# a greedy token may differ only where the trained model itself hardly prefers its own (logits)
TOKEN_MARGIN = {
    "F32": 0.05, "F16": 0.1, "Q8_0": 0.75, "Q6_K": 1.0, "Q5_K_M": 1.25, "Q4_K_M": 1.75,
    "IQ4_NL": 2.0, "fp32": 0.05, "fp16": 0.1, "int8": 0.75, "int4": 2.0,
}  # fmt: skip
# the same, where another vision artefact feeds the default language model, whose own allowance
# counts where it is larger
VISION_MARGIN = {"fp32": 0.05, "fp16": 0.1, "int8": 1.5, "fp8": 2.0}
# changed facts per study (negation, side, finding; each on its own), of at least 50 studies,
# where the trained model was not undecided itself (`verify_drafts.TIE`)
FACTS = {
    "F32": 0.0, "F16": 0.0, "Q8_0": 0.02, "Q6_K": 0.04, "Q5_K_M": 0.08, "Q4_K_M": 0.2,
    "IQ4_NL": 0.3, "fp32": 0.0, "fp16": 0.0, "int8": 0.1, "int4": 0.4, "fp8": 0.1,
}  # fmt: skip


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
