"""Test-time scaling as one SVG: score against cost, a line an arm, a row a measure of cost, a column a way of choosing.

It stands by itself as a file and inside of the report, whose colors it takes there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from evals.kept import SCALING, KeptEvaluation
from runtime.errors import UserError
from underdrawing.report.charts import PALETTE, _number, _ticks

# (title, its arms: name, color, dash)
SOLID, DASHED, DOTTED = "", "5 3", "1.5 3"
COLUMNS: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "by the policy's own critique",
        (
            ("until_fine", PALETTE[0], SOLID),
            ("last_fine", PALETTE[3], SOLID),
            ("sketches/critique", PALETTE[1], DASHED),
            ("sketches/p_fine", PALETTE[4], DASHED),
            ("thoughts/critique", PALETTE[1], DOTTED),
            ("thoughts/p_fine", PALETTE[4], DOTTED),
        ),
    ),
    (
        "without choosing",
        (
            ("own_end", PALETTE[2], SOLID),
            ("always", PALETTE[5], SOLID),
            ("any_picture", PALETTE[7], SOLID),
            ("sketches/random", PALETTE[1], DASHED),
            ("thoughts/random", PALETTE[1], DOTTED),
        ),
    ),
    (
        "by the oracle, an upper bound",
        (
            ("best_picture", PALETTE[6], SOLID),
            ("sketches/oracle", PALETTE[1], DASHED),
            ("thoughts/oracle", PALETTE[1], DOTTED),
        ),
    ),
)
ROWS = (("tokens", "sampled tokens"), ("pictures", "pictures drawn"), ("seconds", "seconds of the engine"))
PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP, GAP, BOTTOM = 318, 176, 40, 24, 18, 34
LEGEND_LINE = 15
STYLE = (
    ".scaling-plot { font: 10.5px/1 system-ui, sans-serif; } .scaling-plot text { fill: var(--soft, #6a717a); } "
    ".scaling-plot .title { font-size: 12px; font-weight: 600; fill: var(--ink, #22262b); } "
    ".scaling-plot .grid { stroke: var(--line, #dfdcd4); }"
)


def plot_of(folder: Path) -> str:
    """The plot of an evaluation's folder; empty where no scaling was measured.

    Raises UserError where scaling.json is cut or altered.
    """
    content = KeptEvaluation(folder, (), {}).scaling()
    try:
        return "" if content is None else plot(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder / SCALING}: cannot be read, it may be cut or altered ({error!r}); remove it, and the report does "
            "without its plot"
        ) from None


def plot(content: Mapping[str, Any]) -> str:
    """scaling.json to an SVG."""
    points: dict[str, list[Mapping[str, Any]]] = {}
    for point in content["points"]:
        points.setdefault(point["arm"], []).append(point)
    columns = [(title, [arm for arm in arms if arm[0] in points]) for title, arms in COLUMNS]
    columns = [(title, arms) for title, arms in columns if arms]
    ends = [point[end] for point in content["points"] for end in ("low", "high")]
    ticks = _ticks(min(ends), max(ends), 4)
    ranges = {cost: _log_range([point[cost] for point in content["points"]]) for cost, _ in ROWS}
    legend = LEGEND_LINE * max(len(arms) for _, arms in columns) + 10
    width = len(columns) * (PANEL_WIDTH + GAP) + LEFT - GAP + 6
    height = TOP + legend + len(ROWS) * (PANEL_HEIGHT + BOTTOM)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" class="scaling-plot">'
        f"<title>{escape(str(content['score_of']))} against cost</title><style>{STYLE}</style>"
    ]
    for number, (title, arms) in enumerate(columns):
        left = LEFT + number * (PANEL_WIDTH + GAP)
        parts.append(f'<text x="{left}" y="13" class="title">{escape(title)}</text>')
        for line, (arm, color, dash) in enumerate(arms):
            y, label = TOP + LEGEND_LINE * line + 6, escape(points[arm][0]["label"])
            parts.append(
                f'<line x1="{left}" x2="{left + 22}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="2" '
                f'stroke-dasharray="{dash}"/><text x="{left + 29}" y="{y + 3.5}">{label}</text>'
            )
        for row, (cost, label) in enumerate(ROWS):
            top = TOP + legend + row * (PANEL_HEIGHT + BOTTOM)
            lines = [(points[arm], color, dash) for arm, color, dash in arms]
            parts += _panel(left, top, lines, cost, label, ranges[cost], ticks, number == 0)
    return "".join([*parts, "</svg>"])


def _panel(
    left: float,
    top: float,
    lines: Sequence[tuple[Sequence[Mapping[str, Any]], str, str]],
    cost: str,
    label: str,
    ends: tuple[float, float],
    ticks: Sequence[float],
    labelled: bool,
) -> list[str]:
    """One column's lines against one cost, on a logarithmic axis."""
    low, high = ends

    def px(value: float) -> float:
        return left + 8 + (math.log(max(value, 1e-9)) - low) / (high - low) * (PANEL_WIDTH - 16)

    def py(value: float) -> float:
        return top + 6 + (ticks[-1] - value) / (ticks[-1] - ticks[0]) * (PANEL_HEIGHT - 12)

    parts = []
    for tick in ticks:
        y = py(tick)
        parts.append(f'<line x1="{left}" x2="{left + PANEL_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        if labelled:
            parts.append(f'<text x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in _log_ticks(math.exp(low), math.exp(high)):
        parts.append(
            f'<text x="{px(tick):.1f}" y="{top + PANEL_HEIGHT + 12}" text-anchor="middle">{_number(tick)}</text>'
        )
    parts.append(f'<text x="{left + PANEL_WIDTH}" y="{top + PANEL_HEIGHT + 25}" text-anchor="end">{label}</text>')
    for points, color, _ in lines:
        if len(points) > 1:
            edge = [(px(p[cost]), py(p["high"])) for p in points]
            edge += [(px(p[cost]), py(p["low"])) for p in reversed(points)]
            corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in edge)
            parts.append(f'<polygon points="{corners}" fill="{color}" fill-opacity="0.09"/>')
    for points, color, dash in lines:
        way = " ".join(f"{px(p[cost]):.1f},{py(p['score']):.1f}" for p in points)
        parts.append(
            f'<polyline points="{way}" fill="none" stroke="{color}" stroke-width="1.8" stroke-dasharray="{dash}" '
            'stroke-linejoin="round"/>'
        )
        parts += [
            f'<circle cx="{px(p[cost]):.1f}" cy="{py(p["score"]):.1f}" r="2.8" fill="{color}">'
            f"<title>{escape(told(p))}</title></circle>"
            for p in points
        ]
    return parts


def told(point: Mapping[str, Any]) -> str:
    """A point in words."""
    what = "round" if point["over"] == "rounds" else "sample"
    return (
        f"{point['label']}, {point['budget']} {what}{'s' if point['budget'] > 1 else ''}: {point['score']:.3f} "
        f"({point['low']:.3f} to {point['high']:.3f}); {point['tokens']:.0f} tokens, {point['pictures']:.1f} pictures, "
        f"{point['seconds']:.3g} s"
    )


def _log_range(costs: Sequence[float]) -> tuple[float, float]:
    """Of the logarithms, never empty."""
    low, high = (math.log(max(float(end), 1e-9)) for end in (min(costs), max(costs)))
    return (low, high) if high - low > 1e-9 else (low - 0.5, high + 0.5)


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between, at most about six of them."""
    for steps in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,)):
        first = math.floor(math.log10(low))
        last = math.ceil(math.log10(high))
        found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        found = [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(found) <= 7:
            return found
    return found
