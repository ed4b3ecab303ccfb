"""The true words on an image that somebody else drew: a policy's own sketch, or one that was corrupted.

This is the level easy, and what grid_critic.py has in common with it: GenEval's rule, and the formats.

What the detector sees is judged by GenEval's rule, put into the language's slots, and repaired one mistake at a time.
Where slots and rule disagree (two circles of which one has the color: which of them does the rule look at?) there are
no true words, and so no critique.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from formats.base import Part
from runtime.errors import UserError, nearest
from tasks.base import Critique, Detection, Record
from tasks.shapes.language import (
    Clause,
    Mistake,
    assigned,
    clause_of,
    inspection,
    parse_plan,
    refinement,
    requirement,
)
from tasks.shapes.prompts import RELATION_MARGIN, related
from tasks.shapes.render import render
from tasks.shapes.world import COLORS, JITTERS, PATCH, PLACES, Object, Scene, disjoint, free_places, place_of

FORMATS = ("strokes", "self_critique")
# GenEval's own: scores that an object must exceed, and one in a prompt that counts.
SCORE_THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_SEEN = 8  # objects; where a smeared image holds more, its words would be longer than any that is learned


@dataclass(frozen=True)
class Fault:
    """The first mistake of an image, the object as it should be (None: there should be none), and the image after its
    repair (None: it cannot be repaired by one change that leaves room for all objects)."""

    mistake: Mistake
    target: Object | None
    repaired: Scene | None
    besides: tuple[Mistake, ...] = ()  # others that the same change mends


@dataclass(frozen=True)
class Speech:
    """How a level judges, words and draws the scenes of one prompt."""

    fault_of: Callable[[Scene], Fault | None]
    inspection: Callable[[Scene, Fault | None], str]
    refinement: Callable[[Fault], str]
    render: Callable[[Scene], np.ndarray]


def critique(
    format: str, record: Record, before: Sequence[Part], detections: Sequence[Detection], images: int, seed: int
) -> Critique | None:
    """See CriticTask.critique; `detections` are of the last image.

    Raises:
        UserError: no critiques are written in that format.
    """
    check_format(format)
    said = plan_of(before)
    owed = requirement(record, said)
    seen = certain(owed, detections)
    if len(seen) > MAX_SEEN:
        return None
    scene = Scene(tuple(_object(one) for one in seen))
    rng = np.random.default_rng(seed)
    planned = parse_plan(said) or []
    fault = fault_of(owed, scene, planned, rng)
    fine = satisfied(owed, seen)
    if fine != (fault is None):
        return None
    speech = Speech(
        lambda scene: fault_of(owed, scene, planned, rng),
        lambda scene, fault: inspection(owed, scene, None if fault is None else fault.mistake),
        lambda fault: refinement(fault.mistake, fault.target),
        render,
    )
    return written(format, speech, scene, fault, images, before[-1].image, whole=owed is record)


def check_format(format: str) -> None:
    """Raises UserError where no critiques are written in that format."""
    if format not in FORMATS:
        raise UserError(f"task 'shapes' writes no critiques in the format '{format}'; {nearest(format, FORMATS)}")


def plan_of(before: Sequence[Part]) -> str:
    """What was planned last; empty: nothing was."""
    return next((part.text for part in reversed(before) if part.role == "plan"), "")


# ---- what is so -------------------------------------------------------------------------------------------------


def certain(record: Record, detections: Sequence[Detection]) -> list[Detection]:
    """What the rule takes for objects, best score first."""
    threshold = COUNTING_THRESHOLD if record.get("tag") == "counting" else SCORE_THRESHOLD
    return sorted((one for one in detections if one.score > threshold), key=lambda one: -one.score)


def satisfied(record: Record, seen: Sequence[Detection]) -> bool:
    """GenEval's rule (arXiv:2310.11513) on objects, best first. `rewards/functions/geneval.py` has it for any world."""
    groups: list[list[Detection] | None] = []
    for clause in record["include"]:
        group = [one for one in seen if one.cls == clause["class"]][: clause["count"]]
        right = len(group) == clause["count"]
        if "color" in clause:
            right &= all(one.color == clause["color"] for one in group)
        if "size" in clause:
            right &= all(one.size == clause["size"] for one in group)
        if "position" in clause:
            relation, target = clause["position"]
            others = groups[target]
            right &= others is not None
            right &= all(related(one.box, relation, other.box) for one in group for other in others or ())
        groups.append(group if right else None)
    return None not in groups and all(
        sum(one.cls == clause["class"] for one in seen) < clause["count"] for clause in record.get("exclude", ())
    )


