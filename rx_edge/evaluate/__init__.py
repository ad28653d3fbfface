"""Score a training run or a bundle on a corpus: metrics, intervals, baselines, comparison.

A layer above `train`, `runtime` and `metrics`, because it needs all three. torch is reached only
by `run_system.py`, which is imported when a run is evaluated; a bundle never brings it.
"""
