"""The training's own metrics in two windows of steps: what the trained reward gained, and by which part.

A line of metrics.jsonl has means over a step, not trajectories. So the formula is taken at the mean of each part over a
window, its difference is shared out by Shapley values (attribution.py), and what the mean reward moved beside that is a
summand of its own: 0 for a weighted sum of parts that are always judged; else what the formula makes of the spread
within a window, and of unjudged rows.

Intervals are percentiles over windows whose steps are drawn with replacement. Steps are not independent of one another,
so the intervals are rather too narrow than too wide.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evals.attribution import attribute
from evals.bootstrap import Interval
from evals.gains import SAME, Gain, Line
from rewards.formula.expression import Expression

REWARD = "reward/mean"
SPREAD = "spread and unjudged"
Rows = Sequence[Mapping[str, Any]]


def windows(rows: Rows, window: int, start: int | None = None, end: int | None = None) -> tuple[Rows, Rows] | None:
    """The first and the last `window` lines of the steps from `start` to `end`, both included; fewer where those are
    not twice as many. None: fewer than two lines each."""
    inside = [row for row in rows if (start is None or row["step"] >= start) and (end is None or row["step"] <= end)]
    size = min(window, len(inside) // 2)
    return (inside[:size], inside[-size:]) if size >= 2 else None


def metric_gain(name: str, before: Rows, after: Rows, label: str | None = None, resamples: int = 2000) -> Line | None:
    """The gain of a metric's mean; None where a window has fewer than two values of it."""
    sides = [np.array([row[name] for row in rows if row.get(name) is not None], float) for rows in (before, after)]
    if min(map(len, sides)) < 2:
        return None
    means = [side.mean() for side in sides]
    drawn = [_means(side, resamples, seed) for seed, side in enumerate(sides)]
    return Line(label or name, float(means[0]), float(means[1]), _interval(means[1] - means[0], drawn[1] - drawn[0]))


def part_gains(expression: Expression, before: Rows, after: Rows, resamples: int = 500) -> Gain | None:
    """The gain of reward/mean by the parts and schedules that the formula names. None: the metrics lack the reward, or
    a part of it.

    Raises ExpressionError where the formula has no value of the windows' means.
    """
    if metric_gain(REWARD, before, after) is None:
        return None
    metrics = {name: _metric_of(name, [*before, *after]) for name in expression.names}
    if any(metric is None for metric in metrics.values()):
        return None
    # Row 0 is the windows themselves, the others are resamples of their steps; all metrics of a step stay together.
    sides: list[list[dict[str, float | None]]] = []
    rewards_N = []
    for seed, rows in enumerate((before, after)):
        rng = np.random.default_rng(seed)
        picks = [range(len(rows)), *rng.integers(len(rows), size=(resamples, len(rows)))]
        columns = {n: np.array([_number(row.get(str(m))) for row in rows]) for n, m in metrics.items()}
        sides.append([{n: _mean(column[list(pick)]) for n, column in columns.items()} for pick in picks])
        reward = np.array([_number(row.get(REWARD)) for row in rows])
        rewards_N.append(np.array([_mean(reward[list(pick)]) for pick in picks], float))
    keep = [n for n in range(resamples + 1) if all(_known(side[n], expression) for side in sides)]
    if 0 not in keep:
        return None
    found = attribute(expression, [sides[0][n] for n in keep], [sides[1][n] for n in keep])
    difference_N = (rewards_N[1] - rewards_N[0])[keep]
    lines = [
        Line(name, sides[0][0][name], sides[1][0][name], _interval(values_N[0], values_N[1:]))
        for name, values_N in found.by_name.items()
    ]
    spread_N = difference_N - found.difference + found.rest
    if abs(spread_N[0]) > SAME:
        lines.append(Line(SPREAD, None, None, _interval(spread_N[0], spread_N[1:])))
    whole = Line("reward", rewards_N[0][0], rewards_N[1][0], _interval(difference_N[0], difference_N[1:]))
    return Gain("training reward by part", whole, sorted(lines, key=lambda each: -abs(each.gain.difference)))


def role_gains(before: Rows, after: Rows) -> list[Gain]:
    """For each part that credits segments: its gain by role, which reward/<part>/role/<role> logs."""
    by_part: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in (*before, *after) for name in row):
        match = re.fullmatch(r"reward/([^/]+)/role/([^/]+)", name)
        if match:
            by_part.setdefault(match[1], []).append(match[2])
    found = []
    for part, roles in by_part.items():
        # A role that a step's parts did not credit has no metric there, and a share of 0.
        sides = [[{**dict.fromkeys(roles, 0.0), **_shares(part, row)} for row in rows if _shares(part, row)]
                 for rows in (before, after)]  # fmt: skip
        whole = [[{"whole": math.fsum(row.values())} for row in rows] for rows in sides]
        lines = [metric_gain(role, sides[0], sides[1]) for role in sorted(roles)]
        total = metric_gain("whole", whole[0], whole[1], label=part)
        if total is not None:
            found.append(Gain(part, total, [line for line in lines if line is not None]))
    return found


def _shares(part: str, row: Mapping[str, Any]) -> dict[str, float]:
    prefix = f"reward/{part}/role/"
    return {name.removeprefix(prefix): float(v) for name, v in row.items() if name.startswith(prefix) and v is not None}


def _metric_of(name: str, rows: Rows) -> str | None:
    return next((m for m in (f"reward/{name}", f"reward/schedule/{name}") if any(m in row for row in rows)), None)


def _known(values: Mapping[str, float | None], expression: Expression) -> bool:
    return expression(values) is not None


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _mean(values: np.ndarray) -> float | None:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else None


def _means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(values, (resamples, len(values))).mean(1)


def _interval(value: float, drawn: np.ndarray, level: float = 0.95) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high), level)