def _object(one: Detection) -> Object:
    place = place_of(one.box)
    row, column = divmod(place, 3)
    offset = np.array([one.box[0] - column * PATCH, one.box[1] - row * PATCH])
    jitter = int(((offset - np.array(JITTERS)) ** 2).sum(1).argmin())
    return Object(one.cls, one.color or next(iter(COLORS)), place, jitter)


# ---- what is wrong, and its repair ------------------------------------------------------------------------------


def fault_of(owed: Record, scene: Scene, planned: Sequence[Clause], rng: np.random.Generator) -> Fault | None:
    """The first of a scene's mistakes, in the order in which they are mended: what is missing or another shape or
    color, slot by slot, then where it stands, then what is too many. None: nothing is wrong.

    Args:
        planned: what the plan describes, by which a missing object gets the color and place that were left open.
    """
    wanted, filled, left = assigned(owed, scene)
    for clause, item in zip(wanted, filled, strict=True):
        if item is None:
            return _missing(clause, filled, scene, planned, rng)
        if item.shape != clause["class"]:
            return _changed(scene, item, Mistake("shape", clause_of(item)), replace(item, shape=clause["class"]))
        if item.color != clause.get("color", item.color):
            return _changed(scene, item, Mistake("color", clause_of(item)), replace(item, color=clause["color"]))
    for clause, item in zip(wanted, filled, strict=True):
        assert item is not None
        if not _placed(clause, item, filled):
            return _misplaced(clause, item, filled, scene, rng)
    counted = {clause["class"] for clause in owed.get("exclude", ())}
    extra = next((item for item in left if item.shape in counted), None)
    if extra is None:
        return None
    without = Scene(tuple(item for item in scene.objects if item is not extra))
    return Fault(Mistake("extra", clause_of(extra)), None, _tidy(without))


def _missing(
    clause: dict[str, Any],
    filled: Sequence[Object | None],
    scene: Scene,
    planned: Sequence[Clause],
    rng: np.random.Generator,
) -> Fault:
    left = [c for c in planned if c.shape == clause["class"] and clause.get("color", c.color) == c.color]
    for item in scene.objects:
        match = next((c for c in left if c.matches(clause_of(item))), None)
        if match is not None:
            left.remove(match)
    plan = left[0] if left else Clause(clause["class"])
    color = clause.get("color") or plan.color or list(COLORS)[rng.integers(len(COLORS))]
    free = free_places([item.place for item in scene.objects])
    if plan.place in PLACES and PLACES.index(plan.place) in free:
        free = [PLACES.index(plan.place)]
    target = _somewhere(clause, Object(clause["class"], color, 0), free, filled, rng)
    if target is None:
        return Fault(Mistake("missing", Clause(clause["class"], color)), None, None)
    repaired = _tidy(Scene((*scene.objects, target)))
    return Fault(Mistake("missing", clause_of(target)), target, repaired)


def _misplaced(
    clause: dict[str, Any], item: Object, filled: Sequence[Object | None], scene: Scene, rng: np.random.Generator
) -> Fault:
    """The object itself is moved or, where it can go nowhere, the one that it is placed by."""
    relation, at = clause["position"]
    reference = filled[at]
    assert reference is not None
    for moved in (item, reference):
        free = free_places([other.place for other in scene.objects if other is not moved])
        choices = [
            one
            for one in (replace(moved, place=place) for place in free)
            if related(
                (one if moved is item else item).box,
                relation,
                (reference if moved is item else one).box,
                RELATION_MARGIN,
            )
        ]
        if choices:
            return _changed(scene, moved, Mistake("place", clause_of(moved)), choices[rng.integers(len(choices))])
    return Fault(Mistake("place", clause_of(item)), None, None)


