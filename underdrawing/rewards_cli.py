"""`underdrawing rewards list | explain | check | try`: the published rewards, one in full, a reward of one's own held
to the contract, and a recipe's reward tried on images or thoughts."""

from __future__ import annotations

import argparse
import inspect
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from runtime.errors import UserError
from runtime.paths import expand_options
from runtime.yaml_core import fault, load_yaml
from underdrawing.options import Number, Whole, expanded_path, object_path

SCOPES = {"row": "its own thought", "group": "its group", "batch": "the step"}


def add_parser(commands: Any) -> None:
    """Hang `rewards` with its own commands under the program's."""
    text = "the published rewards, and how one's own does"
    rewards = commands.add_parser("rewards", help=text, description=text)
    inner = rewards.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = inner.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    command("list", list_rewards, "every reward that a recipe can name: what it pays, what it looks at, what it needs")

    sub = command("explain", explain, "one reward in full: formula, source, inputs, options, variants")
    sub.add_argument("reward", type=object_path, help="a name from `rewards list`, or file.py:function")

    sub = command("check", check, "hold a reward of one's own to the contract, and say what is wrong")
    sub.add_argument("reward", type=object_path, help="file.py:function or package.module.function")
    sub.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="as in a part's options; YAML")
    sub.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an example of a column that its records have; YAML",
    )
    sub.add_argument("--factory", action="store_true", help="the function makes the reward, from the options")
    sub.add_argument("--completions", choices=("auto", "interleaved", "text", "strings"), default="auto")
    sub.add_argument("--scope", choices=tuple(SCOPES), help="what the recipe says of it")
    sub.add_argument("--timeout", type=Number(), default=20.0, metavar="S", help="seconds a call may take (default 20)")
    sub.add_argument(
        "--trajectories",
        type=expanded_path,
        metavar="FOLDER",
        help="stored ones to try it on, in place of eight made-up ones",
    )

    sub = command(
        "try",
        try_recipe,
        "judge images or stored thoughts by a recipe's reward: a table of its parts, "
        "and a page with what the detector sees",
    )
    sub.add_argument("recipe", type=expanded_path, help="a YAML recipe; shipped ones are under configs/")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides; values are YAML")
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--images",
        "--pictures",
        type=expanded_path,
        metavar="FOLDER",
        help="images in GenEval's layout: 00000/metadata.jsonl, 00000/samples/0000.png",
    )
    which.add_argument("--trajectories", type=expanded_path, metavar="FOLDER", help="stored thoughts")
    sub.add_argument(
        "--out",
        type=expanded_path,
        metavar="FILE",
        help="the page (default rewards.html in the folder of images, NAME-rewards.html beside stored thoughts); its "
        "rows stand beside it as .jsonl",
    )
    sub.add_argument("--most", type=Whole(1), default=60, help="images or thoughts on the page (default 60)")


# ---- list and explain -------------------------------------------------------------------------------------------


def list_rewards(options: argparse.Namespace) -> int:
    from rewards.registry import REWARDS

    table = _table()
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("what it pays", ratio=1)
    table.add_column("looks at", no_wrap=True)
    table.add_column("needs", no_wrap=True)
    for reward in REWARDS.values():
        needs = ["detector"] * reward.needs_detector + ["judge"] * reward.needs_judge
        table.add_row(reward.name, _plain(reward.formula), SCOPES[reward.scope], ", ".join(needs) or "–")
    console = _console()
    console.print(table)
    console.print(
        f"{len(REWARDS)} rewards. `underdrawing rewards explain NAME` says all of one; your own is "
        f"file.py:function (docs/rewards.md).",
        highlight=False,
    )
    return 0


def explain(options: argparse.Namespace) -> int:
    from rich.table import Table

    from rewards.loader import load_object
    from rewards.registry import REWARDS

    function = load_object(options.reward)
    own = REWARDS.get(options.reward)
    console = _console()
    console.print(f"[bold]{_plain(options.reward)}[/bold]")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    if own is not None:
        needs = ["a detector (rewards.detector)"] * own.needs_detector + ["a judge (rewards.judge)"] * own.needs_judge
        where = "in the driver" if own.runs_on == "driver" else "in a process of its own"
        for name, fact in (
            ("pays", own.formula),
            ("source", own.source),
            ("reads", own.inputs),
            ("variants", own.differs),
            ("needs", " and ".join(needs)),
            ("a value depends on", SCOPES[own.scope]),
            ("runs", where),
        ):
            if fact:
                facts.add_row(name, _plain(fact))
    source = inspect.unwrap(function)
    runs_on = inspect.getsourcefile(source) if inspect.isroutine(source) or inspect.isclass(source) else None
    if runs_on:
        facts.add_row("code", f"{_plain(_shorter(runs_on))}:{source.__name__}")
    console.print(facts)
    described = option_rows(function)
    if described:
        table = _table()
        for column in ("option", "default", "may be"):
            table.add_column(column, no_wrap=column != "may be")
        for row in described:
            table.add_row(*map(_plain, row))
        console.print()
        console.print(table)
    text = inspect.getdoc(function)
    if text:
        console.print()
        console.print(_plain(text), highlight=False)
    return 0


