"""Thoughts that somebody wrote at the levels middle and hard, in every format: what the warm start learns from.

What the prompt asks for is drawn step by step: each image adds the objects of some of its clauses, so that no picture
is composed at once (but in the format `direct`, which is one picture). In about half of the thoughts an image is wrong
on purpose, by one mistake in what it adds; the text after it names the mistake and the next image repairs it. The last
image is always right. `Demonstration.mistakes` says which images are wrong: a step that lacks what later ones add is
not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from tasks.base import Demonstration, Record
from tasks.shapes.demonstrations import (
    ANOTHER_MISTAKE,
    MAX_IMAGES,
    MAX_LOOKED_AT,
    Write,
    Writer,
    format_of,
    glance,
    spread,
)
from tasks.shapes.grid import SPAN, box_of, render, sample_scene_for, size_of
from tasks.shapes.grid_language import clause_of, describe, inspection, plan, refinement, requirement
from tasks.shapes.grid_mistakes import Slip, slip
from tasks.shapes.grid_prompts import TAGS, Level, pool
from tasks.shapes.language import Mistake
from tasks.shapes.world import PATCH, Object, Scene

THREE_STEPS = 0.4  # of the thoughts on three kinds of objects or more; the others have two


def steps(scene: Scene, rng: np.random.Generator, most: int = 3) -> list[Scene]:
    """The scene as it grows, at most `most` times: by one kind of objects or more at a time, or by halves of the only
    one."""
    kinds = [list(group) for _, group in groupby(scene.objects, key=lambda item: item.shape)]
    if len(kinds) == 1:
        half = (len(kinds[0]) + 1) // 2
        ends = [half, len(kinds[0])]
    else:
        count = 3 if most > 2 and len(kinds) > 2 and rng.random() < THREE_STEPS else 2
        inner = sorted(rng.choice(np.arange(1, len(kinds)), count - 1, replace=False).tolist())
        ends = [sum(map(len, kinds[:end])) for end in (*inner, len(kinds))]
    return [Scene(scene.objects[:end]) for end in ends[-most:]]


def _grown(parts: Sequence[Scene]) -> Iterator[tuple[int, Scene, list[int]]]:
    """Each step's number, scene, and indices of the objects that it adds."""
    before = 0
    for number, part in enumerate(parts):
        yield number, part, list(range(before, len(part.objects)))
        before = len(part.objects)


def _wrong_steps(rng: np.random.Generator, parts: int, room: int, mistake_rate: float) -> list[int]:
    """How many images of each step go wrong; at most `room` in all."""
    wrong = [0] * parts
    if room > 0 and rng.random() < mistake_rate:
        for _ in range(min(int(rng.geometric(1 - ANOTHER_MISTAKE)), room)):
            wrong[rng.integers(parts)] += 1
    return wrong


def _slips(owed: Record, part: Scene, new: Sequence[int], rng: np.random.Generator, count: int) -> list[Slip]:
    return [slip(owed, part, new, rng) for _ in range(count)]


# ---- the formats ------------------------------------------------------------------------------------------------


def strokes(record: Record, rng: np.random.Generator, mistake_rate: float) -> Demonstration:
    """plan, sketch, inspect, (refine, redraw, inspect)*, and again from plan for each step."""
    parts = steps(sample_scene_for(record, rng), rng)
    wrong = _wrong_steps(rng, len(parts), MAX_IMAGES - len(parts), mistake_rate)
    out = Writer(render)
    for number, part, new in _grown(parts):
        text = plan("add" if number else "draw", [part.objects[i] for i in new], part.objects)
        owed, role = requirement(record, text), "sketch"
        out.say("plan", text)
        for made in _slips(owed, part, new, rng, wrong[number]):
            out.draw(role, made.scene, wrong=True)
            out.say("inspect", f"<inspect> {inspection(owed, made.scene, [made.mistake])} </inspect>")
            out.say("refine", f"<refine> {refinement([made.mistake], made.target)} </refine>")
            role = "redraw"
        out.draw(role, part)
        out.say("inspect", f"<inspect> {inspection(owed, part, [])} </inspect>")
    return out.finish(record)


def _critique(owed: Record, scene: Scene, mistakes: Sequence[Mistake], target: Object | None) -> str:
    """An inspection and a refinement as one free text."""
    return f"{inspection(owed, scene, mistakes)} ; {refinement(mistakes, target) if mistakes else 'keep all'}"