def _changed(scene: Scene, item: Object, mistake: Mistake, target: Object) -> Fault:
    return Fault(mistake, target, _tidy(Scene(tuple(target if one is item else one for one in scene.objects))))


def _placed(clause: dict[str, Any], item: Object, filled: Sequence[Object | None], margin: float = 0.0) -> bool:
    if "position" not in clause:
        return True
    relation, target = clause["position"]
    other = filled[target]
    return other is None or related(item.box, relation, other.box, margin)


def _somewhere(
    clause: dict[str, Any],
    item: Object,
    places: Sequence[int],
    filled: Sequence[Object | None],
    rng: np.random.Generator,
) -> Object | None:
    """The object at one of these places, such that its clause's relation plainly holds. None: it can stand nowhere."""
    choices = [replace(item, place=place) for place in places]
    choices = [one for one in choices if _placed(clause, one, filled, RELATION_MARGIN)]
    return choices[rng.integers(len(choices))] if choices else None


def _tidy(scene: Scene) -> Scene | None:
    """The scene, if its objects do not paint over one another; else None: nobody could draw it."""
    places = [item.place for item in scene.objects]
    apart = all(disjoint(a, b) for number, a in enumerate(places) for b in places[:number])
    return scene if apart else None


# ---- the formats ------------------------------------------------------------------------------------------------

Written = tuple[list[Part], list[int], bool]  # parts, which of them are wrong images, whether the thought may end


def written(
    format: str,
    speech: Speech,
    scene: Scene,
    fault: Fault | None,
    images: int,
    image: np.ndarray | None,
    whole: bool,
) -> Critique | None:
    """The critique of an image of this scene, with this fault, in one of FORMATS. None: it has no words for it.

    Args:
        images: how many may still be drawn.
        whole: whether the image owes all that the prompt asks for, so that the thought may end when it is right.
    """
    write = _strokes if format == "strokes" else _self_critique
    found = write(speech, scene, fault, images, image)
    if found is None:
        return None
    parts, mistakes, ends = found
    return Critique(fault is None, tuple(parts), tuple(mistakes), ends and whole)


def _strokes(
    speech: Speech, scene: Scene, fault: Fault | None, images: int, image: np.ndarray | None
) -> Written | None:
    """inspect, (refine, redraw, inspect)* for as long as there are images left."""
    parts: list[Part] = []
    mistakes: list[int] = []
    while True:
        parts.append(Part("inspect", f"<inspect> {speech.inspection(scene, fault)} </inspect>"))
        if fault is None or fault.repaired is None or not images:
            return parts, mistakes, fault is None
        parts.append(Part("refine", f"<refine> {speech.refinement(fault)} </refine>"))
        scene, images = fault.repaired, images - 1
        fault = speech.fault_of(scene)
        if fault is not None:
            mistakes.append(len(parts))
        parts.append(Part("redraw", image=speech.render(scene)))


def _self_critique(
    speech: Speech, scene: Scene, fault: Fault | None, images: int, image: np.ndarray | None
) -> Written | None:
    """(critique, redraw)*; a right image is drawn once more as it is. None where no image may follow."""
    parts: list[Part] = []
    mistakes: list[int] = []
    while images and (fault is None or fault.repaired is not None):
        if fault is None:
            parts.append(Part("critique", f"{speech.inspection(scene, None)} ; keep all"))
            parts.append(Part("redraw", image=image))
            return parts, mistakes, True
        parts.append(Part("critique", f"{speech.inspection(scene, fault)} ; {speech.refinement(fault)}"))
        assert fault.repaired is not None
        scene, images, image = fault.repaired, images - 1, speech.render(fault.repaired)
        fault = speech.fault_of(scene)
        if fault is not None:
            mistakes.append(len(parts))
        parts.append(Part("redraw", image=image))
        if fault is None:
            return parts, mistakes, True
    return (parts, mistakes, False) if parts else None
