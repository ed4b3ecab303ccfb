"""How large a reward may be, and means that survive numbers larger than that."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Gradients are sums of advantages times log-prob gradients, in float32, whose norm is taken from their squares: beyond
# this neither the squares nor their sums stay within float32's 3.4e38.
LARGEST = 1e18


def too_large(value: float) -> bool:
    """Whether a finite number is beyond what a reward may be."""
    return math.isfinite(value) and abs(value) > LARGEST


def mean_or_nan(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """The mean, weighted where `weights` are given and any is above 0; NaN where a value is no number or too large to
    be added up, or there is none. For what is logged and never paid."""
    if not values or any(not math.isfinite(value) or too_large(value) for value in values):
        return math.nan
    if weights is None or not math.fsum(weights):
        return math.fsum(values) / len(values)
    return math.fsum(w * value for w, value in zip(weights, values, strict=True)) / math.fsum(weights)
