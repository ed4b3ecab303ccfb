"""Evaluations and comparisons as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evals.bootstrap import Comparison, ScorePair
from evals.calibration import AGREEMENT, SAID, TRUTH
from evals.kept import KeptEvaluation


def measure_label(measure: str) -> str:
    """What a person reads in place of a measure's name."""
    known = {"final_image": "final image", "first_sketch": "first image alone", "images": "images drawn"}
    return {**known, **CALIBRATION}.get(measure, measure)


CALIBRATION = {
    "approved_but_wrong_of_approved": "wrong, of approved",
    "approved_but_wrong_of_wrong": "approved, of wrong",
    "disturbed_but_right_of_disturbed": "right, of called wrong",
    "disturbed_but_right_of_right": "called wrong, of right",
    "agreement": "say what is so",
    "unreadable": "no verdict",
    "brier": "Brier score",
    "expected_calibration_error": "calibration error",
}


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

    calibration = kept.calibration
    if calibration is not None:
        said = Table()
        for name in ("critiques", "the image is right", "it is wrong"):
            said.add_column(name, justify="left" if name == "critiques" else "right", no_wrap=True)
        for row, says in zip(SAID, ('say "fine"', 'say "wrong"', "give no verdict"), strict=True):
            said.add_row(says, *(str(calibration.counts[f"{row}/{truth}"]) for truth in TRUTH))
        rates = Table()
        rates.add_column("calibration of the critiques", no_wrap=True)
        rates.add_column("", justify="right", no_wrap=True)
        for measure, value in calibration.measures.items():
            rates.add_row(measure_label(measure), f"{value:.3f}")

    # Beside the table, not its title and caption: those are folded to its width, and paths are long.
    console.print(Text(f"{kept.summary.get('weights') or kept.label}", style="italic"), soft_wrap=True)
    console.print(table)
    if calibration is not None:
        console.print(said)
        console.print(rates)
        readable = calibration.critiques - calibration.unreadable
        if calibration.scored < readable:
            console.print(
                Text(
                    f'P("fine") is known of {calibration.scored} of the {readable} verdicts; the Brier score and the '
                    f"expected calibration error are over those"
                ),
                soft_wrap=True,
            )
    unjudged = f", {kept.unjudged} of them without a score" if kept.unjudged else ""
    console.print(Text(f"{len(kept.prompts)} held-out prompts{many}{unjudged}; kept in {kept.folder}"), soft_wrap=True)


def print_comparison(
    console: Console,
    a: KeptEvaluation,
    b: KeptEvaluation,
    compared: Comparison,
    notes: Sequence[str] = (),
    calibration: Mapping[str, ScorePair] | None = None,
) -> None:
    """Two evaluations: scores, difference and its interval, by tag where there are tags; and how far their critiques
    can be trusted, where both were judged."""
    level = compared.score.interval.level
    many = f", {a.samples} answers each" if a.samples > 1 else ""
    table = _pairs_table("", level)

    def add(name: str, pair: ScorePair, style: str = "", lower_is_better: bool = False) -> None:
        interval = pair.interval
        sure = interval.low > 0 or interval.high < 0
        better = ("green" if (interval.difference > 0) is not lower_is_better else "red") if sure else ""
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
    tables = [table]
    if calibration:
        tables.append(table := _pairs_table("critiques", level))
        for measure, pair in calibration.items():
            add(measure_label(measure), pair, lower_is_better=measure != AGREEMENT)
    for line in (f"A: {a.folder}", f"B: {b.folder}"):
        console.print(Text(line, style="italic"), soft_wrap=True)
    for each in tables:
        console.print(each)
    for line in (f"{len(a.prompts)} held-out prompts{many}", *notes):
        console.print(Text(line), soft_wrap=True)


def _pairs_table(title: str, level: float) -> Table:
    """For scores of two evaluations and their difference."""
    table = Table()
    table.add_column(title, no_wrap=True)
    for name in ("A", "B", "B - A"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"{level:.0%} interval", justify="right")  # on a narrow terminal this one is folded
    return table
