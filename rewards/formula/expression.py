"""The recipe's formula over reward parts: arithmetic in which None stays None.

Anything computed from None is None, in comparisons and conditions too; `coalesce(x, d)` alone turns it into a number.
`and` and `or` stop at the operand that decides, as Python's do, but for that: None behind it makes them None.
The language is a whitelist on simpleeval: numbers, parts, schedules, + - * / ** %, comparisons, and/or/not,
`a if b else c`, min, max, abs, clip(x, low, high), coalesce(x, d), judged(x), and the functions over a group or a step
of groupwise.py.
"""

from __future__ import annotations

import ast
import copy
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from simpleeval import InvalidExpression, SimpleEval, safe_power

from rewards.formula import groupwise
from rewards.limits import LARGEST, too_large
from runtime.errors import UserError, nearest


class ExpressionError(UserError):
    """A formula that says nothing computable, or that meets values it cannot combine."""


def _strict(function: Callable[..., Any]) -> Callable[..., Any]:
    """None if any argument is None."""

    def or_none(*values: Any) -> Any:
        return None if any(value is None for value in values) else function(*values)

    return or_none


def _clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def _coalesce(x: Any, default: Any) -> Any:
    return default if x is None else x


# name -> (function, fewest arguments, most arguments or None)
FUNCTIONS: dict[str, tuple[Callable[..., Any], int, int | None]] = {
    "min": (_strict(min), 2, None),
    "max": (_strict(max), 2, None),
    "abs": (_strict(abs), 1, 1),
    "clip": (_strict(_clip), 3, 3),
    "coalesce": (_coalesce, 2, 2),
    "judged": (lambda x: x is not None, 1, 1),
}
# Those of groupwise.py take one expression; they are worked out for all rows before the rest of the formula is.
ALL_FUNCTIONS = (*FUNCTIONS, *groupwise.FUNCTIONS)
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: safe_power,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_NO_NUMBER = (ZeroDivisionError, OverflowError, InvalidExpression, TypeError)  # no value, or one past every bound


def _or_nan(function: Callable[..., Any]) -> Callable[..., Any]:
    def forgiving(*values: Any) -> Any:
        try:
            return function(*values)
        except _NO_NUMBER:
            return math.nan

    return forgiving


_FORGIVING = {kind: _strict(_or_nan(function)) for kind, function in _OPERATORS.items()}
MAX_DEPTH = 100  # of terms inside each other; Python's own reading of a formula recurses
_NODES = (ast.Expr, ast.Name, ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Call, ast.Constant)


class _Evaluator(SimpleEval):
    """simpleeval with fewer nodes, and with None that spreads through conditions."""

    def __init__(self) -> None:
        super().__init__(functions={name: function for name, (function, _, _) in FUNCTIONS.items()}, names={})
        self.operators: dict[type, Any] = {kind: _strict(function) for kind, function in _OPERATORS.items()}
        self.nodes: dict[type, Any] = {kind: handler for kind, handler in self.nodes.items() if kind in _NODES}

    def _eval_boolop(self, node: ast.BoolOp) -> Any:
        deciding = isinstance(node.op, ast.Or)
        for place, operand in enumerate(node.values):
            value = self._eval(operand)
            if value is None:
                return None
            if bool(value) is deciding:
                return None if any(self._is_none(rest) for rest in node.values[place + 1 :]) else deciding
        return not deciding

    def _is_none(self, node: ast.expr) -> bool:
        """Whether an operand that decides nothing rests on an unjudged part; what has no value in it is no matter."""
        operators, self.operators = self.operators, _FORGIVING
        try:
            return self._eval(node) is None
        except _NO_NUMBER:
            return False
        finally:
            self.operators = operators

    def _eval_compare(self, node: ast.Compare) -> Any:
        values = [self._eval(value) for value in (node.left, *node.comparators)]
        if any(value is None for value in values):
            return None
        pairs = zip(node.ops, values, values[1:], strict=False)
        return all(self.operators[type(op)](left, right) for op, left, right in pairs)

    def _eval_ifexp(self, node: ast.IfExp) -> Any:
        test = self._eval(node.test)
        return None if test is None else self._eval(node.body if test else node.orelse)


