"""Evaluations and comparisons as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evals.bootstrap import Comparison, ScorePair
from evals.kept import KeptEvaluation


def measure_label(measure: str) -> str:
    """What a person reads in place of a measure's name."""
    return {"final_image": "final image", "first_sketch": "first image alone", "images": "images drawn"}.get(
        measure, measure
    )


def print_evaluation(console: Console, kept: KeptEvaluation) -> None:
    """One evaluation: a line a tag, the mean of the tags, and the first images alone."""
    many = f", {kept.samples} answers each" if kept.samples > 1 else ""
    table = Table()
    table.add_column("tag" if kept.by_tag else "")
    table.add_column("score", justify="right", no_wrap=True)
    for tag, score in kept.by_tag.items():
        table.add_row(tag, f"{score:.3f}")
    table.add_section()
    name = "mean of tags" if kept.by_tag else measure_label(kept.score_name)
    table.add_row(Text(name, "bold"), Text(f"{kept.score:.3f}", "bold"))
    for measure, mean in kept.means.items():
        if measure != kept.score_name:
            table.add_row(measure_label(measure), f"{mean:.3f}")

    # Beside the table, not its title and caption: those are folded to its width, and paths are long.
    console.print(Text(f"{kept.summary.get('weights') or kept.label}", style="italic"), soft_wrap=True)
    console.print(table)
    unjudged = f", {kept.unjudged} of them without a score" if kept.unjudged else ""
    console.print(Text(f"{len(kept.prompts)} held-out prompts{many}{unjudged}; kept in {kept.folder}"), soft_wrap=True)


def print_comparison(
    console: Console, a: KeptEvaluation, b: KeptEvaluation, compared: Comparison, notes: Sequence[str] = ()
) -> None:
    """Two evaluations: scores, difference and its interval, by tag where there are tags."""
    level = compared.score.interval.level
    many = f", {a.samples} answers each" if a.samples > 1 else ""
    table = Table()
    table.add_column("", no_wrap=True)
    for name in ("A", "B", "B - A"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"{level:.0%} interval", justify="right")  # on a narrow terminal this one is folded

    def add(name: str, pair: ScorePair, style: str = "") -> None:
        interval = pair.interval
        sure = interval.low > 0 or interval.high < 0
        better = ("green" if interval.difference > 0 else "red") if sure else ""
        table.add_row(
            name,
            f"{pair.a:.3f}",
            f"{pair.b:.3f}",
            Text(f"{interval.difference:+.3f}", style=better),
            f"{interval.low:+.3f} to {interval.high:+.3f}",
            style=style,
        )

    for tag, pair in compared.by_tag.items():
        add(tag, pair)
    table.add_section()
    add("mean of tags" if compared.by_tag else measure_label(compared.score_name), compared.score, "bold")
    for measure, pair in compared.others.items():
        add(measure_label(measure), pair)
    if compared.refinement is not None:
        add("what refining adds", compared.refinement)
    for line in (f"A: {a.folder}", f"B: {b.folder}"):
        console.print(Text(line, style="italic"), soft_wrap=True)
    console.print(table)
    for line in (f"{len(a.prompts)} held-out prompts{many}", *notes):
        console.print(Text(line), soft_wrap=True)