def option_rows(function: Any) -> list[tuple[str, str, str]]:
    """(option, default, what it may be) of the arguments that a recipe can set."""
    from rewards.contract import RESERVED

    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return []
    try:
        hints = typing.get_type_hints(inspect.unwrap(function))
    except Exception:  # names that only a type checker resolves
        hints = {}
    rows = []
    for name, parameter in parameters.items():
        if (
            name in RESERVED
            or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            or parameter.default is parameter.empty
        ):
            continue
        rows.append((name, repr(parameter.default), _may_be(hints.get(name))))
    return rows


def _may_be(hint: Any) -> str:
    if hint is None:
        return ""
    if typing.get_origin(hint) is Literal:
        return ", ".join(str(value) for value in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("collections.abc.", "")


# ---- check ------------------------------------------------------------------------------------------------------


def check(options: argparse.Namespace) -> int:
    from record.store import load_trajectories
    from rewards.check import check_reward

    trajectories = load_trajectories(options.trajectories) if options.trajectories else None
    found = check_reward(
        options.reward,
        options=_pairs(options.option, "--option"),
        factory=options.factory,
        completions=options.completions,
        columns=_pairs(options.column, "--column"),
        trajectories=trajectories,
        scope=options.scope,
        timeout_s=options.timeout,
    )
    console = _console()
    for value, trajectory in zip(found.values, found.trajectories, strict=False):
        console.print(f"  {_number(value):>12}  {_plain(trajectory)}", highlight=False)
    for problem in found.problems:
        console.print(f"[red]problem[/red]  {_plain(problem)}", highlight=False)
    for note in found.notes:
        console.print(f"[yellow]note[/yellow]     {_plain(note)}", highlight=False)
    verdict = "keeps the contract" if found.ok else f"has {len(found.problems)} problem(s)"
    console.print(f"[bold]{_plain(found.name)} {verdict}[/bold]", highlight=False)
    return 0 if found.ok else 2


def _pairs(given: Sequence[str], flag: str) -> dict[str, Any]:
    pairs = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"{flag} '{text}': write it as KEY=VALUE")
        try:
            pairs[key] = load_yaml(value)
        except yaml.YAMLError as error:
            raise UserError(f"{flag} '{text}': the value is {fault(error).removeprefix('line 1: ')}") from None
    return expand_options(pairs)


def _number(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{segment}: {number:.3g}" for segment, number in value.items()) + "}"
    return "None" if value is None else f"{value:.4g}"


# ---- try --------------------------------------------------------------------------------------------------------


def try_recipe(options: argparse.Namespace) -> int:
    from underdrawing.recipe import load_recipe
    from underdrawing.report.trial import write_trial
    from underdrawing.trial import try_on_images, try_on_thoughts

    recipe = load_recipe(options.recipe, options.overrides)
    page, rows = _page(options)
    if options.images is not None:
        trial, folder = try_on_images(recipe, options.images), options.images
    else:
        trial = try_on_thoughts(recipe, options.trajectories)
        folder = options.trajectories if options.trajectories.is_dir() else options.trajectories.parent
    trial.write_rows(rows)
    if trial.fault is not None:
        print(f"rows: {rows}")
        raise trial.fault
    count = len(trial.trajectories)
    what = "images" if options.images is not None else "thoughts"
    table = _table()
    table.add_column("part", no_wrap=True)
    for column in ("mean", "std", "least", "most", "not judged", "failed"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in trial.rows():
        if row.total:
            table.add_section()
        numbers = ["–" if n is None else f"{n:.3f}" for n in (row.mean, row.std, row.least, row.most)]
        name = f"{row.name} ({row.kind})" if row.kind else row.name
        table.add_row(f"[bold]{name}[/bold]" if row.total else name, *numbers, f"{row.none:.0%}", f"{row.failed:.0%}")
    console = _console()
    console.print(f"{_plain(str(options.recipe))} on {count} {what} of {_plain(str(folder))}", highlight=False)
    console.print(table)
    console.print(f"reward = {_plain(recipe.rewards.formula())}", highlight=False)
    write_trial(trial.page(options.most), page)
    print(f"report: {page}\nrows: {rows}")
    return 0


def _page(options: argparse.Namespace) -> tuple[Path, Path]:
    """Page and rows: in a folder of images, but beside stored trajectories, which hold nothing foreign.

    Raises StoreError for an --out that would lie in stored trajectories.
    """
    from record.store import check_beside

    if options.out is not None:
        page = options.out
    elif options.images is not None:
        page = options.images / "rewards.html"
    else:
        folder = options.trajectories if options.trajectories.name else options.trajectories.resolve()
        page = folder.parent / f"{folder.name}-rewards.html"
    rows = page.with_suffix(".jsonl")
    check_beside(page)
    check_beside(rows)
    return page, rows


def _table() -> Any:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False)


def _console() -> Any:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=120)  # a pipe has no width: 80 would break words


def _plain(text: str) -> str:
    """Brackets in formulas are no markup."""
    from rich.markup import escape

    return escape(text)


def _shorter(path: str) -> str:
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
