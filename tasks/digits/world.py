"""What exists in the digits world: one to four scans in colors on a canvas of 32 x 32 px, and how it is painted.

Places, blocks and layouts are those of the shapes world: a scan lies in a block of 16 x 16 px, which 2 x 2 visual codes
cover. A pixel is a mix of ground and color by the scan's ink, so edges are soft, and no two sevens are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from tasks.digits.scans import DIGITS, OBJECT, Use, enlarged, used_for
from tasks.shapes.world import CANVAS, GROUND, PATCH, Object, Scene, layouts
from tasks.shapes.world import COLORS as ALL_COLORS

COLORS = {name: ALL_COLORS[name] for name in ("red", "green", "blue")}
INK = 0.3  # share of color from which a pixel is ink: 1,794 of the 1,797 scans are in one piece then
MAX_OBJECTS = 4


@dataclass(frozen=True)
class Digit(Object):
    """An object whose shape is a digit, "0" to "9", and whose pixels are a scan's."""

    scan: int = 0  # index into scans()

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 of the ink in px, half-open."""
        left, top = corner(self.place)
        x0, y0, x1, y1 = ink_box(self.scan)
        return left + x0, top + y0, left + x1, top + y1


def corner(place: int) -> tuple[int, int]:
    """x, y in px of the upper left pixel that a scan covers at a place."""
    row, column = divmod(place, 3)
    return column * PATCH + 1, row * PATCH + 1


@cache
def ink_box(scan: int) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 in px of a scan's ink within the 14 px that it is drawn in, half-open."""
    ys, xs = np.nonzero(enlarged()[scan] > INK)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def render(scene: Scene) -> np.ndarray:
    """uint8 [32, 32, 3]. Equal scenes are equal bytes.

    Raises TypeError for an object that is no Digit.
    """
    image = np.empty((CANVAS, CANVAS, 3), np.float32)
    image[:] = GROUND
    for item in scene.objects:
        if not isinstance(item, Digit):
            raise TypeError(f"{item} is no Digit: it has no scan to be drawn with")
        x, y = corner(item.place)
        paint(image[y : y + OBJECT, x : x + OBJECT], enlarged()[item.scan], item.color)
    return image.round().astype(np.uint8)


def paint(window: np.ndarray, ink: np.ndarray, color: str) -> None:
    """Lay ink, float [height, width], in a color over float pixels [height, width, 3], in place."""
    window += ink[..., None] * (np.asarray(COLORS[color], np.float32) - window)


def digit(rng: np.random.Generator, name: str, color: str, place: int, use: Use = "drawn") -> Digit:
    """A digit with one of its scans of a use."""
    scans = used_for(use, name)
    return Digit(name, color, place, scan=scans[rng.integers(len(scans))])


def sample_scene(rng: np.random.Generator, count: int, use: Use = "drawn") -> Scene:
    """`count` digits (at most MAX_OBJECTS) of any color at disjoint places."""
    choices = layouts(count)
    if not choices:
        raise ValueError(f"{count} digits do not fit: at most {MAX_OBJECTS}")
    places = choices[rng.integers(len(choices))]
    return Scene(tuple(digit(rng, _one(rng, DIGITS), _one(rng, tuple(COLORS)), place, use) for place in places))


def _one(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]
