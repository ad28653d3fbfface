"""What a system must beat: one constant report, and the report of the most similar training image.

A constant report scores well wherever most reports are normal and alike (ROUGE-L .238 on
MIMIC-CXR, more than some published models), and a nearest neighbour needs no language model.
The third control, the system without its image, is made by the system itself (`rx_edge.evaluate`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from rx_edge.config import EvaluateConfig
from rx_edge.metrics.nlg import Tokens, rouge_l
from rx_edge.types import FloatArray

CANDIDATES = 200  # training reports compared with each other: 40,000 pairs, a second or two
TRAIN_LIMIT = EvaluateConfig().train_limit


def constant(ids: Sequence[str], reports: Sequence[Tokens]) -> int:
    """Index of the medoid: the training report with the best mean ROUGE-L against the others.

    At most `CANDIDATES` reports are compared, chosen by the hash of their id, so that neither
    the order of the file nor a seed matters; among equals the first by that hash wins.
    """
    order = sorted(range(len(ids)), key=lambda i: hashlib.sha256(ids[i].encode()).hexdigest())
    chosen = order[:CANDIDATES]
    scores = [sum(rouge_l(reports[j], reports[i]) for j in chosen if j != i) for i in chosen]
    return chosen[int(np.argmax(scores))]


def nearest(train: FloatArray, images: FloatArray) -> list[int]:
    """For each of `images` (B, D) the index of the row of `train` (M, D) with the best cosine."""
    similarity = _unit(images) @ _unit(train).T
    return [int(i) for i in similarity.argmax(1)]


def _unit(rows: FloatArray) -> FloatArray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    out: FloatArray = (rows / np.where(norms == 0.0, 1.0, norms)).astype(np.float32)
    return out