class _Aggregates(ast.NodeTransformer):
    """Takes the calls of groupwise functions out of a formula, innermost first; a name stands in for each."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[str, ast.expr]] = {}  # by the name: the function, and its argument

    def visit_Call(self, node: ast.Call) -> ast.expr:
        text = ast.unparse(node)
        self.generic_visit(node)
        function = node.func.id if isinstance(node.func, ast.Name) else ""
        if function not in groupwise.FUNCTIONS:
            return node
        self.calls[text] = function, node.args[0]
        return ast.Name(text, ast.Load())  # no part can be called that


class Expression:
    """A checked formula. Evaluating it changes nothing that shows; one thread at a time."""

    def __init__(
        self, text: str, known: Iterable[str], where: str = "rewards.total", withheld: Mapping[str, str] | None = None
    ) -> None:
        """`withheld`: names that exist and may not be used, each with the reason.

        Raises ExpressionError for bad syntax, a name outside `known`, or a construct outside the whitelist.
        """
        self.text, self.where = text.strip(), where
        known = list(known)
        try:
            with_line = ast.parse(self.text, mode="eval")
        except SyntaxError as error:
            raise ExpressionError(
                f"{where}: '{self.text}' is no formula: {error.msg} at column {error.offset}"
            ) from None
        except (RecursionError, MemoryError):  # before there is a tree whose depth could be measured
            raise self._too_deep() from None
        if _deeper(with_line, MAX_DEPTH):
            raise self._too_deep()
        functions: set[int] = set()
        for node in ast.walk(with_line):
            if isinstance(node, ast.Call):
                functions.add(id(node.func))
                self._check_call(node)
        for node in ast.walk(with_line):
            if isinstance(node, ast.Name) and id(node) not in functions and node.id not in known:
                if withheld and node.id in withheld:
                    raise ExpressionError(f"{where}: '{node.id}' {withheld[node.id]}")
                raise ExpressionError(f"{where}: no reward part '{node.id}'; {nearest(node.id, known)}")
            if isinstance(node, ast.expr) and not isinstance(node, _NODES):
                raise ExpressionError(
                    f"{where}: '{ast.unparse(node)}' is not allowed; a formula has numbers, parts, "
                    f"arithmetic, comparisons, conditions and {', '.join(FUNCTIONS)}"
                )
            if isinstance(node, ast.Constant) and not isinstance(node.value, int | float | None):
                raise ExpressionError(f"{where}: {node.value!r} is no number")
            if isinstance(node, ast.operator | ast.unaryop | ast.cmpop) and type(node) not in _OPERATORS:
                raise ExpressionError(
                    f"{where}: the operator {type(node).__name__} is not allowed; use + - * / % **, "
                    f"comparisons, and, or, not"
                )
        self.names = tuple(
            sorted(
                {node.id for node in ast.walk(with_line) if isinstance(node, ast.Name) and id(node) not in functions}
            )
        )
        self.tree: ast.expr = copy.deepcopy(with_line.body)  # as written
        aggregates = _Aggregates()
        self._tree = aggregates.visit(with_line.body)
        self._aggregates = aggregates.calls
        self._evaluator = _Evaluator()

    @property
    def groupwise(self) -> bool:
        """Whether a row's value depends on other rows."""
        return bool(self._aggregates)

    def _too_deep(self) -> ExpressionError:
        return ExpressionError(
            f"{self.where}: '{self.text[:40]} ...' has more than {MAX_DEPTH} terms inside each "
            f"other; write it shorter, or work a part of it out in a reward of your own"
        )

    def _check_call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        if name not in ALL_FUNCTIONS:
            raise ExpressionError(f"{self.where}: no function '{name}'; {nearest(name, ALL_FUNCTIONS)}")
        fewest, most = FUNCTIONS[name][1:] if name in FUNCTIONS else (1, 1)
        if node.keywords or len(node.args) < fewest or (most is not None and len(node.args) > most):
            wanted = f"{fewest}" if most == fewest else f"at least {fewest}"
            raise ExpressionError(f"{self.where}: '{ast.unparse(node)}': {name} takes {wanted} plain argument(s)")

    def __call__(self, parts: Mapping[str, float | None], row: str = "") -> float | None:
        """The value for one trajectory that is alone in its group; see `rows`."""
        return self.rows([parts], [[0]], [row])[0]

    def rows(
        self, parts: Sequence[Mapping[str, float | None]], groups: Sequence[Sequence[int]], names: Sequence[str] = ()
    ) -> list[float | None]:
        """The value for every trajectory of a step; None where it rests on an unjudged part.

        Args:
            parts: by trajectory, the values of the parts and schedules.
            groups: the rows of each group.
            names: of the trajectories, for the error.

        Raises ExpressionError where it divides by zero, leaves the finite numbers or is beyond LARGEST; what stands in
        a groupwise function is worked out for every row, also where a condition leaves its value unused.
        """
        names = names or [""] * len(parts)
        known = [dict(row) for row in parts]
        for text, (function, argument) in self._aggregates.items():
            values = [self._value(argument, row, name) for row, name in zip(known, names, strict=True)]
            for row, value in zip(known, self._over(text, function, values, groups), strict=True):
                row[text] = value
        totals = [self._value(self._tree, row, name) for row, name in zip(known, names, strict=True)]
        for total, row, name in zip(totals, known, names, strict=True):
            if total is not None and too_large(total):
                what = f"is {total:.3g}, beyond the {LARGEST:g} that can be trained on (in float32),"
                raise ExpressionError(self._fault(what, row, name))
        return totals

    def _over(
        self, text: str, function: str, values: Sequence[float | None], groups: Sequence[Sequence[int]]
    ) -> list[float | None]:
        """What a groupwise function makes of all rows."""
        try:
            results = groupwise.over(function, values, groups)
        except (OverflowError, ValueError):
            results = [math.inf]
        if any(result is not None and not math.isfinite(result) for result in results):
            there = [value for value in values if value is not None]
            raise ExpressionError(
                f"{self.where}: '{text}' leaves the finite numbers, over values from {min(there):.3g} to "
                f"{max(there):.3g}"
            )
        return results

    def _value(self, tree: ast.expr, parts: Mapping[str, float | None], row: str) -> float | None:
        self._evaluator.names = parts
        try:
            value = self._evaluator.eval(self.text, previously_parsed=tree)
            number = None if value is None else float(value)
        except ZeroDivisionError:
            raise ExpressionError(self._fault("divides by zero", parts, row)) from None
        except (OverflowError, InvalidExpression, TypeError):  # a complex power, or one past every bound
            raise ExpressionError(self._fault("leaves the finite numbers", parts, row)) from None
        if number is not None and not math.isfinite(number):
            raise ExpressionError(self._fault("leaves the finite numbers", parts, row))
        return number

    def _fault(self, what: str, parts: Mapping[str, float | None], row: str) -> str:
        known = [*self.names, *(text for text in self._aggregates if text in parts)]
        values = ", ".join(f"{name} = {parts[name]}" for name in known)
        return f"{self.where}: '{self.text}' {what}{f' for trajectory {row}' if row else ''} ({values})"


def _deeper(tree: ast.AST, limit: int) -> bool:
    level: list[ast.AST] = [tree]
    for _ in range(limit + 1):
        level = [child for node in level for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        if not level:
            return False
    return True
