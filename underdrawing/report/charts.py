"""Line charts and bars as inline SVG: the report is one file that opens anywhere, without scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PALETTE = ("#2f5d8c", "#c8553d", "#588157", "#8d6a9f", "#b08900", "#3a7d7c", "#7a4b2a", "#5c5c5c")
WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 28


@dataclass(frozen=True)
class Series:
    """Points of one line; None values are gaps."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


def line_chart(
    series: Sequence[Series], x_label: str = "step", y_from: float | None = None, y_to: float | None = None
) -> str:
    """An SVG chart of up to eight lines. Empty string where no point is finite.

    Noisy lines of more than 20 points get a running mean on top of their raw trace.
    """
    points = [(x, y) for s in series for x, y in zip(s.x, s.y, strict=True) if _finite(y)]
    if not points:
        return ""
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    low = min(float(p[1]) for p in points if p[1] is not None) if y_from is None else y_from
    high = max(float(p[1]) for p in points if p[1] is not None) if y_to is None else y_to
    ticks_y = _ticks(low, high)
    low, high = min(low, ticks_y[0]), max(high, ticks_y[-1])
    if x1 == x0:
        x1 = x0 + 1

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="chart">']
    for tick in ticks_y:
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}" class="grid"/>'
            f'<text x="{LEFT - 6}" y="{py(tick) + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    for tick in _ticks(x0, x1):
        if x0 <= tick <= x1:
            parts.append(f'<text x="{px(tick):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{_number(tick)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 0.5}" text-anchor="end" class="label">{x_label}</text>')
    for color, s in zip(PALETTE, series, strict=False):
        noisy = sum(_finite(y) for y in s.y) > 20
        parts.append(_path(s.x, s.y, px, py, color, 1.0 if noisy else 1.8, 0.28 if noisy else 1.0))
        if noisy:
            parts.append(_path(s.x, _running_mean(s.y), px, py, color, 2.0, 1.0))
        elif sum(_finite(y) for y in s.y) <= 12:
            parts += [
                f'<circle cx="{px(x):.1f}" cy="{py(float(y)):.1f}" r="2.6" fill="{color}"/>'
                for x, y in zip(s.x, s.y, strict=True)
                if y is not None and _finite(y)
            ]
    return "".join([*parts, "</svg>"])


def bars(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Paired horizontal bars on [0, 1], one pair a tag."""
    rows = [tag for tag in before if tag in after]
    height = 34 * len(rows) + 8
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" class="chart">']
    for i, tag in enumerate(rows):
        y = 34 * i + 8
        full = WIDTH - 178
        parts.append(f'<text x="118" y="{y + 15}" text-anchor="end">{tag.replace("_", " ")}</text>')
        for offset, value, css in ((0, before[tag], "before"), (11, after[tag], "after")):
            parts.append(
                f'<rect x="126" y="{y + offset}" width="{full}" height="9" class="rail"/>'
                f'<rect x="126" y="{y + offset}" width="{full * value:.1f}" height="9" class="{css}"/>'
                f'<text x="{130 + full}" y="{y + offset + 8.5}" class="value">{value:.2f}</text>'
            )
    return "".join([*parts, "</svg>"])


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _running_mean(values: Sequence[float | None], decay: float = 0.85) -> list[float | None]:
    mean: float | None = None
    out: list[float | None] = []
    for value in values:
        if value is not None and math.isfinite(value):
            mean = value if mean is None else decay * mean + (1 - decay) * value
        out.append(mean)
    return out


def _path(x, y, px, py, color: str, width: float, opacity: float) -> str:
    commands, pen = [], "M"
    for a, b in zip(x, y, strict=True):
        if b is None or not math.isfinite(b):
            pen = "M"
            continue
        commands.append(f"{pen}{px(a):.1f} {py(b):.1f}")
        pen = "L"
    return (
        f'<path d="{"".join(commands)}" fill="none" stroke="{color}" stroke-width="{width}" '
        f'stroke-opacity="{opacity}" stroke-linejoin="round"/>'
    )


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high]."""
    if high - low < 1e-12:
        pad = abs(low) * 0.1 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= raw - 1e-12)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e4 or abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}"
