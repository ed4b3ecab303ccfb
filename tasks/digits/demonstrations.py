"""Thoughts that somebody wrote about digits: the formats of the shapes world, of scans, and this world's mistakes.

In about half of the thoughts an image is wrong on purpose, by one mistake that GenEval's rules would punish; everything
else of the image stays as it was, to the scan.

Formats (formats): strokes, subgoals, self_critique, direct.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from tasks.base import Demonstration, Record
from tasks.digits.prompts import pool, sample_scene_for
from tasks.digits.scans import DIGITS
from tasks.digits.world import COLORS, digit, render
from tasks.shapes import demonstrations as shapes
from tasks.shapes.demonstrations import MISTAKES, Slip, World, Write, format_of, other, put, spread
from tasks.shapes.language import Mistake, clause_of, requirement
from tasks.shapes.prompts import TAGS, satisfies
from tasks.shapes.world import Object, Scene, free_places


def slip(record: Record, scene: Scene, rng: np.random.Generator) -> Slip:
    """One mistake in a right scene, such that it plainly breaks the record."""
    weights = MISTAKES[record["tag"]]
    kinds = list(weights)
    order = rng.choice(len(kinds), size=len(kinds), replace=False, p=np.fromiter(weights.values(), float))
    for kind in (kinds[i] for i in order):
        for _ in range(4):
            made = _slip(kind, scene, rng)
            if made is not None and not satisfies(record, made.scene, margin=-0.1):
                return made
    made = _slip("shape", scene, rng)  # breaks every prompt
    assert made is not None
    return made


def _slip(kind: str, scene: Scene, rng: np.random.Generator) -> Slip | None:
    """A mistake of a kind; None where there is no room for it."""
    index = int(rng.integers(len(scene.objects)))
    target = scene.objects[index]
    if kind == "missing":
        return Slip(scene.without(index), Mistake("missing", clause_of(target)), target)
    if kind == "extra":
        places = free_places([item.place for item in scene.objects])
        if not places:
            return None
        extra: Object = digit(rng, target.shape, target.color, places[rng.integers(len(places))])
        return Slip(Scene((*scene.objects, extra)), Mistake("extra", clause_of(extra)), None)
    if kind == "color":
        wrong = replace(target, color=other(rng, COLORS, target.color))
        return Slip(put(scene, index, wrong), Mistake("color", clause_of(wrong)), target)
    if kind == "shape":
        wrong = digit(rng, other(rng, DIGITS, target.shape), target.color, target.place)
        return Slip(put(scene, index, wrong), Mistake("shape", clause_of(wrong)), target)
    places = free_places([item.place for at, item in enumerate(scene.objects) if at != index])
    wrong = replace(target, place=places[rng.integers(len(places))])
    return Slip(put(scene, index, wrong), Mistake("place", clause_of(wrong)), target)


WORLD = World(sample_scene_for, slip, partial(requirement, shapes=DIGITS), render)

FORMATS: dict[str, Write] = {
    "strokes": partial(shapes.strokes, world=WORLD),
    "subgoals": partial(shapes.subgoals, world=WORLD),
    "self_critique": partial(shapes.self_critique, world=WORLD),
    "direct": partial(shapes.direct, world=WORLD),
}


def demonstrations(format: str, count: int, seed: int, mistake_rate: float = 0.5) -> list[Demonstration]:
    """`count` demonstrations over train prompts, all tags equally often. Raises UserError as `format_of`."""
    write = format_of("digits", FORMATS, format)
    rng = np.random.default_rng([seed, list(FORMATS).index(format)])
    return spread(write, count, rng, mistake_rate, TAGS, lambda tag: pool("train", tag))
