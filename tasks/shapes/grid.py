"""What exists at the levels middle and hard: small and large objects on the 4 x 4 cells of the visual codes.

A small object is 6 px and lives in one cell of 8 px, so it is one code; a large one is 12 px, as the easy level's, and
lives in a block of 2 x 2 cells. Nothing is jittered, so all images are made of 121 distinct patches (4 shapes x 6
colors, small or a quarter of a large one, and the blank one), and up to eight objects fit into 16 codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tasks.base import Record
from tasks.shapes.prompts import RELATION_MARGIN, related
from tasks.shapes.prompts import satisfies as satisfies_but_sizes
from tasks.shapes.render import MASKS, masks
from tasks.shapes.world import BLOCK, CANVAS, COLORS, GROUND, OBJECT, PATCH, Object, Scene, layouts

SIDE = CANVAS // PATCH  # cells in a row
CELLS = tuple(f"{'abcd'[column]}{row + 1}" for row in range(SIDE) for column in range(SIDE))  # as a spreadsheet's
MARGIN = 1  # px between the upper left corner of a cell and its object; two objects stay at least 2 px apart
SIZES = {"small": 6, "large": OBJECT}  # px, the sides of an object's box
SPAN = {"small": 1, "large": BLOCK // PATCH}  # cells, the sides of what it reserves
MASKS_OF = {"small": masks(SIZES["small"]), "large": MASKS}  # size to shape to bool [side, side]

LARGE_WHERE_OPEN = 0.25  # of the objects whose size nobody asked for
MOST_CELLS = 12  # of the 16 that such choices may fill, so that there is room to place and to move
MOST_LARGE = 2
TRIES = 400


@dataclass(frozen=True)
class Sized(Object):
    """An object of the grid. `place` is an index into CELLS: of a large object, the upper left of its four."""

    size: str = "small"

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 in px, half-open."""
        return box_of(self.size, self.place)

    @property
    def cells(self) -> frozenset[int]:
        return covered(self.size, self.place)


def box_of(size: str, place: int) -> tuple[int, int, int, int]:
    row, column = divmod(place, SIDE)
    x, y = column * PATCH + MARGIN, row * PATCH + MARGIN
    return x, y, x + SIZES[size], y + SIZES[size]


@cache
def covered(size: str, place: int) -> frozenset[int]:
    """The cells that an object reserves."""
    return frozenset(place + row * SIDE + column for row in range(SPAN[size]) for column in range(SPAN[size]))


@cache
def places_of(size: str) -> tuple[int, ...]:
    """Where an object of this size may stand, in reading order."""
    last = SIDE - SPAN[size]
    return tuple(place for place in range(SIDE**2) if max(divmod(place, SIDE)) <= last)


def free_places(size: str, others: Iterable[Object]) -> list[int]:
    """Where an object of this size overlaps none of the others."""
    taken = frozenset[int]().union(*(item.cells for item in others if isinstance(item, Sized)))
    return [place for place in places_of(size) if not covered(size, place) & taken]


def place_of(box: Sequence[float], size: str) -> int:
    """The place of an object whose box was seen, by the box's centre."""
    last = SIDE - SPAN[size]
    column, row = (
        int(np.clip(round(((box[i] + box[i + 2] - SIZES[size]) / 2 - MARGIN) / PATCH), 0, last)) for i in (0, 1)
    )
    return row * SIDE + column


def render(scene: Scene) -> np.ndarray:
    """uint8 [CANVAS, CANVAS, 3]."""
    image = np.empty((CANVAS, CANVAS, 3), np.uint8)
    image[:] = GROUND
    for item in scene.objects:
        x0, y0, x1, y1 = item.box
        image[y0:y1, x0:x1][MASKS_OF[size_of(item)][item.shape]] = COLORS[item.color]
    return image


def size_of(item: Object) -> str:
    assert isinstance(item, Sized), item
    return item.size


def satisfies(record: Record, scene: Scene, margin: float = 0.0) -> bool:
    """As the easy level's, and every object of a clause that names a size has it."""
    return satisfies_but_sizes(record, scene, margin) and all(
        size_of(item) == clause["size"]
        for clause in record["include"]
        if "size" in clause
        for item in scene.objects
        if item.shape == clause["class"]
    )


