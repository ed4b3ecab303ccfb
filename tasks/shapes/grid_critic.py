"""The true words on an image that somebody else drew, at the levels middle and hard: critic.py's with sizes and counts.

A verdict is given where GenEval's rule, the strict rule (exact counts) and the slots of the language agree. A second
circle where nobody counts circles is fine to the one rule and wrong to the other, and the language has no name for it:
of such an image there are no true words, and none is drawn as a repair.

Mistakes are mended one by one, but all that is missing at once. What can be mended comes before what cannot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from formats.base import Part
from tasks.base import Critique, Detection, Record
from tasks.shapes.critic import Fault, Speech, certain, check_format, plan_of, satisfied, written
from tasks.shapes.grid import SIZES, Sized, free_places, place_of, render, size_of
from tasks.shapes.grid_language import (
    agrees,
    assigned,
    clause_of,
    holds,
    inspection,
    parse_plan,
    refinement,
    requirement,
)
from tasks.shapes.language import Clause, Kind, Mistake
from tasks.shapes.prompts import RELATION_MARGIN, related
from tasks.shapes.world import COLORS, Object, Scene

MAX_SEEN = 10  # objects; where a smeared image holds more, its words would be longer than any that is learned


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
    scene = Scene(tuple(_object(one) for one in seen))
    if len(seen) > MAX_SEEN or len(set(scene.objects)) < len(seen) or not _plain(owed, scene, seen):
        return None
    mender = Mender(owed, parse_plan(said) or [], np.random.default_rng(seed))
    fault = mender.fault_of(scene)
    # Boxes that were seen are not always those of the cells that they are named by.
    if fault is not None and not all(holds(mistake, owed, seen) for mistake in _mistakes(fault)):
        return None
    speech = Speech(
        mender.fault_of,
        lambda scene, fault: inspection(owed, scene, _mistakes(fault)),
        lambda fault: refinement(_mistakes(fault), fault.target),
        render,
    )
    return written(format, speech, scene, fault, images, before[-1].image, whole=owed is record)


def _mistakes(fault: Fault | None) -> list[Mistake]:
    return [] if fault is None else [fault.mistake, *fault.besides]


# ---- what is so -------------------------------------------------------------------------------------------------


def _object(one: Detection) -> Sized:
    size = one.size or "small"
    return Sized(one.cls, one.color or next(iter(COLORS)), place_of(one.box, size), size=size)


def _plain(owed: Record, scene: Scene, seen: Sequence[Detection]) -> bool:
    """Whether GenEval's rule, the strict one and the language's slots say the same."""
    counts = Counter(one.cls for one in seen)
    right = satisfied(owed, seen)
    strict = right and all(counts[clause["class"]] == clause["count"] for clause in owed["include"])
    return right == strict == agrees(owed, scene)


def exactly(scene: Scene) -> list[Detection]:
    """What a detector sees of a scene that was drawn exactly."""
    found = [
        Detection((float(x0), float(y0), float(x1), float(y1)), 1.0, item.color, None, item.shape, size_of(item))
        for item in scene.objects
        for x0, y0, x1, y1 in [item.box]
    ]
    return sorted(found, key=lambda one: (one.box[1], one.box[0]))


# ---- what is wrong, and its repair ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mender:
    """Finds what is wrong with scenes, and how to repair it.

    Attributes:
        owed: what they must show.
        planned: what the plan describes, by which a missing object gets what the prompt leaves open.
    """

    owed: Record
    planned: Sequence[Clause]
    rng: np.random.Generator

    def fault_of(self, scene: Scene) -> Fault | None:
        """The first mistake that one change can mend, else the first one: what stands in a slot and is of another
        shape, color or size, slot by slot, then what is missing, then where things stand, then what is too many.
        None: nothing is wrong."""
        first: Fault | None = None
        for fault in self._faults(scene):
            repaired = fault.repaired
            if repaired is not None and _tidy(repaired) and _plain(self.owed, repaired, exactly(repaired)):
                return fault
            first = first or replace(fault, repaired=None)
        return first

    def _faults(self, scene: Scene) -> Iterator[Fault]:
        filled, extra = assigned(self.owed, scene)
        clauses: Sequence[dict[str, Any]] = self.owed["include"]
        for clause, group in zip(clauses, filled, strict=True):
            for item in group:
                if item.shape != clause["class"]:
                    yield _changed(scene, item, "shape", replace(item, shape=clause["class"]))
                    continue
                if item.color != clause.get("color", item.color):
                    yield _changed(scene, item, "color", replace(item, color=clause["color"]))
                if size_of(item) != clause.get("size", size_of(item)):
                    yield _changed(scene, item, "size", _with_size(item, clause["size"]))
        if any(len(group) < clause["count"] for clause, group in zip(clauses, filled, strict=True)):
            yield self._missing(scene, filled)
        yield from self._misplaced(scene, filled)
        for item in extra:
            yield Fault(Mistake("extra", clause_of(item)), None, _without(scene, item))

    def _missing(self, scene: Scene, filled: Sequence[Sequence[Object]]) -> Fault:
        """Everything that is missing, added at once: the large objects first, for they are the harder ones to place."""
        groups = [list(group) for group in filled]
        waiting = self._unbuilt(scene)
        wanted = [
            (index, self._looks(clause, groups[index], waiting))
            for index, clause in enumerate(self.owed["include"])
            for _ in range(clause["count"] - len(groups[index]))
        ]
        objects = list(scene.objects)
        added: list[tuple[int, Object]] = []
        for index, clause in sorted(wanted, key=lambda one: one[1].size != "large"):
            item = self._somewhere(index, clause, groups, objects)
            if item is None:
                unplaced = [Mistake("missing", replace(clause, place=None)) for _, clause in wanted]
                once = list(dict.fromkeys(unplaced))
                return Fault(once[0], None, None, tuple(once[1:]))
            groups[index].append(item)
            objects.append(item)
            added.append((index, item))
        added.sort(key=lambda one: (one[0], one[1].place))
        mistakes = [Mistake("missing", clause_of(item)) for _, item in added]
        whole = Scene((*scene.objects, *(item for _, item in added)))
        return Fault(mistakes[0], None, whole, tuple(mistakes[1:]))

    def _unbuilt(self, scene: Scene) -> list[Clause]:
        """What was planned and does not stand there."""
        left = list(self.planned)
        for item in scene.objects:
            match = next((clause for clause in left if clause.matches(clause_of(item))), None)
            if match is not None:
                left.remove(match)
        return left

    def _looks(self, clause: dict[str, Any], group: Sequence[Object], waiting: list[Clause]) -> Clause:
        """A missing object: as the prompt wants it, else as it was planned (taken from `waiting`), else as the others
        of its kind are."""
        wanted = Clause(clause["class"], clause.get("color"), None, clause.get("size"))
        plan = next((one for one in waiting if one.matches(wanted)), None)
        if plan is not None:
            waiting.remove(plan)
        like = next((clause_of(item) for item in group if item.shape == clause["class"]), Clause(clause["class"]))
        named = plan or Clause(clause["class"])
        color = wanted.color or named.color or like.color or list(COLORS)[self.rng.integers(len(COLORS))]
        return Clause(wanted.shape, color, named.place, wanted.size or named.size or like.size or next(iter(SIZES)))

    def _somewhere(
        self, index: int, clause: Clause, groups: Sequence[Sequence[Object]], objects: Sequence[Object]
    ) -> Object | None:
        """The object where all relations of its clause plainly hold, where it was planned if they do there; else
        anywhere. None: there is no room."""
        size = clause.size or next(iter(SIZES))
        choices: list[Object] = [
            Sized(clause.shape, str(clause.color), place, size=size) for place in free_places(size, objects)
        ]
        good = [one for one in choices if self._broken(index, one, groups, RELATION_MARGIN) == 0]
        planned = [one for one in good if clause_of(one).place == clause.place]
        choices = planned or good or choices
        return choices[self.rng.integers(len(choices))] if choices else None

    def _misplaced(self, scene: Scene, filled: Sequence[Sequence[Object]]) -> Iterator[Fault]:
        """Each object with a relation that does not hold, moved to where more of its relations do; those first that
        then have no broken one."""
        found: list[tuple[int, Fault]] = []
        for index, group in enumerate(filled):
            for item in group:
                now = self._broken(index, item, filled)
                if not now or item.shape != self.owed["include"][index]["class"]:
                    continue
                places = free_places(size_of(item), [other for other in scene.objects if other is not item])
                moved = [replace(item, place=place) for place in places]
                broken = [self._broken(index, one, filled, RELATION_MARGIN) for one in moved]
                least = min(broken, default=now)
                best = [one for one, number in zip(moved, broken, strict=True) if number == least]
                if least < now:
                    target = best[self.rng.integers(len(best))]
                    found.append((least, _changed(scene, item, "place", target)))
                else:
                    found.append((now, Fault(Mistake("place", clause_of(item)), None, None)))
        yield from (fault for _, fault in sorted(found, key=lambda one: one[0]))

    def _broken(self, index: int, item: Object, groups: Sequence[Sequence[Object]], margin: float = 0.0) -> int:
        """How many relations to the objects of other slots would not hold, if the object stood in slot `index`."""
        number = 0
        for at, clause in enumerate(self.owed["include"]):
            if "position" not in clause:
                continue
            relation, target = clause["position"]
            if at == index:
                number += sum(not related(item.box, relation, other.box, margin) for other in groups[target])
            elif target == index:
                number += sum(not related(other.box, relation, item.box, margin) for other in groups[at])
        return number


def _changed(scene: Scene, item: Object, kind: Kind, target: Object) -> Fault:
    repaired = Scene(tuple(target if one is item else one for one in scene.objects))
    return Fault(Mistake(kind, clause_of(item)), target, repaired)


def _with_size(item: Object, size: str) -> Sized:
    assert isinstance(item, Sized)
    return replace(item, size=size)


def _without(scene: Scene, item: Object) -> Scene:
    return Scene(tuple(one for one in scene.objects if one is not item))


def _tidy(scene: Scene) -> bool:
    """Whether every object stands where it may, and none over another."""
    return all(
        item.place in free_places(size_of(item), scene.objects[:number]) for number, item in enumerate(scene.objects)
    )
