"""What each part of a reward contributed to a difference of rewards: Shapley values, by trajectory, which add up.

The reward is a formula of parts, f(x). Of two answers to one prompt with the parts a and b, the contribution of part i
is the mean, over the orders in which the parts can be changed from a to b one after the other, of what the change of i
does to f (Shapley, Contributions to the Theory of Games II, 1953; for two settings of a function as in Lundberg and
Lee, arXiv:1705.07874, section 4, with the earlier setting as the one background). Contributions add up to f(b) - f(a).
Of a weighted sum they are weight times change; of a product of two, the change of each times the mean of the other.

Contributions are linear in f, so each term of a top-level sum is taken apart by itself: only parts that stand in one
term together need all of their subsets. Past LARGEST_TERM parts in one term a fixed sample of orders and their reverses
stands in for all orders (Castro et al., Computers & Operations Research 36, 2009); they add up all the same.

Letters: N rows, M names.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rewards.formula.expression import Expression, ExpressionError

LARGEST_TERM = 8  # parts of one term whose subsets are all worked out
ORDERS = 64  # sampled for a larger term, each with its reverse

Parts = Mapping[str, float | None]


@dataclass(frozen=True)
class Attribution:
    """Contributions to a difference of rewards.

    `by_name[name]` [N], and `rest` [N]: what no name can be given, because the formula has no value between the two
    settings (a condition on whether another part was judged). Their sum is `difference` [N].
    """

    by_name: Mapping[str, np.ndarray]
    rest: np.ndarray
    difference: np.ndarray


def attribute(
    expression: Expression,
    before: Sequence[Parts],
    after: Sequence[Parts],
    groups: Sequence[Sequence[int]] | None = None,
) -> Attribution:
    """The contribution of every name of a formula to f(after) - f(before), row by row.

    Args:
        before, after: by row, the values of parts and schedules; f has a value of both.
        groups: the rows of each group, for functions over groups, whose rows all change together; None: each row is a
            group.

    Raises:
        ExpressionError: f has no value of a row as it is.
    """
    count = len(before)
    groups = [[row] for row in range(count)] if groups is None else groups
    whole = [_values(expression, rows, groups) for rows in (before, after)]
    if any(value is None for values in whole for value in values):
        raise ExpressionError(f"{expression.where}: '{expression.text}' has no value of some rows, so no gain either")
    difference_N = np.array(whole[1], float) - np.array(whole[0], float)
    by_name = {name: np.zeros(count) for name in expression.names}
    for sign, term in _terms(expression.tree):
        part = Expression(ast.unparse(term), expression.names, expression.where)
        for name, values_N in _of_term(part, before, after, groups).items():
            by_name[name] += sign * values_N
    rest_N = difference_N - sum(by_name.values(), np.zeros(count))
    lost_N = ~np.isfinite(rest_N)
    for values_N in by_name.values():  # a row with a term that has no value between goes to the rest, whole
        values_N[lost_N] = 0.0
    rest_N[lost_N] = difference_N[lost_N]
    return Attribution(by_name, rest_N, difference_N)


def _terms(tree: ast.expr, sign: float = 1.0) -> list[tuple[float, ast.expr]]:
    """A sum as its signed terms."""
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add | ast.Sub):
        right = sign if isinstance(tree.op, ast.Add) else -sign
        return [*_terms(tree.left, sign), *_terms(tree.right, right)]
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return _terms(tree.operand, -sign)
    return [(sign, tree)]


def _of_term(
    term: Expression, before: Sequence[Parts], after: Sequence[Parts], groups: Sequence[Sequence[int]]
) -> dict[str, np.ndarray]:
    """By name [N]; NaN where the term has no value in a setting between."""
    names, known = term.names, {}
    if not term.groupwise:  # equal rows are worked out once
        keys = [tuple((a.get(name), b.get(name)) for name in names) for a, b in zip(before, after, strict=True)]
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        place = {key: number for number, key in enumerate(first)}
        before, after = [before[row] for row in first.values()], [after[row] for row in first.values()]
        groups = [[row] for row in range(len(before))]

    def at(changed: frozenset[str]) -> np.ndarray:
        if changed not in known:
            rows = [{n: (b if n in changed else a).get(n) for n in names} for a, b in zip(before, after, strict=True)]
            known[changed] = np.array([math.nan if v is None else v for v in _values(term, rows, groups)], float)
        return known[changed]

    found = _all_subsets(names, at) if len(names) <= LARGEST_TERM else _some_orders(names, at)
    return found if term.groupwise else {name: v[[place[key] for key in keys]] for name, v in found.items()}


def _all_subsets(names: Sequence[str], at: Callable[[frozenset[str]], np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for name in names:
        others = [other for other in names if other != name]
        total = np.zeros_like(at(frozenset()))
        for size in range(len(others) + 1):
            weight = math.factorial(size) * math.factorial(len(others) - size) / math.factorial(len(names))
            for subset in map(frozenset, combinations(others, size)):
                total = total + weight * (at(subset | {name}) - at(subset))
        found[name] = total
    return found


def _some_orders(names: Sequence[str], at: Callable[[frozenset[str]], np.ndarray]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {name: np.zeros_like(at(frozenset())) for name in names}
    for _ in range(ORDERS):
        order = [names[place] for place in rng.permutation(len(names))]
        for one in (order, order[::-1]):
            for place, name in enumerate(one):
                step = at(frozenset(one[: place + 1])) - at(frozenset(one[:place]))
                found[name] = found[name] + step / (2 * ORDERS)
    return found


def _values(expression: Expression, rows: Sequence[Parts], groups: Sequence[Sequence[int]]) -> Sequence[float | None]:
    """The formula of all rows; None where it has no value, be it for an unjudged part or a division by zero."""
    try:
        return expression.rows(rows, groups)
    except ExpressionError:
        if expression.groupwise:
            return [None] * len(rows)
    found: list[float | None] = []
    for row in rows:
        try:
            found.append(expression(row))
        except ExpressionError:
            found.append(None)
    return found
