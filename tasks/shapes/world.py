"""What exists in the shapes world: names, sizes, places, and scenes sampled without overlap.

render.py draws a scene, prompts.py asks for one, detector.py reads one back. The numbers here are chosen for the
visual tokenizer: an object lives in a block of 16 x 16 px that starts on the 8 px lattice of the codes, so it covers
exactly 2 x 2 codes, and all images are made of 193 distinct 8 px patches (4 shapes x 6 colors x 2 jitters x 4
quarters, and the blank one).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

CANVAS = 32  # px, both sides
PATCH = 8  # px that one visual code covers
BLOCK = 16  # px reserved for one object
OBJECT = 12  # px, the size of every object's box

SHAPES = ("circle", "square", "triangle", "cross")
COLORS: dict[str, tuple[int, int, int]] = {  # the names and their order are GenEval's
    "red": (220, 20, 40),
    "orange": (255, 125, 0),
    "yellow": (255, 230, 30),
    "green": (20, 160, 60),
    "blue": (30, 80, 230),
    "purple": (150, 30, 190),
}
GROUND = (255, 255, 255)

PLACES = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
# Offset of the object inside its block. Objects of neighbouring blocks stay at least 2 px apart (1 + 16 - 3 - 12).
JITTERS = ((1, 1), (3, 3))
MAX_OBJECTS = 4  # four blocks tile the canvas


@dataclass(frozen=True)
class Object:
    shape: str
    color: str
    place: int  # index into PLACES
    jitter: int = 0  # index into JITTERS

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 in px, half-open."""
        row, column = divmod(self.place, 3)
        dx, dy = JITTERS[self.jitter]
        x, y = column * PATCH + dx, row * PATCH + dy
        return x, y, x + OBJECT, y + OBJECT


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]

    def with_object(self, index: int, **changes: object) -> Scene:
        """The same scene with one object changed."""
        objects = list(self.objects)
        objects[index] = replace(objects[index], **changes)  # type: ignore[arg-type]
        return Scene(tuple(objects))

    def without(self, index: int) -> Scene:
        return Scene(self.objects[:index] + self.objects[index + 1 :])


def disjoint(a: int, b: int) -> bool:
    """Whether the blocks of two places do not overlap."""
    (row_a, column_a), (row_b, column_b) = divmod(a, 3), divmod(b, 3)
    return max(abs(row_a - row_b), abs(column_a - column_b)) * PATCH >= BLOCK


def free_places(taken: Sequence[int]) -> list[int]:
    """Places whose block overlaps none of the taken ones."""
    return [place for place in range(len(PLACES)) if all(disjoint(place, other) for other in taken)]


@cache
def layouts(count: int) -> tuple[tuple[int, ...], ...]:
    """All ordered choices of `count` places whose blocks are disjoint; empty when the canvas is too small."""
    if count == 0:
        return ((),)
    return tuple((*taken, place) for taken in layouts(count - 1) for place in free_places(taken))


def sample_scene(rng: np.random.Generator, count: int) -> Scene:
    """`count` objects (at most MAX_OBJECTS) of any shape and color at disjoint places."""
    choices = layouts(count)
    if not choices:
        raise ValueError(f"{count} objects do not fit: at most {MAX_OBJECTS}")
    places = choices[rng.integers(len(choices))]
    colors = tuple(COLORS)
    return Scene(
        tuple(
            Object(
                SHAPES[rng.integers(len(SHAPES))],
                colors[rng.integers(len(colors))],
                place,
                int(rng.integers(len(JITTERS))),
            )
            for place in places
        )
    )


def place_of(box: Sequence[float]) -> int:
    """The place whose blocks' centre is nearest to a box's centre."""
    # The jitters shift an object by 0 or +-1 around its block's centre once their mean is taken into account.
    mean = np.mean(JITTERS, axis=0) + OBJECT / 2
    column, row = ((box[0] + box[2]) / 2 - mean[0]) / PATCH, ((box[1] + box[3]) / 2 - mean[1]) / PATCH
    return int(np.clip(round(row), 0, 2) * 3 + np.clip(round(column), 0, 2))


def unit_offset(box: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Where a box lies, seen from another: GenEval's offset of the centres, shrunk by a tenth of both sizes, over
    its length before shrinking. (0, 0) for boxes on the same spot."""
    offset = [(box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    length = math.hypot(*offset)
    if length == 0:
        return 0.0, 0.0
    sizes = [box[i + 2] - box[i] + other[i + 2] - other[i] for i in (0, 1)]
    dx, dy = (math.copysign(max(abs(o) - 0.1 * s, 0.0), o) / length for o, s in zip(offset, sizes, strict=True))
    return dx, dy
