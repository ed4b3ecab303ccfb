"""Thoughts that somebody wrote about digits, in every format: what the warm start learns from.

As in the shapes world, in about half of them an image is wrong on purpose by one mistake that GenEval's rules would
punish; the words after it name the mistake, the next image repairs it, and everything else of the image stays as it
was, to the scan. The last image is always right.

Formats (formats): strokes, subgoals, self_critique.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from formats.base import Part
from runtime.errors import UserError, nearest
from tasks.base import Demonstration, Record
from tasks.digits.prompts import pool, sample_scene_for
from tasks.digits.scans import DIGITS
from tasks.digits.world import COLORS, digit, render
from tasks.shapes.demonstrations import MISTAKES, Slip
from tasks.shapes.language import (
    Kind,
    Mistake,
    clause_of,
    describe,
    inspection,
    instruction,
    plan,
    refinement,
    requirement,
)
from tasks.shapes.prompts import TAGS, satisfies
from tasks.shapes.world import Object, Scene, free_places

ANOTHER_MISTAKE = 0.35  # of the repairs that go wrong once more, while there is room for two images
TWO_STROKES = 0.25  # of the thoughts on several digits that are drawn in two strokes
MAX_IMAGES = 4

# ---- mistakes ---------------------------------------------------------------------------------------------------


def slip(record: Record, scene: Scene, rng: np.random.Generator) -> Slip:
    """One mistake in a right scene, such that it plainly breaks the record."""
    weights = MISTAKES[record["tag"]]
    kinds: list[str] = list(weights)
    order = rng.choice(len(kinds), size=len(kinds), replace=False, p=np.fromiter(weights.values(), float))
    for kind in (kinds[i] for i in order):
        for _ in range(4):
            made = _slip(kind, scene, rng)  # type: ignore[arg-type]
            if made is not None and not satisfies(record, made.scene, margin=-0.1):
                return made
    made = _slip("shape", scene, rng)  # breaks every prompt
    assert made is not None
    return made


def _slip(kind: Kind, scene: Scene, rng: np.random.Generator) -> Slip | None:
    """A mistake of a kind; None where there is no room for it."""
    index = int(rng.integers(len(scene.objects)))
    target = scene.objects[index]
    if kind == "missing":
        return Slip(scene.without(index), Mistake(kind, clause_of(target)), target)
    if kind == "extra":
        places = free_places([item.place for item in scene.objects])
        if not places:
            return None
        extra: Object = digit(rng, target.shape, target.color, places[rng.integers(len(places))])
        return Slip(Scene((*scene.objects, extra)), Mistake(kind, clause_of(extra)), None)
    if kind == "color":
        wrong = replace(target, color=_other(rng, tuple(COLORS), target.color))
    elif kind == "shape":
        wrong = digit(rng, _other(rng, DIGITS, target.shape), target.color, target.place)
    else:
        places = free_places([item.place for at, item in enumerate(scene.objects) if at != index])
        wrong = replace(target, place=places[rng.integers(len(places))])
    objects = (*scene.objects[:index], wrong, *scene.objects[index + 1 :])
    return Slip(Scene(objects), Mistake(kind, clause_of(wrong)), target)


def _other(rng: np.random.Generator, names: Sequence[str], name: str) -> str:
    left = [one for one in names if one != name]
    return left[rng.integers(len(left))]


def _how_often(rng: np.random.Generator, mistake_rate: float) -> int:
    """How many images in a row go wrong: 0, or 1 to MAX_IMAGES - 1."""
    return min(int(rng.geometric(1 - ANOTHER_MISTAKE)), MAX_IMAGES - 1) if rng.random() < mistake_rate else 0


# ---- building blocks --------------------------------------------------------------------------------------------


class _Writer:
    """Collects the parts of one demonstration."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.mistakes: list[int] = []
        self.needless: list[int] = []

    def say(self, role: str, text: str) -> None:
        self.parts.append(Part(role, text))

    def draw(self, role: str, scene: Scene, wrong: bool = False) -> None:
        if wrong:
            self.mistakes.append(len(self.parts))
        self.parts.append(Part(role, image=render(scene)))

    def finish(self, record: Record) -> Demonstration:
        return Demonstration(record["prompt"], record, tuple(self.parts), tuple(self.mistakes), tuple(self.needless))


def _critique(owed: Record, scene: Scene, made: Slip | None) -> str:
    """An inspection and a refinement as one free text."""
    if made is None:
        return f"{inspection(owed, scene, None)} ; keep all"
    return f"{inspection(owed, made.scene, made.mistake)} ; {refinement(made.mistake, made.target)}"


