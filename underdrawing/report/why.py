"""Why the reward went up, as the page shows it: sentences, and a table with bars for each way of taking it apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evals.gains import Line
from underdrawing.why import Explanation
from underdrawing.why_tables import changed_in_words, label, tables_of

WIDTH, HEIGHT = 96, 14  # px, of a bar


@dataclass(frozen=True)
class Row:
    name: str
    before: str
    after: str
    gain: str
    interval: str
    sure: str  # up or down where the interval leaves out 0, else empty
    bar: str  # SVG
    whole: bool = False


@dataclass(frozen=True)
class Shown:
    title: str
    verb: str  # adds, or gain where no sum is made
    rows: Sequence[Row]


@dataclass(frozen=True)
class Why:
    """The section."""

    of: str
    verdict: Sequence[tuple[str, bool]]  # sentence, whether it is flagged
    tables: Sequence[Shown]
    changed: Sequence[str]


def why_of(found: Explanation) -> Why:
    """An explanation, for the template."""
    shown = []
    for title, lines, whole in tables_of(found):
        everything = [*lines, *([whole] if whole is not None else [])]
        scale = max(abs(x) for line in everything for x in (line.gain.low, line.gain.high, line.gain.difference))
        rows = [_row(line, scale, whole=line is whole) for line in everything]
        shown.append(Shown(title, "gain" if whole is None else "adds", rows))
    flagged = found.flagged
    return Why(
        f"From {found.of[0]} to {found.of[1]}",
        [(sentence, sentence in flagged) for sentence in found.verdict],
        shown,
        changed_in_words(found),
    )


def _row(line: Line, scale: float, whole: bool) -> Row:
    gain = line.gain
    ends = ["–" if value is None else f"{value:.3f}" for value in (line.before, line.after)]
    sure = "up" if gain.low > 0 else "down" if gain.high < 0 else ""
    interval = f"{gain.low:+.3f} to {gain.high:+.3f}"
    bar = _bar(line, scale or 1.0)
    return Row(label(line.name), ends[0], ends[1], f"{gain.difference:+.3f}", interval, sure, bar, whole)


def _bar(line: Line, scale: float) -> str:
    """From the middle to the gain, with its interval as a line."""

    def px(value: float) -> float:
        return WIDTH / 2 * (1 + value / scale)

    gain = line.gain
    left, right = sorted((px(0), px(gain.difference)))
    color = "var(--up)" if gain.difference > 0 else "var(--down)"
    middle, low, high = HEIGHT / 2, px(gain.low), px(gain.high)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="bar" role="img">'
        f'<rect x="{left:.1f}" y="3" width="{right - left:.1f}" height="{HEIGHT - 6}" fill="{color}" opacity=".55"/>'
        f'<line x1="{px(0):.1f}" x2="{px(0):.1f}" y1="0" y2="{HEIGHT}" stroke="var(--soft)"/>'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="var(--ink)"/></svg>'
    )
