"""How a recipe makes its reward, for a person to read: every part, then the formula. `--dry-run` prints it."""

from __future__ import annotations

import ast
import io
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from rewards.config import ComponentConfig, RewardsConfig, WorkersConfig
from rewards.formula import groupwise
from rewards.registry import REWARDS

_SIGNS: dict[type, str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.USub: "minus",
    ast.UAdd: "plus",
    ast.Not: "not",
    ast.And: "and",
    ast.Or: "or",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
_SCOPES = {
    "row": "by its own trajectory, scored while others are sampled",
    "group": "by its group, scored while others are sampled",
    "batch": "by the whole step",
}


def lines(config: RewardsConfig, width: int = 118) -> list[str]:
    """The tree as plain text."""
    text = io.StringIO()
    Console(file=text, width=width, color_system=None, highlight=False).print(tree(config))
    return [line.rstrip() for line in text.getvalue().splitlines()]


def tree(config: RewardsConfig) -> Tree:
    """Parts with what they are, where they run and whether they are paid; then schedules, and the formula."""
    root = Tree(Text("rewards"))
    expression = config.expression()
    for name, part in config.parts.items():
        weighted = "log-only" if part.log_only else "weighted" if name in expression.names else "logged, not weighted"
        options = ", ".join(f"{key}={value!r}" for key, value in part.options.items())
        branch = root.add(Text(f"{name} [{weighted}] = {part.function}({options})"))
        for said in _about(part):
            branch.add(Text(said))
    if config.detector_workers is not None:
        root.add(Text(f"detector, for the parts in the driver: {_workers(config.detector_workers)}"))
    for name, schedule in config.schedules.items():
        root.add(Text(f"{name} [schedule] = {schedule.formula()}"))
    total = root.add(Text(f"reward = {config.formula()}"))
    _grow(total, expression.tree, config)
    return root


def _about(part: ComponentConfig) -> list[str]:
    own = REWARDS.get(part.function)
    said = [] if own is None else [own.formula, f"source: {own.source}"]
    said.append(_SCOPES[part.sees])
    limit = "60 s a call, more with a judge" if part.timeout_s is None else f"{part.timeout_s:g} s a call"
    patience = f"{limit}, then {part.retries} more, then None"
    if part.runs_on == "driver":
        said.append("in the driver")
    else:
        said.append(f"{_workers(part.workers or WorkersConfig())}; {patience}")
    return said


def _workers(workers: WorkersConfig) -> str:
    if workers.kind == "process":
        text = "in a process of its own" if workers.count == 1 else f"in {workers.count} processes of its own"
    else:
        each = f"{workers.num_cpus:g} CPU" + (f" and {workers.num_gpus:g} GPU" if workers.num_gpus else "")
        text = f"in {workers.count} Ray actor{'s' if workers.count > 1 else ''} of {each}"
    return text + (f", {workers.batch_size} at a time" if workers.batch_size else "")


def _grow(branch: Tree, node: ast.expr, config: RewardsConfig) -> None:
    label, children = _label(node, config)
    branch = branch.add(Text(label))
    for role, child in children:
        _grow(branch.add(Text(role)) if role else branch, child, config)


def _label(node: ast.expr, config: RewardsConfig) -> tuple[str, list[tuple[str, ast.expr]]]:
    """What a node is called, and its children, each with what it is to the node where that is not plain."""
    plain: list[Any]
    if isinstance(node, ast.BinOp):
        return _SIGNS[type(node.op)], [("", node.left), ("", node.right)]
    if isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        return _SIGNS[type(node.op)], [("", node.operand)]
    if isinstance(node, ast.BoolOp):
        return _SIGNS[type(node.op)], [("", value) for value in node.values]
    if isinstance(node, ast.Compare):
        plain = [node.left, *node.comparators]
        return " ".join(_SIGNS[type(op)] for op in node.ops), [("", value) for value in plain]
    if isinstance(node, ast.IfExp):
        return "if", [("", node.test), ("then", node.body), ("else", node.orelse)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _function(node.func.id), [("", value) for value in node.args]
    if isinstance(node, ast.Name):
        return f"{node.id}{' (schedule)' if node.id in config.schedules else ''}", []
    return ast.unparse(node), []


def _function(name: str) -> str:
    if name not in groupwise.FUNCTIONS:
        return name
    scope, _, what = name.partition("_")
    meaning = groupwise.WHOLE[what][1] if what in groupwise.WHOLE else groupwise.OWN[what]
    return f"{name}: over the {'group' if scope == 'group' else 'step'}, the {meaning}"