def _steps(scene: Scene) -> list[Scene]:
    """The digits of a first and a second stroke, each of one digit; one stroke for a digit alone."""
    if len(scene.objects) == 1:
        return [scene]
    first = [item for item in scene.objects if item.shape == scene.objects[0].shape]
    second = [item for item in scene.objects if item.shape != scene.objects[0].shape]
    if not second:
        first, second = first[: len(first) // 2], first[len(first) // 2 :]
    return [Scene(tuple(first)), Scene(tuple(second))]


# ---- the formats ------------------------------------------------------------------------------------------------


def strokes(record: Record, rng: np.random.Generator, mistake_rate: float) -> Demonstration:
    """plan, sketch, inspect, (refine, redraw, inspect)*, and again from plan where a stroke is left."""
    scene = sample_scene_for(record, rng)
    out = _Writer()
    wrong = _how_often(rng, mistake_rate)
    if len(scene.objects) > 1 and rng.random() < TWO_STROKES:
        first, second = _steps(scene)
        text = plan(instruction("draw", first.objects), first)
        late = rng.random() < 0.5  # where it goes wrong
        _stroke(out, requirement(record, text, DIGITS), first, text, rng, int(wrong > 0 and not late))
        text = plan(instruction("add", second.objects), scene)
        _stroke(out, record, scene, text, rng, int(wrong > 0 and late))
        return out.finish(record)
    _stroke(out, record, scene, plan("draw all", scene), rng, wrong)
    if not wrong:  # drawn a second time, which shows how to copy; the plan to do so is needless
        out.needless.append(len(out.parts))
        _stroke(out, record, scene, plan("keep all", scene), rng, 0)
    return out.finish(record)


def _stroke(out: _Writer, record: Record, scene: Scene, text: str, rng: np.random.Generator, wrong: int) -> None:
    """One stroke with its inspections; the first `wrong` of its images have a mistake each."""
    out.say("plan", text)
    role = "sketch"
    for _ in range(wrong):
        made = slip(record, scene, rng)
        out.draw(role, made.scene, wrong=True)
        out.say("inspect", f"<inspect> {inspection(record, made.scene, made.mistake)} </inspect>")
        out.say("refine", f"<refine> {refinement(made.mistake, made.target)} </refine>")
        role = "redraw"
    out.draw(role, scene)
    out.say("inspect", f"<inspect> {inspection(record, scene, None)} </inspect>")


def subgoals(record: Record, rng: np.random.Generator, mistake_rate: float) -> Demonstration:
    """A plan in words, one or two images of its parts with words on each, then the image of the whole.

    Half of the parts that went wrong are drawn again before going on; the others are put right in the whole.
    """
    scene = sample_scene_for(record, rng)
    steps = _steps(scene)
    out = _Writer()
    out.say("plan", " ; ".join(describe(step) for step in steps))
    wrong = int(rng.integers(len(steps))) if rng.random() < mistake_rate else -1
    for index, step in enumerate(steps):
        owed = requirement(record, f"<des> {describe(step)} </des>", DIGITS)
        if index == wrong:
            made = slip(owed, step, rng)
            out.draw("subgoal", made.scene, wrong=True)
            out.say("reflect", _critique(owed, step, made))
        if index != wrong or rng.random() < 0.5:
            out.draw("subgoal", step)
            out.say("reflect", _critique(owed, step, None))
    out.draw("final", scene)
    return out.finish(record)


def self_critique(record: Record, rng: np.random.Generator, mistake_rate: float) -> Demonstration:
    """An image at once, words on it, and another image; again while the last one is wrong."""
    scene = sample_scene_for(record, rng)
    out = _Writer()
    role = "sketch"
    for _ in range(_how_often(rng, mistake_rate)):
        made = slip(record, scene, rng)
        out.draw(role, made.scene, wrong=True)
        out.say("critique", _critique(record, scene, made))
        role = "redraw"
    if role == "sketch":
        out.draw(role, scene)
        out.say("critique", _critique(record, scene, None))
    out.draw("redraw", scene)
    return out.finish(record)


FORMATS: dict[str, Callable[[Record, np.random.Generator, float], Demonstration]] = {
    "strokes": strokes,
    "subgoals": subgoals,
    "self_critique": self_critique,
}


def demonstrations(format: str, count: int, seed: int, mistake_rate: float = 0.5) -> list[Demonstration]:
    """`count` demonstrations over train prompts, all tags equally often.

    Raises:
        UserError: a format that has no demonstrations here.
    """
    if format not in FORMATS:
        raise UserError(f"task 'digits' has no demonstrations in the format '{format}'; {nearest(format, FORMATS)}")
    rng = np.random.default_rng([seed, list(FORMATS).index(format)])
    made = []
    for index in range(count):
        records = pool("train", TAGS[index % len(TAGS)])
        made.append(FORMATS[format](records[rng.integers(len(records))], rng, mistake_rate))
    return [made[i] for i in rng.permutation(count)]
