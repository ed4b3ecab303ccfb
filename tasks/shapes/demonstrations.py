"""Thoughts that somebody wrote, in every format: what the warm start learns from.

A demonstration draws what its prompt asks for in 2 to 4 images (in the format direct in one). In about half of them an
image is wrong on purpose, by one mistake that breaks the prompt under GenEval's rules; the text after it names the
mistake, the refinement repairs it, and everything else of the image stays as it was. In the others the inspection
rightly finds nothing. The last image is always right. `Demonstration.mistakes` says which images are wrong, for a loss
that would rather not learn to draw them; `Demonstration.needless` which plan goes on although the image before it was
already right.

Formats (formats): strokes, subgoals, self_critique, look, in which the crops are the environment's and the boxes are in
the words of the tool `look`, and direct, which is one right image without words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from formats.base import Part
from record.trajectory import Author
from runtime.errors import UserError, nearest
from tasks.base import Demonstration, Record
from tasks.crop import crop
from tasks.shapes.language import (
    Mistake,
    clause_of,
    describe,
    inspection,
    instruction,
    plan,
    refinement,
    requirement,
)
from tasks.shapes.prompts import TAGS, pool, sample_scene_for, satisfies
from tasks.shapes.render import render
from tasks.shapes.world import BLOCK, COLORS, PATCH, PLACES, SHAPES, Object, Scene, free_places

# Kinds of mistake by tag, with weights: only what GenEval's rules would punish. An extra object is no fault outside
# counting, nor is a color that nobody asked for.
MISTAKES: dict[str, dict[str, float]] = {
    "single_object": {"shape": 0.9, "missing": 0.1},
    "two_object": {"shape": 0.7, "missing": 0.3},
    "counting": {"shape": 0.3, "missing": 0.35, "extra": 0.35},
    "colors": {"color": 0.6, "shape": 0.4},
    "position": {"place": 0.6, "shape": 0.25, "missing": 0.15},
    "color_attr": {"color": 0.55, "shape": 0.3, "missing": 0.15},
}
ANOTHER_MISTAKE = 0.35  # of the repairs that go wrong once more, while there is room for two images
TWO_STROKES = 0.25  # of the thoughts on several objects that are drawn in two strokes
MAX_IMAGES = 4
MAX_LOOKED_AT = 3  # images in the format look


@dataclass(frozen=True)
class Slip:
    """An image that went wrong, what is wrong with it, and the object as it should be (None: there should be none)."""

    scene: Scene
    mistake: Mistake
    target: Object | None


# ---- mistakes ---------------------------------------------------------------------------------------------------


def slip(record: Record, scene: Scene, rng: np.random.Generator) -> Slip:
    """One mistake in a right scene, such that it plainly breaks the record."""
    weights = MISTAKES[record["tag"]]
    kinds = list(weights)
    order = rng.choice(len(kinds), size=len(kinds), replace=False, p=np.fromiter(weights.values(), float))
    for kind in (kinds[i] for i in order):
        for _ in range(4):
            made = _SLIPS[kind](record, scene, rng)
            if made is not None and not satisfies(record, made.scene, margin=-0.1):
                return made
    return _wrong_shape(record, scene, rng)  # breaks every prompt


def other(rng: np.random.Generator, names: Iterable[str], name: str) -> str:
    """Any of the names but this one."""
    left = [one for one in names if one != name]
    return left[rng.integers(len(left))]


def _wrong_color(record: Record, scene: Scene, rng: np.random.Generator) -> Slip:
    index = int(rng.integers(len(scene.objects)))
    target = scene.objects[index]
    wrong = replace(target, color=other(rng, tuple(COLORS), target.color))
    return Slip(put(scene, index, wrong), Mistake("color", clause_of(wrong)), target)


def _wrong_shape(record: Record, scene: Scene, rng: np.random.Generator) -> Slip:
    index = int(rng.integers(len(scene.objects)))
    target = scene.objects[index]
    wrong = replace(target, shape=other(rng, SHAPES, target.shape))
    return Slip(put(scene, index, wrong), Mistake("shape", clause_of(wrong)), target)


def _wrong_place(record: Record, scene: Scene, rng: np.random.Generator) -> Slip:
    index = int(rng.integers(len(scene.objects)))
    target = scene.objects[index]
    places = free_places([item.place for i, item in enumerate(scene.objects) if i != index])
    wrong = replace(target, place=places[rng.integers(len(places))])
    return Slip(put(scene, index, wrong), Mistake("place", clause_of(wrong)), target)


def _missing(record: Record, scene: Scene, rng: np.random.Generator) -> Slip:
    index = int(rng.integers(len(scene.objects)))
    target = scene.objects[index]
    return Slip(scene.without(index), Mistake("missing", clause_of(target)), target)


def _extra(record: Record, scene: Scene, rng: np.random.Generator) -> Slip | None:
    places = free_places([item.place for item in scene.objects])
    if not places:
        return None
    model = scene.objects[int(rng.integers(len(scene.objects)))]
    extra = replace(model, place=places[rng.integers(len(places))])
    return Slip(Scene((*scene.objects, extra)), Mistake("extra", clause_of(extra)), None)


_SLIPS: dict[str, Callable[[Record, Scene, np.random.Generator], Slip | None]] = {
    "color": _wrong_color,
    "shape": _wrong_shape,
    "place": _wrong_place,
    "missing": _missing,
    "extra": _extra,
}


def put(scene: Scene, index: int, item: Object) -> Scene:
    """The scene with another object in the place of one."""
    return Scene((*scene.objects[:index], item, *scene.objects[index + 1 :]))


# ---- worlds -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What the formats below are written of: tasks/digits has another one."""

    sample_scene_for: Callable[[Record, np.random.Generator], Scene]
    slip: Callable[[Record, Scene, np.random.Generator], Slip]
    requirement: Callable[[Record, str], Record]
    render: Callable[[Scene], np.ndarray]

    def slips(self, record: Record, scene: Scene, rng: np.random.Generator, count: int) -> list[Slip]:
        return [self.slip(record, scene, rng) for _ in range(count)]


