"""Functions of the recipe's formula that see more than their row: its whole group, or the whole step.

`group_mean(x)` has one value for every member of a group, `batch_mean(x)` one for every trajectory of the step; x is
any expression, worked out row by row first. Rows where x is None are left out; where it is None for all there is no
value (but for count, which is 0). expression.py calls `over`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Number = float | None


def _std(x: Sequence[float]) -> float:
    mean = math.fsum(x) / len(x)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in x) / len(x))


def _share(x: Sequence[float]) -> float:
    return sum(bool(value) for value in x) / len(x)


# What a function makes of the values that are there (at least one), and how it is explained.
WHOLE: dict[str, tuple[Callable[[Sequence[float]], float], str]] = {
    "mean": (lambda x: math.fsum(x) / len(x), "mean"),
    "std": (_std, "standard deviation, divisor n"),
    "min": (min, "least"),
    "max": (max, "greatest"),
    "any": (lambda x: float(any(x)), "1 if any is true (not 0), else 0"),
    "all": (lambda x: float(all(x)), "1 if all are true (not 0), else 0"),
    "share": (_share, "share that is true (not 0)"),
}
OWN = {
    "rank": "share of the others that are lower, those that are equal counting half; alone: 0.5",
    "count": "how many there are",
}
NAMES = (*WHOLE, *OWN)
OVER = ("group", "batch")
FUNCTIONS = tuple(f"{scope}_{name}" for scope in OVER for name in NAMES)


def of_rows(name: str, values: Sequence[Number]) -> list[Number]:
    """One value a row: what `name` makes of the rows' values, in which None is left out.

    rank: (below + (equal - 1) / 2) / (n - 1) among the n values that are there; None for a row without one.
    """
    there = [float(value) for value in values if value is not None]
    if name == "count":
        return [float(len(there))] * len(values)
    if name == "rank":
        return [None if value is None else _rank(float(value), there) for value in values]
    result = WHOLE[name][0](there) if there else None
    return [result] * len(values)


def _rank(value: float, there: Sequence[float]) -> float:
    if len(there) < 2:
        return 0.5
    below, equal = sum(x < value for x in there), sum(x == value for x in there)
    return (below + (equal - 1) / 2) / (len(there) - 1)


def over(function: str, values: Sequence[Number], groups: Sequence[Sequence[int]]) -> list[Number]:
    """`function` ("group_mean" ...) over all rows of a step; `groups` has the rows of each group."""
    scope, _, name = function.partition("_")
    if scope == "batch":
        return of_rows(name, values)
    result: list[Number] = [None] * len(values)
    for rows in groups:
        for row, value in zip(rows, of_rows(name, [values[row] for row in rows]), strict=True):
            result[row] = value
    return result
