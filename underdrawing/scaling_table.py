"""Test-time scaling as tables for a terminal: the score of every arm at every budget, and arms at equal cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

TITLES = {
    "rounds": ("one thought, so many rounds", "round", "rounds"),
    "samples": ("the best of so many thoughts", "sample", "samples"),
}
LABEL = 20  # letters of an arm's label in a line, at least
WIDE = 112  # columns of a terminal in which score and interval, tokens and pictures stand side by side
LIMITS = {"": "", "dearer": "*", "all": "+"}


def print_scaling(console: Console, content: Mapping[str, Any], folder: Path) -> None:
    """scaling.json: a table of rounds, one of best-of-n, and one of both at equal cost."""
    for over in TITLES:
        points = [point for point in content["points"] if point["over"] == over]
        if points:
            console.print(_scores(over, points, console.width < WIDE))
    if content["equal_cost"]:
        table = _equal_cost(content, console.width < WIDE)
        if table is not None:
            console.print(table)
    passes = content["passes"].items()
    speed = ", ".join(
        f"{1000 * values['seconds'] / values['tokens']:.2f} ({name.replace('_', ' ')})"
        for name, values in passes
        if values["tokens"]
    )
    lines = [
        f"{content['judged']} of {content['prompts']} held-out prompts have a score under every arm; ± is half of the "
        "95% interval over prompts",
        f"seconds of the engine for 1000 tokens, of its whole call: {speed}",
        *content["notes"],
        f"kept in {folder}: scaling.json, scaling.svg, scaling.jsonl",
    ]
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _scores(over: str, points: Sequence[Mapping[str, Any]], narrow: bool) -> Table:
    title, one, many = TITLES[over]
    budgets = sorted({point["budget"] for point in points})
    table = Table()
    table.add_column(title, min_width=LABEL)
    for budget in budgets:
        table.add_column(f"{budget} {one if budget == 1 else many}", justify="right", no_wrap=True)
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = {}
    for point in points:
        by_arm.setdefault(point["arm"], {})[point["budget"]] = point
    for found in by_arm.values():
        label = next(iter(found.values()))["label"]
        table.add_row(Text(label), *(_cell(found[budget], narrow) for budget in budgets))
    return table


def _cell(point: Mapping[str, Any], narrow: bool) -> Text:
    """Score, half of its interval, and what it costs; colored where it differs from one first picture for sure."""
    style = "green" if point["gain_low"] > 0 else "red" if point["gain_high"] < 0 else ""
    half = (point["high"] - point["low"]) / 2
    apart = "\n" if narrow else " "
    cost = f"{point['tokens']:.0f} tok{apart}{point['pictures']:.1f} pic"
    return Text.assemble((f"{point['score']:.3f}", f"bold {style}"), f"{apart}±{half:.3f}\n", (cost, "dim"))


def _equal_cost(content: Mapping[str, Any], narrow: bool) -> Table | None:
    """The arms of rounds at the largest number of them; None: there is only one round."""
    rounds = max(match["rounds"] for match in content["equal_cost"])
    if rounds == 1:
        return None
    label = {point["arm"]: point["label"] for point in content["points"]}
    chosen = [match for match in content["equal_cost"] if match["rounds"] == rounds]
    costs = list(dict.fromkeys(match["cost"] for match in chosen))
    table = Table(caption=_caption(chosen), caption_justify="left")
    table.add_column(f"{rounds} rounds less the best of n at equal cost")
    for cost in costs:
        table.add_column(f"by {cost}", justify="right", no_wrap=True)
    by_pair: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for match in chosen:
        by_pair.setdefault((match["arm"], match["rival"]), {})[match["cost"]] = match
    last = ""
    for (arm, rival), found in by_pair.items():
        if arm != last:
            table.add_section()
            table.add_row(Text(label[arm], "bold"))
            last = arm
        table.add_row(Text(f"  {label[rival]}"), *(_difference(found[cost], narrow) for cost in costs))
    return table


def _difference(match: Mapping[str, Any], narrow: bool) -> Text:
    style = "green" if match["low"] > 0 else "red" if match["high"] < 0 else ""
    half = (match["high"] - match["low"]) / 2
    return Text.assemble(
        (f"{match['difference']:+.3f}", style),
        (f" ±{half:.3f}", "dim"),
        f"{chr(10) if narrow else '  '}n={match['n']}{LIMITS[match['limit']]}".ljust(0 if narrow else 7),
    )


def _caption(matches: Sequence[Mapping[str, Any]]) -> str | None:
    said = {
        "dearer": "* one sample costs more already",
        "all": "+ it costs more than all samples that there are: raise scaling.samples",
    }
    found = [text for limit, text in said.items() if any(match["limit"] == limit for match in matches)]
    return "; ".join(found) or None
