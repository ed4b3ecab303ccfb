"""Whether a policy's verdicts on its own images are right: a reliability diagram and a confusion table for the page.

The diagram has P("fine") on the x-axis and the share of images that are right on the y-axis, one point a bin; a
calibrated policy's points lie on the diagonal. A point's area is the bin's share of the critiques (as in Guo et al.,
arXiv:1706.04599, figure 1, whose bars of counts are drawn as areas here).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evals.calibration import BRIER, CALIBRATION_ERROR, SAID, TRUTH, Calibration

SIDE, LEFT, BOTTOM, TOP, RIGHT = 300, 46, 40, 12, 14
LARGEST = 11.0  # px, radius of a bin that holds all critiques
SAYS = ('say "fine"', 'say "wrong"', "give no verdict")
ROWS = (
    ("approved_but_wrong_of_approved", "wrong, of those approved"),
    ("approved_but_wrong_of_wrong", "approved, of the wrong ones"),
    ("disturbed_but_right_of_disturbed", "right, of those called wrong"),
    ("disturbed_but_right_of_right", "called wrong, of the right ones"),
    ("agreement", "say what is so"),
    (BRIER, "Brier score"),
    (CALIBRATION_ERROR, "expected calibration error"),
)


@dataclass(frozen=True)
class Critiques:
    """What the page shows of the critiques of one or two evaluations."""

    diagram: str  # SVG; empty where no P("fine") is known
    labels: Sequence[str]
    colors: Sequence[str]
    counts: Sequence[tuple[str, Sequence[tuple[int, int]]]]  # what they say; by evaluation, of right and wrong images
    measures: Sequence[tuple[str, Sequence[str]]]  # by name; by evaluation


def critiques_of(found: Sequence[tuple[str, Calibration]]) -> Critiques | None:
    """Of evaluations by label, the earlier first. None: there are none."""
    if not found:
        return None
    colors = ("var(--before)", "var(--accent)")[-len(found) :]
    each = [calibration for _, calibration in found]
    return Critiques(
        reliability_diagram([(c, color) for c, color in zip(each, colors, strict=True) if c.scored]),
        [label for label, _ in found],
        colors,
        [
            (says, [(c.counts[f"{said}/{TRUTH[0]}"], c.counts[f"{said}/{TRUTH[1]}"]) for c in each])
            for said, says in zip(SAID, SAYS, strict=True)
        ],
        [
            (name, [f"{c.measures[measure]:.3f}" if measure in c.measures else "–" for c in each])
            for measure, name in ROWS
        ],
    )


def reliability_diagram(found: Sequence[tuple[Calibration, str]]) -> str:
    """An SVG of calibrations, each in its color. Empty string of none."""
    if not found:
        return ""
    width, height = SIDE - LEFT - RIGHT, SIDE - TOP - BOTTOM

    def px(x: float) -> float:
        return LEFT + x * width

    def py(y: float) -> float:
        return TOP + (1 - y) * height

    parts = [f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" class="chart">']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(
            f'<line x1="{LEFT}" x2="{SIDE - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}" class="grid"/>'
            f'<text x="{LEFT - 6}" y="{py(tick) + 3.5:.1f}" text-anchor="end">{tick:g}</text>'
            f'<text x="{px(tick):.1f}" y="{SIDE - BOTTOM + 15}" text-anchor="middle">{tick:g}</text>'
        )
    parts.append(
        f'<line x1="{px(0):.1f}" y1="{py(0):.1f}" x2="{px(1):.1f}" y2="{py(1):.1f}" '
        f'stroke="var(--soft)" stroke-dasharray="4 4"/>'
        f'<text x="{SIDE - RIGHT}" y="{SIDE - 7}" text-anchor="end">P("fine")</text>'
        f'<text transform="translate(11,{TOP + height / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"share of images that are right</text>"
    )
    for calibration, color in found:
        filled = [each for each in calibration.bins if each.critiques]
        line = " ".join(f"{px(each.p_fine):.1f},{py(each.right):.1f}" for each in filled)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        for each in filled:
            radius = max(2.0, LARGEST * math.sqrt(each.critiques / calibration.scored))
            parts.append(
                f'<circle cx="{px(each.p_fine):.1f}" cy="{py(each.right):.1f}" r="{radius:.1f}" fill="{color}" '
                f'fill-opacity=".75"><title>P("fine") {each.low:g} to {each.high:g}: {each.critiques} critiques, mean '
                f"{each.p_fine:.3f}, {each.right:.3f} of the images right</title></circle>"
            )
    return "".join([*parts, "</svg>"])
