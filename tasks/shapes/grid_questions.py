"""Questions about a scene at the levels middle and hard, in the words of its plans and inspections:

    count       circles =  |  blue circles =  |  small circles =         two | nothing
    object      b3 =                                                     small red circle | nothing
    presence    small red circle =                                       yes | no
    relation    red circle left of blue square =                         yes | no
    size        size red circle =                                        small | large

Each kind's answers are even where there are two. No question names a composition that is held out (grid_prompts.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from runtime.errors import UserError, nearest
from tasks.base import Demonstration
from tasks.shapes.grid import CELLS, MOST_LARGE, SIZES, render, sample_scene, size_of
from tasks.shapes.grid_prompts import NUMBERS, OBJECTS, TAGS, Level, split_of
from tasks.shapes.prompts import INVERSE, RELATION_MARGIN, plural, related
from tasks.shapes.questions import Asked, asked_of
from tasks.shapes.world import COLORS, SHAPES, Object, Scene


def _asked_in_train(*clauses: dict[str, Any]) -> bool:
    """Whether train prompts may name what these clauses of a record compose."""
    return split_of({"include": [{"count": 1, **clause} for clause in clauses]}) == "train"


_LOOKS = tuple(
    (shape, color, size)
    for shape, color, size in product(SHAPES, COLORS, SIZES)
    if _asked_in_train({"class": shape, "color": color, "size": size})
)


def _count(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """Of a shape, of a shape and color, or of a shape and size, two in three of them of what is there."""
    there = rng.random() < 0.65
    item = scene.objects[rng.integers(len(scene.objects))]
    shape, color, size = (
        (item.shape, item.color, size_of(item))
        if there
        else (SHAPES[rng.integers(len(SHAPES))], list(COLORS)[rng.integers(len(COLORS))], _some_size(rng))
    )
    ways: list[dict[str, str]] = [{}, {"color": color}, {"size": size}]
    named = ways[rng.integers(3)]
    number = sum(
        one.shape == shape
        and one.color == named.get("color", one.color)
        and size_of(one) == named.get("size", size_of(one))
        for one in scene.objects
    )
    if not _asked_in_train({"class": shape, **named}) or number > max(NUMBERS):
        return None
    return f"{' '.join([*named.values(), plural(shape)])} =", NUMBERS.get(number, "nothing")


def _some_size(rng: np.random.Generator) -> str:
    return list(SIZES)[rng.integers(len(SIZES))]


def _object(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """Of the cell that names an object, or of an empty one; the other three of a large object are not asked for."""
    if rng.random() < 0.75:
        item = scene.objects[rng.integers(len(scene.objects))]
        return f"{CELLS[item.place]} =", f"{size_of(item)} {item.color} {item.shape}"
    taken = frozenset[int]().union(*(item.cells for item in scene.objects))  # type: ignore[attr-defined]
    empty = [place for place in range(len(CELLS)) if place not in taken]
    return f"{CELLS[empty[rng.integers(len(empty))]]} =", "nothing"


def _presence(scene: Scene, rng: np.random.Generator) -> Asked | None:
    seen = {(item.shape, item.color, size_of(item)) for item in scene.objects}
    yes = rng.random() < 0.5
    choices = [looks for looks in _LOOKS if (looks in seen) == yes]
    if not yes:  # half of what is not there differs from what is by its shape, its color or its size alone
        near = [looks for looks in choices if any(_differences(looks, one) == 1 for one in seen)]
        choices = near if near and rng.random() < 0.5 else choices
    if not choices:
        return None
    shape, color, size = choices[rng.integers(len(choices))]
    return f"{size} {color} {shape} =", "yes" if yes else "no"


def _differences(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def _only(scene: Scene) -> list[Object]:
    """The objects that are each the only one of their shape and color."""
    kinds = [(item.shape, item.color) for item in scene.objects]
    return [item for item, kind in zip(scene.objects, kinds, strict=True) if kinds.count(kind) == 1]


def _relation(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """Where it plainly holds or plainly does not."""
    only = _only(scene)
    yes = rng.random() < 0.5
    choices = []
    for one, other, relation in product(only, only, INVERSE):
        holds = related(one.box, relation, other.box, RELATION_MARGIN)
        plain = holds or not related(one.box, relation, other.box, -RELATION_MARGIN)
        if one is not other and plain and holds == yes:
            clause = {"class": one.shape, "color": one.color, "position": [relation, 0]}
            if _asked_in_train({"class": other.shape, "color": other.color}, clause):
                choices.append((one, relation, other))
    if not choices:
        return None
    one, relation, other = choices[rng.integers(len(choices))]
    return f"{one.color} {one.shape} {relation} {other.color} {other.shape} =", "yes" if yes else "no"


def _size(scene: Scene, rng: np.random.Generator) -> Asked | None:
    size = _some_size(rng)
    choices = [
        item
        for item in _only(scene)
        if size_of(item) == size and _asked_in_train({"class": item.shape, "color": item.color})
    ]
    if not choices:
        return None
    item = choices[rng.integers(len(choices))]
    return f"size {item.color} {item.shape} =", size


KINDS: dict[str, Callable[[Scene, np.random.Generator], Asked | None]] = {
    "count": _count,
    "object": _object,
    "presence": _presence,
    "relation": _relation,
    "size": _size,
}


def _scene(level: Level, kind: str, rng: np.random.Generator) -> Scene:
    """Of two objects up to as many as a prompt of the level asks for."""
    number = int(rng.integers(2, OBJECTS[level][1] + 1))
    large = int(rng.integers(min(number, MOST_LARGE) + 1))
    if kind == "size":  # else there would often be no large one to ask for
        large = min(max(large, 1), number - 1)
    scene = sample_scene(rng, number - large, large)
    if kind != "count":
        return scene
    # Else three that are alike would hardly ever be seen.
    like = scene.objects[rng.integers(number)]
    shapes, colors = rng.random(number) < 0.5, rng.random(number) < 0.5
    return Scene(
        tuple(
            replace(one, shape=like.shape if shape else one.shape, color=like.color if color else one.color)
            for one, shape, color in zip(scene.objects, shapes, colors, strict=True)
        )
    )


def questions(level: Level, kind: str, count: int, seed: int) -> list[Demonstration]:
    """`count` questions about scenes of the level.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in KINDS:
        raise UserError(f"task 'shapes' asks no questions of the kind '{kind}'; {nearest(kind, KINDS)}")
    rng = np.random.default_rng([seed, list(KINDS).index(kind), list(TAGS).index(level)])
    return asked_of(kind, KINDS[kind], lambda: _scene(level, kind, rng), render, count, rng)