def subgoals(record: Record, rng: np.random.Generator, mistake_rate: float) -> Demonstration:
    """A plan in words of what each step adds, an image of each step but the last with words on it, then the whole.

    A step that went wrong is drawn again before going on.
    """
    parts = steps(sample_scene_for(record, rng), rng)
    early = parts[:-1]
    wrong = _wrong_steps(rng, len(early), MAX_IMAGES - len(parts), mistake_rate)
    out = Writer(render)
    out.say("plan", " ; ".join(describe([part.objects[i] for i in new]) for _, part, new in _grown(parts)))
    for number, part, new in _grown(early):
        owed = requirement(record, f"<des> {describe(part.objects)} </des>")
        for made in _slips(owed, part, new, rng, wrong[number]):
            out.draw("subgoal", made.scene, wrong=True)
            out.say("reflect", _critique(owed, made.scene, [made.mistake], made.target))
        out.draw("subgoal", part)
        out.say("reflect", _critique(owed, part, [], None))
    out.draw("final", parts[-1])
    return out.finish(record)


def _still_missing(part: Scene, scene: Scene) -> list[Mistake]:
    return [Mistake("missing", clause_of(item)) for item in scene.objects[len(part.objects) :]]


def self_critique(record: Record, rng: np.random.Generator, mistake_rate: float) -> Demonstration:
    """An image of the first step, words on what it still lacks, and an image of the whole; again while that is wrong.

    A whole that is right at once is called so and drawn a second time unchanged.
    """
    scene = sample_scene_for(record, rng)
    part, whole = steps(scene, rng, most=2)
    out = Writer(render)
    out.draw("sketch", part)
    missing = _still_missing(part, scene)
    out.say("critique", _critique(record, part, missing, None))
    wrong = sum(_wrong_steps(rng, 1, MAX_IMAGES - 2, mistake_rate))
    new = range(len(part.objects), len(whole.objects))
    for made in _slips(record, whole, new, rng, wrong):
        out.draw("redraw", made.scene, wrong=True)
        out.say("critique", _critique(record, made.scene, [made.mistake], made.target))
    if not wrong:
        out.draw("redraw", whole)
        out.say("critique", _critique(record, whole, [], None))
    out.draw("redraw", whole)
    return out.finish(record)


def look(record: Record, rng: np.random.Generator, mistake_rate: float) -> Demonstration:
    """plan, sketch, look, crop, inspect, and again from plan while the image lacks something or is wrong.

    It looks at what is wrong, or at where something is missing; in a right image at any object.
    """
    scene = sample_scene_for(record, rng)
    part, whole = steps(scene, rng, most=2)
    out = Writer(render)
    text = describe(part.objects)

    def seen(shown: Scene, at: Object, mistakes: Sequence[Mistake], wrong: bool = False) -> None:
        out.say("plan", f"<ins> {text} </ins>")
        out.draw("sketch", shown, wrong=wrong)
        glance(out, _block(at))
        out.say("inspect", f"<inspect> {inspection(record, shown, mistakes)} </inspect>")

    missing = _still_missing(part, scene)
    seen(part, scene.objects[len(part.objects)], missing)
    text = refinement(missing, None)
    wrong = sum(_wrong_steps(rng, 1, MAX_LOOKED_AT - 2, mistake_rate))
    for made in _slips(record, whole, range(len(part.objects), len(whole.objects)), rng, wrong):
        at = next((item for item in made.scene.objects if clause_of(item) == made.mistake.object), made.target)
        assert at is not None
        seen(made.scene, at, [made.mistake], wrong=True)
        text = refinement([made.mistake], made.target)
    seen(whole, whole.objects[rng.integers(len(whole.objects))], [])
    return out.finish(record)


def _block(item: Object) -> tuple[int, int, int, int]:
    """The cells of an object, in px."""
    x, y, _, _ = box_of(size_of(item), item.place)
    x, y, side = x // PATCH * PATCH, y // PATCH * PATCH, SPAN[size_of(item)] * PATCH
    return x, y, x + side, y + side


def direct(record: Record, rng: np.random.Generator, mistake_rate: float) -> Demonstration:
    """The whole in one image, without a word."""
    out = Writer(render)
    out.draw("final", sample_scene_for(record, rng))
    return out.finish(record)


FORMATS: dict[str, Write] = {
    "strokes": strokes,
    "subgoals": subgoals,
    "self_critique": self_critique,
    "look": look,
    "direct": direct,
}


def demonstrations(level: Level, format: str, count: int, seed: int, mistake_rate: float = 0.5) -> list[Demonstration]:
    """`count` demonstrations over train prompts, all tags equally often. Raises UserError as `format_of`."""
    write = format_of("shapes", FORMATS, format)
    rng = np.random.default_rng([seed, list(FORMATS).index(format), list(TAGS).index(level)])
    return spread(write, count, rng, mistake_rate, TAGS[level], lambda tag: pool(level, "train", tag))
