"""Writes docs/levels.svg, a thought of each level of the shapes world: `python docs/make_levels_picture.py`."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from tasks.base import Demonstration
from tasks.registry import get_task

PICTURE = Path(__file__).parent / "levels.svg"
# Of each level: the tag of the prompt, what goes wrong, and what the level is.
SHOWN = {
    "easy": ("color_attr", "color", "up to 4 objects of one size, at 9 places"),
    "middle": ("position", "place", "3 to 5 objects of two sizes, in 16 cells"),
    "hard": ("size_color", "size", "6 to 8 objects"),
}
WIDTH, COLUMN, SIDE, LINE = 960, 232, 128, 14  # px
STYLE = """
    .card { fill: #ffffff; stroke: #94a3b8; stroke-width: 1.5 }
    .name { fill: #0f172a; font-size: 17px; font-weight: 600 }
    .what { fill: #475569; font-size: 13px }
    .prompt { fill: #0f172a; font-size: 14px; font-style: italic }
    .said { fill: #475569; font-size: 11px; font-family: ui-monospace, Menlo, Consolas, monospace }
    .wrong { fill: #c2410c } .fine { fill: #15803d } .frame { fill: #ffffff; stroke: #cbd5e1 }
    .mistaken { stroke: #f97316; stroke-width: 2.5 }
    @media (prefers-color-scheme: dark) {
      .card { fill: #1e293b; stroke: #64748b } .name, .prompt { fill: #f1f5f9 } .what, .said { fill: #cbd5e1 }
      .wrong { fill: #fdba74 } .fine { fill: #86efac }
    }
  """


def chosen(level: str) -> Demonstration:
    """The first thought of the kind that is shown, with one mistake and at most four images."""
    tag, kind, _ = SHOWN[level]
    for one in get_task("shapes", level=level).demonstrations("strokes", 600, 0):
        images = sum(part.image is not None for part in one.parts)
        if one.record["tag"] == tag and len(one.mistakes) == 1 and images in (3, 4):
            if f"wrong {kind}" in one.parts[one.mistakes[0] + 1].text and len(one.prompt) < 90:
                return one
    raise LookupError(f"no thought of the tag {tag} with a mistake in {kind}")


def columns(one: Demonstration) -> Iterator[tuple[list[str], np.ndarray, bool, list[str]]]:
    """Of each image: what was said before it, the image, whether it is wrong, and the inspection after it."""
    before: list[str] = []
    for index, part in enumerate(one.parts):
        if part.image is None:
            if part.role != "inspect":
                before.append(_plain(part.text))
            continue
        seen, verdict = _plain(one.parts[index + 1].text).split(" : ")
        yield before, part.image, index in one.mistakes, [seen, verdict]
        before = []


def _plain(text: str) -> str:
    return " ".join(re.sub(r"</?\w+>", " ", text.replace("<des>", " → ")).split()).replace(" ,", ",")


def pixels(image: np.ndarray, x: float, y: float) -> Iterator[str]:
    """The runs of one color in each row, the ground left out."""
    size = SIDE / len(image)
    for row, line in enumerate(image):
        ends = [0, *(np.flatnonzero((line[1:] != line[:-1]).any(-1)) + 1).tolist(), len(line)]
        for start, stop in zip(ends, ends[1:], strict=False):
            if (line[start] != 255).any():
                color = "#" + bytes(line[start].tolist()).hex()
                yield (
                    f'<rect x="{x + start * size:g}" y="{y + row * size:g}" width="{(stop - start) * size:g}" '
                    f'height="{size:g}" fill="{color}"/>'
                )


def lines(texts: list[str], x: float, y: float) -> tuple[list[str], float]:
    """Wrapped text, a verdict colored, and where it ends."""
    found = []
    for text in texts:
        verdict = " fine" if text == "fine" else " wrong" if text.startswith("wrong") else ""
        for line in textwrap.wrap(text, 33, break_on_hyphens=False):
            found.append(f'<text class="said{verdict}" x="{x}" y="{y}">{escape(line)}</text>')
            y += LINE
    return found, y


def picture() -> str:
    body: list[str] = []
    top = 10.0
    for level, (_, _, what) in SHOWN.items():
        one = chosen(level)
        card, end = [], top
        card.append(f'<text class="name" x="26" y="{top + 28}">{level}</text>')
        card.append(f'<text class="what" x="100" y="{top + 28}">{escape(what)}</text>')
        card.append(f'<text class="prompt" x="26" y="{top + 52}">{escape(one.prompt)}</text>')
        shown = list(columns(one))
        said = [lines(before, 26 + COLUMN * number, top + 78) for number, (before, *_) in enumerate(shown)]
        image_top = max(y for _, y in said)
        for number, ((_, image, wrong, after), (before_lines, _)) in enumerate(zip(shown, said, strict=True)):
            x = 26 + COLUMN * number
            card += before_lines
            card.append(
                f'<rect class="frame{" mistaken" if wrong else ""}" x="{x}" y="{image_top}" width="{SIDE}" '
                f'height="{SIDE}"/>'
            )
            card += pixels(image, x, image_top)
            after_lines, y = lines(after, x, image_top + SIDE + 18)
            card += after_lines
            end = max(end, y)
        height = end - top + 4
        body.append(f'<rect class="card" x="8" y="{top:g}" width="{WIDTH - 16}" height="{height:g}" rx="10"/>')
        body += card
        top += height + 14
    said_of = "A plan, an image, an inspection and, where that finds a mistake, a repair and another image."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:g}" role="img" '
        'aria-labelledby="title description" font-family="ui-sans-serif, system-ui, \'Segoe UI\', Helvetica, Arial, '
        'sans-serif" shape-rendering="crispEdges">\n'
        '  <title id="title">A thought of each level of the shapes world</title>\n'
        f'  <desc id="description">{said_of}</desc>\n'
        f"  <style>{STYLE}</style>\n  " + "\n  ".join(body) + "\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(picture())
