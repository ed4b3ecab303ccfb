"""Questions about a scene, for rows that teach seeing and nothing else.

They are written in the world's own words, so that a tokenizer of its plans and inspections knows them all:

    count       circles =                            two | nothing
    object      top-left =                           red circle | nothing
    presence    red circle =                         yes | no
    relation    red circle left of blue square =     yes | no

Each kind's answers are even where there are two. No question names a composition that is held out (prompts.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from formats.base import Part
from runtime.errors import UserError, nearest
from tasks.base import Demonstration
from tasks.shapes.language import COUNT_WORDS
from tasks.shapes.prompts import (
    HELDOUT_COLORED,
    HELDOUT_PAIRS,
    HELDOUT_RELATIONS,
    INVERSE,
    RELATION_MARGIN,
    plural,
    related,
)
from tasks.shapes.render import render
from tasks.shapes.world import COLORS, MAX_OBJECTS, PLACES, SHAPES, Object, Scene, sample_scene

Asked = tuple[str, str]  # a question and its answer
_COLORED = tuple((shape, color) for shape in SHAPES for color in COLORS if (shape, color) not in HELDOUT_COLORED)


def _count(scene: Scene, rng: np.random.Generator) -> Asked | None:
    there = rng.random() < 0.8
    shape = scene.objects[rng.integers(len(scene.objects))].shape if there else SHAPES[rng.integers(len(SHAPES))]
    number = sum(item.shape == shape for item in scene.objects)
    return f"{plural(shape)} =", COUNT_WORDS.get(number, "nothing")


def _object(scene: Scene, rng: np.random.Generator) -> Asked | None:
    by_place = {item.place: item for item in scene.objects}
    if rng.random() < 0.75:
        place = list(by_place)[rng.integers(len(by_place))]
    else:
        place = int(rng.integers(len(PLACES)))
    item = by_place.get(place)
    return f"{PLACES[place]} =", "nothing" if item is None else f"{item.color} {item.shape}"


def _presence(scene: Scene, rng: np.random.Generator) -> Asked | None:
    seen = {(item.shape, item.color) for item in scene.objects}
    yes = rng.random() < 0.5
    choices = [pair for pair in _COLORED if (pair in seen) == yes]
    if not yes:  # half of what is not there differs from what is by its color or its shape alone
        near = [pair for pair in choices if any((pair[0] == shape) != (pair[1] == color) for shape, color in seen)]
        choices = near if near and rng.random() < 0.5 else choices
    if not choices:
        return None
    shape, color = choices[rng.integers(len(choices))]
    return f"{color} {shape} =", "yes" if yes else "no"


def _relation(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """Of two objects that are each the only one of their kind, where it plainly holds or plainly does not."""
    kinds = [(item.shape, item.color) for item in scene.objects]
    only = [item for item, kind in zip(scene.objects, kinds, strict=True) if kinds.count(kind) == 1]
    yes = rng.random() < 0.5
    choices = []
    for one in only:
        for other in only:
            for relation in INVERSE:
                holds = related(one.box, relation, other.box, RELATION_MARGIN)
                plain = holds or not related(one.box, relation, other.box, -RELATION_MARGIN)
                if one is not other and plain and holds == yes and not _held_out(one, relation, other):
                    choices.append((one, relation, other))
    if not choices:
        return None
    one, relation, other = choices[rng.integers(len(choices))]
    return f"{one.color} {one.shape} {relation} {other.color} {other.shape} =", "yes" if yes else "no"


def _held_out(one: Object, relation: str, other: Object) -> bool:
    return (
        (one.shape, one.color) in HELDOUT_COLORED
        or (other.shape, other.color) in HELDOUT_COLORED
        or frozenset({one.shape, other.shape}) in HELDOUT_PAIRS
        or (one.shape, relation, other.shape) in HELDOUT_RELATIONS
    )


KINDS: dict[str, Callable[[Scene, np.random.Generator], Asked | None]] = {
    "count": _count,
    "object": _object,
    "presence": _presence,
    "relation": _relation,
}


def questions(kind: str, count: int, seed: int) -> list[Demonstration]:
    """`count` questions about scenes of one to four objects.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in KINDS:
        raise UserError(f"task 'shapes' asks no questions of the kind '{kind}'; {nearest(kind, KINDS)}")
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    return asked_of(kind, KINDS[kind], lambda: _scene(kind, rng), render, count, rng)


def _scene(kind: str, rng: np.random.Generator) -> Scene:
    scene = sample_scene(rng, int(rng.integers(1, MAX_OBJECTS + 1)))
    if kind != "count":
        return scene
    # Else three of a shape would hardly ever be seen.
    alike = rng.random(len(scene.objects)) < 0.6
    first = scene.objects[0].shape
    return Scene(
        tuple(replace(o, shape=first if same else o.shape) for o, same in zip(scene.objects, alike, strict=True))
    )


def asked_of(
    kind: str,
    ask: Callable[[Scene, np.random.Generator], Asked | None],
    scene_of: Callable[[], Scene],
    draw: Callable[[Scene], np.ndarray],
    count: int,
    rng: np.random.Generator,
) -> list[Demonstration]:
    """`count` questions of a kind, each about a scene of its own. `ask` gives None where it has none about a scene."""
    made: list[Demonstration] = []
    while len(made) < count:
        scene = scene_of()
        asked = ask(scene, rng)
        if asked is not None:
            question, answer = asked
            made.append(Demonstration(question, {"kind": kind}, (Part("answer", answer),), media=(draw(scene),)))
    return made
