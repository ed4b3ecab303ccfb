"""The command `underdrawing why`: an explanation of a gain as tables for a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evals.gains import Line
from evals.measures import FINAL_IMAGE, FIRST_SKETCH
from underdrawing.tables import measure_label
from underdrawing.why import Explanation, explain

Shown = tuple[str, Sequence[Line], Line | None]  # title, summands, their sum; None: no sum is made of them


def run_why(run: Path, start: str | None, end: str | None, as_json: bool) -> int:
    """Print the explanation, as tables or as one JSON object. Raises UserError as `explain`."""
    explained = explain(run, start, end)
    if as_json:
        print(json.dumps(explained.as_json()))
    else:
        print_explanation(Console(), explained)
    return 0


def tables_of(found: Explanation) -> list[Shown]:
    """Every way in which the gain was taken apart."""
    shown: list[Shown] = []
    if found.score is not None:
        shown.append(("held-out score by tag", found.tags, found.score))
    if found.by_image is not None:
        shown.append((found.by_image.name, found.by_image.lines, found.by_image.whole))
    shown += [(gain.name, gain.lines, gain.whole) for gain in found.parts]
    shown += [(f"'{gain.name}' by role", gain.lines, gain.whole) for gain in found.roles]
    if found.credited:
        shown.append(("credited by segment", found.credited, None))
    if found.watched:
        shown.append(("watched beside the reward", [each.line for each in found.watched], None))
    return shown


def changed_in_words(found: Explanation) -> list[str]:
    """A sentence for each measure whose prompts were counted."""
    return [
        f"{label(each.measure)}: {each.up} of {each.prompts} prompts gained ({each.gained:+.3f}), {each.down} lost "
        f"({each.lost:+.3f}), {each.same} stayed"
        for each in found.changed
    ]


def print_explanation(console: Console, found: Explanation) -> None:
    """The verdict in words, then the tables."""
    console.print(Text(f"{found.run}: from {found.of[0]} to {found.of[1]}", style="italic"), soft_wrap=True)
    for number, sentence in enumerate(found.verdict):
        console.print(Text(sentence, style="bold red" if sentence in found.flagged else "" if number else "bold"))
    for title, lines, whole in tables_of(found):
        print_lines(console, title, lines, whole)
    for sentence in (*changed_in_words(found), *found.notes):
        console.print(Text(sentence), soft_wrap=True)


def label(name: str) -> str:
    """A measure as a person reads it; a reward part may be called as a measure is, and keeps its name."""
    return measure_label(name) if name in (FINAL_IMAGE, FIRST_SKETCH) else name


def print_lines(console: Console, title: str, lines: Sequence[Line], whole: Line | None = None) -> None:
    level = (whole or lines[0]).gain.level
    table = Table()
    table.add_column(title, no_wrap=True)
    for name in ("from", "to", "adds" if whole is not None else "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"{level:.0%} interval", justify="right")  # on a narrow terminal this one is folded

    def add(line: Line, style: str = "") -> None:
        gain = line.gain
        sure = "green" if gain.low > 0 else "red" if gain.high < 0 else ""
        ends = ["–" if value is None else f"{value:.3f}" for value in (line.before, line.after)]
        table.add_row(
            label(line.name),
            *ends,
            Text(f"{gain.difference:+.3f}", style=sure),
            f"{gain.low:+.3f} to {gain.high:+.3f}",
            style=style,
        )

    for line in lines:
        add(line)
    if whole is not None:
        table.add_section()
        add(whole, "bold")
    console.print(table)