def sample_scene(rng: np.random.Generator, small: int, large: int) -> Scene:
    """So many objects of each size, of any shape and color. Raises ValueError where they do not fit."""
    clauses = [{"class": "", "count": 1}] * (small + large)
    places = _anywhere(clauses, ["large"] * large + ["small"] * small, rng)
    if places is None:
        raise ValueError(f"{small} small and {large} large objects do not fit into {SIDE} x {SIDE} cells")
    colors, shapes = tuple(COLORS), tuple(MASKS)
    return Scene(
        tuple(
            Sized(
                shapes[rng.integers(len(shapes))],
                colors[rng.integers(len(colors))],
                place,
                size="large" if index < large else "small",
            )
            for index, (place,) in enumerate(places)
        )
    )


# ---- scenes that a prompt asks for ------------------------------------------------------------------------------


@cache
def _beside(size: str, place: int, relation: str, other: str) -> frozenset[int]:
    """Where an object of the size `other` stands in a relation to one of `size` at `place`, plainly."""
    box = box_of(size, place)
    return frozenset(p for p in places_of(other) if related(box_of(other, p), relation, box, RELATION_MARGIN))


def sample_scene_for(record: Record, rng: np.random.Generator) -> Scene:
    """A scene that satisfies the record with RELATION_MARGIN, objects in the order of its clauses: within a clause in
    reading order, and over all small and over all large ones too where the record says nothing of where they stand.

    What the record leaves open is sampled: places, colors, and sizes (one of each for all objects of a clause).

    Raises:
        ValueError: no scene was found, so it asks for more than the grid holds.
    """
    include = record["include"]
    colors = tuple(COLORS)
    named = [clause.get("color") or colors[rng.integers(len(colors))] for clause in include]
    arranged = any("position" in clause for clause in include)
    for _ in range(TRIES):
        sizes = _sizes(include, rng)
        places = _arranged(include, sizes, rng) if arranged else _anywhere(include, sizes, rng)
        if places is not None:
            return Scene(
                tuple(
                    Sized(clause["class"], color, place, size=size)
                    for clause, color, size, group in zip(include, named, sizes, places, strict=True)
                    for place in group
                )
            )
    raise ValueError(f"'{record.get('prompt', '')}': no such scene fits into {SIDE} x {SIDE} cells")


def _sizes(include: Sequence[dict[str, Any]], rng: np.random.Generator) -> list[str]:
    """A size for each clause: its own, else now and then large where there is room."""
    sizes = [clause.get("size", "small") for clause in include]
    for index, clause in enumerate(include):
        if "size" not in clause and rng.random() < LARGE_WHERE_OPEN:
            tried = [*sizes[:index], "large", *sizes[index + 1 :]]
            cells = sum(SPAN[size] ** 2 * c["count"] for size, c in zip(tried, include, strict=True))
            large = sum(c["count"] for size, c in zip(tried, include, strict=True) if size == "large")
            if cells <= MOST_CELLS and large <= MOST_LARGE:
                sizes = tried
    return sizes


def _anywhere(
    include: Sequence[dict[str, Any]], sizes: Sequence[str], rng: np.random.Generator
) -> list[list[int]] | None:
    """Places by clause. The large objects are placed first, for they are the harder ones to place."""
    counts = {size: sum(c["count"] for s, c in zip(sizes, include, strict=True) if s == size) for size in SIZES}
    choices = layouts(counts["large"])
    if not choices:
        return None
    blocks = [row * SIDE + column for row, column in (divmod(p, 3) for p in choices[rng.integers(len(choices))])]
    taken = frozenset[int]().union(*(covered("large", place) for place in blocks))
    free = [place for place in places_of("small") if place not in taken]
    if len(free) < counts["small"]:
        return None
    cells = rng.choice(free, counts["small"], replace=False).tolist() if counts["small"] else []
    waiting = {"large": sorted(blocks, reverse=True), "small": sorted(cells, reverse=True)}
    return [[waiting[size].pop() for _ in range(clause["count"])] for size, clause in zip(sizes, include, strict=True)]


def _arranged(
    include: Sequence[dict[str, Any]], sizes: Sequence[str], rng: np.random.Generator
) -> list[list[int]] | None:
    """Places by clause such that every object of a clause stands in its relation to every one of its target; None: this
    try came to where nothing fits."""
    places: list[list[int]] = []
    taken: frozenset[int] = frozenset()
    for clause, size in zip(include, sizes, strict=True):
        allowed = set(places_of(size))
        if "position" in clause:
            relation, target = clause["position"]
            for place in places[target]:
                allowed &= _beside(sizes[target], place, relation, size)
        group: list[int] = []
        for _ in range(clause["count"]):
            open_ones = sorted(place for place in allowed if not covered(size, place) & taken)
            if not open_ones:
                return None
            group.append(open_ones[rng.integers(len(open_ones))])
            taken |= covered(size, group[-1])
        places.append(sorted(group))
    return places
