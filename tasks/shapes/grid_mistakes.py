"""Mistakes in a right scene of the grid: one object of wrong color, shape, size or place, missing, or one too many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tasks.base import Record
from tasks.shapes.grid import SIZES, Sized, free_places, satisfies, size_of
from tasks.shapes.grid_language import clause_of
from tasks.shapes.language import Mistake
from tasks.shapes.world import COLORS, SHAPES, Object, Scene


@dataclass(frozen=True)
class Slip:
    """An image that went wrong, what is wrong with it, and the object as it should be (None: there should be none)."""

    scene: Scene
    mistake: Mistake
    target: Object | None


def weights(owed: Record) -> dict[str, float]:
    """How likely each kind of mistake is: only what GenEval's rules would punish of this record."""
    asked = {key for clause in owed["include"] for key in clause}
    kinds = {"shape": 0.2, "missing": 0.2}
    kinds |= {"color": 0.4} if "color" in asked else {}
    kinds |= {"size": 0.5} if "size" in asked else {}
    kinds |= {"place": 0.8} if "position" in asked else {}
    return kinds | ({"extra": 0.3} if owed.get("exclude") else {})


def slip(owed: Record, scene: Scene, among: Sequence[int], rng: np.random.Generator) -> Slip:
    """One mistake with one of the objects `among` (indices into the scene's), which plainly breaks the record."""
    kinds = weights(owed)
    shares = np.fromiter(kinds.values(), float)
    order = rng.choice(len(kinds), size=len(kinds), replace=False, p=shares / shares.sum())
    for kind in (list(kinds)[i] for i in order):
        for _ in range(4):
            made = _SLIPS[kind](owed, scene, among[int(rng.integers(len(among)))], rng)
            if made is not None and not satisfies(owed, made.scene, margin=-0.1):
                return made
    return _wrong_shape(owed, scene, among[int(rng.integers(len(among)))], rng)  # breaks every prompt


def _other(rng: np.random.Generator, names: Sequence[str], name: str) -> str:
    names = [n for n in names if n != name]
    return names[rng.integers(len(names))]


def _wrong(kind: str, scene: Scene, index: int, **changes: object) -> Slip:
    target = scene.objects[index]
    wrong = replace(target, **changes)  # type: ignore[arg-type]
    objects = (*scene.objects[:index], wrong, *scene.objects[index + 1 :])
    return Slip(Scene(objects), Mistake(kind, clause_of(wrong)), target)  # type: ignore[arg-type]


def _wrong_color(owed: Record, scene: Scene, index: int, rng: np.random.Generator) -> Slip | None:
    return _wrong("color", scene, index, color=_other(rng, tuple(COLORS), scene.objects[index].color))


def _wrong_shape(owed: Record, scene: Scene, index: int, rng: np.random.Generator) -> Slip:
    return _wrong("shape", scene, index, shape=_other(rng, SHAPES, scene.objects[index].shape))


def _wrong_size(owed: Record, scene: Scene, index: int, rng: np.random.Generator) -> Slip | None:
    """At the same place; None where a large one has no room there."""
    target = scene.objects[index]
    size = _other(rng, tuple(SIZES), size_of(target))
    if target.place not in free_places(size, scene.without(index).objects):
        return None
    return _wrong("size", scene, index, size=size)


def _wrong_place(owed: Record, scene: Scene, index: int, rng: np.random.Generator) -> Slip | None:
    places = free_places(size_of(scene.objects[index]), scene.without(index).objects)
    return _wrong("place", scene, index, place=places[rng.integers(len(places))])


def _missing(owed: Record, scene: Scene, index: int, rng: np.random.Generator) -> Slip | None:
    target = scene.objects[index]
    return Slip(scene.without(index), Mistake("missing", clause_of(target)), target)


def _extra(owed: Record, scene: Scene, index: int, rng: np.random.Generator) -> Slip | None:
    model = scene.objects[index]
    places = free_places(size_of(model), scene.objects)
    if not places:
        return None
    assert isinstance(model, Sized)
    extra = replace(model, place=places[rng.integers(len(places))])
    return Slip(Scene((*scene.objects, extra)), Mistake("extra", clause_of(extra)), None)


_SLIPS: dict[str, Callable[[Record, Scene, int, np.random.Generator], Slip | None]] = {
    "color": _wrong_color,
    "shape": _wrong_shape,
    "size": _wrong_size,
    "place": _wrong_place,
    "missing": _missing,
    "extra": _extra,
}