SHAPES_WORLD = World(sample_scene_for, slip, requirement, render)
Write = Callable[[Record, np.random.Generator, float], Demonstration]  # a record, noise, the rate of mistakes


# ---- building blocks --------------------------------------------------------------------------------------------


class Writer:
    """Collects the parts of one demonstration; `render` draws its images."""

    def __init__(self, render: Callable[[Scene], np.ndarray]) -> None:
        self.render = render
        self.parts: list[Part] = []
        self.mistakes: list[int] = []
        self.needless: list[int] = []

    def say(self, role: str, text: str) -> None:
        self.parts.append(Part(role, text))

    def draw(self, role: str, scene: Scene, wrong: bool = False) -> None:
        if wrong:
            self.mistakes.append(len(self.parts))
        self.parts.append(Part(role, image=self.render(scene)))

    def finish(self, record: Record) -> Demonstration:
        return Demonstration(record["prompt"], record, tuple(self.parts), tuple(self.mistakes), tuple(self.needless))


def _critique(owed: Record, scene: Scene, made: Slip | None) -> str:
    """An inspection and a refinement as one free text."""
    if made is None:
        return f"{inspection(owed, scene, None)} ; keep all"
    return f"{inspection(owed, scene, made.mistake)} ; {refinement(made.mistake, made.target)}"


def _split(scene: Scene) -> tuple[list[Object], list[Object]]:
    """The objects of a first and a second stroke, each of one shape."""
    first = [item for item in scene.objects if item.shape == scene.objects[0].shape]
    second = [item for item in scene.objects if item.shape != scene.objects[0].shape]
    return (first, second) if second else (first[: len(first) // 2], first[len(first) // 2 :])


# ---- the formats ------------------------------------------------------------------------------------------------


def strokes(
    record: Record, rng: np.random.Generator, mistake_rate: float, world: World = SHAPES_WORLD
) -> Demonstration:
    """plan, sketch, inspect, (refine, redraw, inspect)*, and again from plan where a stroke is left.

    The first sketch attempts the whole prompt but for one in four thoughts on several objects, which are drawn in two
    strokes. A whole sketch that is right at once is planned and drawn a second time unchanged ("keep all"), which shows
    how to copy; the plan to do so is needless, so a policy learns from the other thoughts that "fine" is the end.
    """
    scene = world.sample_scene_for(record, rng)
    wrong = rng.random() < mistake_rate
    out = Writer(world.render)
    if len(scene.objects) > 1 and rng.random() < TWO_STROKES:
        first, second = _split(scene)
        part = Scene(tuple(first))
        text = plan(instruction("draw", first), part)
        late, both = rng.random(2) < (0.5, ANOTHER_MISTAKE)  # where it goes wrong
        _stroke(world, out, world.requirement(record, text), part, text, rng, int(wrong and (both or not late)))
        _stroke(world, out, record, scene, plan(instruction("add", second), scene), rng, int(wrong and (both or late)))
    elif wrong:
        _stroke(world, out, record, scene, plan("draw all", scene), rng, _how_often(rng))
    else:
        _stroke(world, out, record, scene, plan("draw all", scene), rng, 0)
        out.needless.append(len(out.parts))
        _stroke(world, out, record, scene, plan("keep all", scene), rng, 0)
    return out.finish(record)


def _how_often(rng: np.random.Generator) -> int:
    """How many images in a row go wrong where one does: 1 to MAX_IMAGES - 1."""
    return min(int(rng.geometric(1 - ANOTHER_MISTAKE)), MAX_IMAGES - 1)


def _stroke(
    world: World, out: Writer, record: Record, scene: Scene, plan_text: str, rng: np.random.Generator, wrong: int
) -> None:
    """One stroke with its inspections; the first `wrong` of its images have a mistake each."""
    out.say("plan", plan_text)
    role = "sketch"
    for made in world.slips(record, scene, rng, wrong):
        out.draw(role, made.scene, wrong=True)
        out.say("inspect", f"<inspect> {inspection(record, made.scene, made.mistake)} </inspect>")
        out.say("refine", f"<refine> {refinement(made.mistake, made.target)} </refine>")
        role = "redraw"
    out.draw(role, scene)
    out.say("inspect", f"<inspect> {inspection(record, scene, None)} </inspect>")


def subgoals(
    record: Record, rng: np.random.Generator, mistake_rate: float, world: World = SHAPES_WORLD
) -> Demonstration:
    """A plan in words, one or two images of its parts with words on each, then the image of the whole.

    Half of the parts that went wrong are drawn again before going on; the others are put right in the whole.
    """
    scene = world.sample_scene_for(record, rng)
    steps = [list(scene.objects)] if len(scene.objects) == 1 else list(_split(scene))
    out = Writer(world.render)
    out.say("plan", " ; ".join(describe(Scene(tuple(step))) for step in steps))
    wrong = int(rng.integers(len(steps))) if rng.random() < mistake_rate else -1
    for index, step in enumerate(steps):
        part = Scene(tuple(step))
        owed = world.requirement(record, f"<des> {describe(part)} </des>")
        repeat = rng.random() < 0.5
        for made in world.slips(owed, part, rng, int(index == wrong)):
            out.draw("subgoal", made.scene, wrong=True)
            out.say("reflect", _critique(owed, made.scene, made))
        if index != wrong or repeat:
            out.draw("subgoal", part)
            out.say("reflect", _critique(owed, part, None))
    out.draw("final", scene)
    return out.finish(record)


def self_critique(
    record: Record, rng: np.random.Generator, mistake_rate: float, world: World = SHAPES_WORLD
) -> Demonstration:
    """An image at once, words on it, and another image; again while the last one is wrong."""
    scene = world.sample_scene_for(record, rng)
    out = Writer(world.render)
    role = "sketch"
    for made in world.slips(record, scene, rng, _how_often(rng) if rng.random() < mistake_rate else 0):
        out.draw(role, made.scene, wrong=True)
        out.say("critique", _critique(record, made.scene, made))
        role = "redraw"
    if role == "sketch":
        out.draw(role, scene)
        out.say("critique", _critique(record, scene, None))
    out.draw("redraw", scene)
    return out.finish(record)


def look(record: Record, rng: np.random.Generator, mistake_rate: float) -> Demonstration:
    """plan, sketch, look, crop, inspect, and again from plan while the image is wrong.

    It looks at what is wrong, or at where something is missing; in a right image at any object. The plan after a wrong
    image is its repair.
    """
    scene = sample_scene_for(record, rng)
    out = Writer(render)
    text = describe(scene)
    wrong = min(_how_often(rng), MAX_LOOKED_AT - 1) if rng.random() < mistake_rate else 0
    for made in SHAPES_WORLD.slips(record, scene, rng, wrong):
        out.say("plan", f"<ins> {text} </ins>")
        out.draw("sketch", made.scene, wrong=True)
        glance(out, _block(made.mistake.object.place or PLACES[0]))
        out.say("inspect", f"<inspect> {inspection(record, made.scene, made.mistake)} </inspect>")
        text = refinement(made.mistake, made.target)
    out.say("plan", f"<ins> {text} </ins>")
    out.draw("sketch", scene)
    glance(out, _block(PLACES[scene.objects[rng.integers(len(scene.objects))].place]))
    out.say("inspect", f"<inspect> {inspection(record, scene, None)} </inspect>")
    return out.finish(record)


def _block(place: str) -> tuple[int, int, int, int]:
    row, column = divmod(PLACES.index(place), 3)
    return column * PATCH, row * PATCH, column * PATCH + BLOCK, row * PATCH + BLOCK


def glance(out: Writer, box: tuple[int, int, int, int]) -> None:
    """Ask for a part of the image before, and be shown it."""
    image = out.parts[-1].image
    assert image is not None
    out.say("look", f"<look> {' '.join(map(str, box))} </look>")
    out.parts.append(Part("crop", image=crop(image, box), author=Author.ENVIRONMENT))


def direct(record: Record, rng: np.random.Generator, mistake_rate: float, world: World = SHAPES_WORLD) -> Demonstration:
    """The whole in one image, without a word."""
    out = Writer(world.render)
    out.draw("final", world.sample_scene_for(record, rng))
    return out.finish(record)


FORMATS: dict[str, Write] = {
    "strokes": strokes,
    "subgoals": subgoals,
    "self_critique": self_critique,
    "look": look,
    "direct": direct,
}


def format_of(task: str, formats: Mapping[str, Write], name: str) -> Write:
    """Raises UserError for a format that has no demonstrations in that task."""
    if name not in formats:
        raise UserError(f"task '{task}' has no demonstrations in the format '{name}'; {nearest(name, formats)}")
    return formats[name]


def spread(
    write: Write,
    count: int,
    rng: np.random.Generator,
    mistake_rate: float,
    tags: Sequence[str],
    pool_of: Callable[[str], Sequence[Record]],
) -> list[Demonstration]:
    """`count` demonstrations over the records of all tags, each tag equally often, in any order."""
    made = []
    for index in range(count):
        records = pool_of(tags[index % len(tags)])
        made.append(write(records[int(rng.integers(len(records)))], rng, mistake_rate))
    return [made[i] for i in rng.permutation(count)]


def demonstrations(format: str, count: int, seed: int, mistake_rate: float = 0.5) -> list[Demonstration]:
    """`count` demonstrations over train prompts, all tags equally often. Raises UserError as `format_of`."""
    write = format_of("shapes", FORMATS, format)
    rng = np.random.default_rng([seed, list(FORMATS).index(format)])
    return spread(write, count, rng, mistake_rate, TAGS, lambda tag: pool("train", tag))
