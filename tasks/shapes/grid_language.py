"""The little language of the levels middle and hard: language.py's with sizes, cells for places, and groups.

Objects that agree in size, color and shape are named together, so that eight of them take a dozen words:

    description   small red circle a1 b2 c4 , large blue square c1
    plan          <ins> add two squares and one cross </ins> <des> DESCRIPTION </des>
    inspection    SLOT , SLOT : fine                                    one SLOT for each clause of the prompt
                  SLOT , SLOT : wrong size large red circle a1          and the mistake, by kind and object
                  with SLOTs such as: three red circle = small red circle a1 b2 c4 yes
                                      right of square = small blue square a1 no
                                      two cross = small red cross a1 and small blue cross b1 no
                                      cross = nothing no
    refinement    make large red circle a1 small | make small red circle a1 blue | make small red circle a1 cross
                  move small red circle a1 to d2 | remove small red circle a1
                  add small red circle a1 b2 and large blue square c1

A place is a cell, by column and row: a1 to d4; a large object's is the upper left one of its four. An inspection of an
image that lacks what is still to be drawn says so of each group: "wrong missing small red circle a1 b2 , missing large
blue square c1". Its kinds of mistake are the easy level's and `size`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from tasks.base import Detection, Record
from tasks.shapes.grid import CELLS, SIZES, place_of, size_of
from tasks.shapes.grid_prompts import NUMBERS, prompt_words
from tasks.shapes.language import (
    DES,
    KINDS,
    TAG,
    VERBS,
    Claim,
    Clause,
    Kind,
    Mistake,
    holds_of,
    owed_by,
)
from tasks.shapes.prompts import plural, related
from tasks.shapes.world import COLORS, SHAPES, Object, Scene

GRID_KINDS: tuple[Kind, ...] = (*KINDS, "size")


def vocabulary() -> set[str]:
    """Every word of the language, prompts apart."""
    words = {*CELLS, *VERBS, *GRID_KINDS, *prompt_words()}
    return words | {"nothing", "fine", "wrong", "yes", "no", "=", ",", ":", ";"}


# ---- writing ----------------------------------------------------------------------------------------------------


def clause_of(item: Object) -> Clause:
    return Clause(item.shape, item.color, CELLS[item.place], size_of(item))


def groups(clauses: Iterable[Clause]) -> list[str]:
    """Neighbours that differ in nothing but their places, together."""
    return [
        " ".join([str(looks), *(clause.place for clause in group if clause.place)])
        for looks, group in groupby(clauses, key=lambda clause: replace(clause, place=None))
    ]


def describe(objects: Iterable[Object], between: str = " , ") -> str:
    """All objects in the order given."""
    return between.join(groups(map(clause_of, objects))) or "nothing"


def plan(verb: str, new: Sequence[Object], whole: Sequence[Object]) -> str:
    """What is drawn or added now, and what the image shows then."""
    return f"<ins> {instruction(verb, new)} </ins> <des> {describe(whole)} </des>"


def instruction(verb: str, items: Sequence[Object]) -> str:
    """ "draw one circle", "add two squares and one cross"."""
    counts = [(shape, len(list(group))) for shape, group in groupby(item.shape for item in items)]
    named = [f"{NUMBERS[count]} {shape if count == 1 else plural(shape)}" for shape, count in counts]
    return f"{verb} {' and '.join(named)}"


def mistakes_said(mistakes: Sequence[Mistake]) -> str:
    """ "missing small red circle a1 b2 , size large blue square c1" """
    said = []
    for kind, some in groupby(mistakes, key=lambda mistake: mistake.kind):
        said += [f"{kind} {group}" for group in groups(mistake.object for mistake in some)]
    return " , ".join(said)


def inspection(owed: Record, scene: Scene, mistakes: Sequence[Mistake]) -> str:
    """owed: what the image must show (`requirement`)."""
    return f"{slots(owed, scene)} : {f'wrong {mistakes_said(mistakes)}' if mistakes else 'fine'}"


def agrees(owed: Record, scene: Scene) -> bool:
    """Whether every slot of an inspection is marked "yes"."""
    return "no" not in slots(owed, scene).split()


def slots(owed: Record, scene: Scene) -> str:
    """What is wanted beside what is seen, clause by clause, and whether they agree.

    A slot holds the objects of its class, those first that fit and then in reading order. What is left stands where
    something lacks, and else, where the class is counted, beside the others of it: one too many.
    """
    include = owed["include"]
    filled, extra = assigned(owed, scene)
    for clause, group in zip(include, filled, strict=True):
        group += [item for item in extra if item.shape == clause["class"]]
        group.sort(key=lambda item: item.place)
    said = []
    for index, (clause, group) in enumerate(zip(include, filled, strict=True)):
        mark = "yes" if _agrees(index, include, filled) else "no"
        said.append(f"{_wanted(clause)} = {describe(group, ' and ')} {mark}")
    return " , ".join(said)


def assigned(owed: Record, scene: Scene) -> tuple[list[list[Object]], list[Object]]:
    """The objects in the slot of each clause, at most as many as it asks for, and those that are one too many of a
    counted class."""
    include = owed["include"]
    counted = {clause["class"] for clause in owed.get("exclude", ())}
    left = sorted(scene.objects, key=lambda item: item.place)
    filled: list[list[Object]] = []
    for clause in include:
        own = [item for item in left if item.shape == clause["class"]]
        filled.append(sorted(own, key=lambda item: not _fits(item, clause))[: clause["count"]])
        left = [item for item in left if item not in filled[-1]]
    for clause, group in zip(include, filled, strict=True):
        while left and len(group) < clause["count"]:
            group.append(left.pop(0))
    named = {clause["class"] for clause in include}
    return filled, [item for item in left if item.shape in named & counted]


def _fits(item: Object, clause: dict[str, Any]) -> bool:
    return item.color == clause.get("color", item.color) and size_of(item) == clause.get("size", size_of(item))


def _wanted(clause: dict[str, Any]) -> str:
    relation = [clause["position"][0]] if "position" in clause else []
    number = [NUMBERS[clause["count"]]] if clause["count"] > 1 else []
    return " ".join([*relation, *number, *(clause[key] for key in ("size", "color") if key in clause), clause["class"]])


def _agrees(index: int, include: Sequence[dict[str, Any]], filled: Sequence[Sequence[Object]]) -> bool:
    clause, group = include[index], filled[index]
    if len(group) != clause["count"] or any(i.shape != clause["class"] or not _fits(i, clause) for i in group):
        return False
    if "position" not in clause:
        return True
    relation, target = clause["position"]
    return bool(filled[target]) and all(related(a.box, relation, b.box) for a in group for b in filled[target])


def refinement(mistakes: Sequence[Mistake], target: Object | None) -> str:
    """How to repair it.

    Args:
        mistakes: several where all of them are missing objects, which are named as they should be.
        target: the object as it should be; None where one is to be removed, or where something is missing.
    """
    mistake = mistakes[0]
    if mistake.kind == "missing":
        return f"add {' and '.join(groups(mistake.object for mistake in mistakes))}"
    if target is None:
        return f"remove {mistake.object}"
    if mistake.kind == "place":
        return f"move {mistake.object} to {CELLS[target.place]}"
    wanted = {"color": target.color, "size": size_of(target), "shape": target.shape}
    return f"make {mistake.object} {wanted[mistake.kind]}"


# ---- reading ----------------------------------------------------------------------------------------------------


def _parse_group(words: Sequence[str]) -> list[Clause] | None:
    rest = list(words)
    size = rest.pop(0) if rest and rest[0] in SIZES else None
    color = rest.pop(0) if rest and rest[0] in COLORS else None
    shape = rest.pop(0) if rest and rest[0] in SHAPES else None
    if shape is None or any(place not in CELLS for place in rest):
        return None
    return [Clause(shape, color, place, size) for place in rest] or [Clause(shape, color, None, size)]


def _parse_groups(texts: Iterable[str]) -> list[Clause] | None:
    found: list[Clause] = []
    for text in texts:
        group = _parse_group(text.split())
        if group is None:
            return None
        found += group
    return found


def parse_description(text: str) -> list[Clause] | None:
    """The objects of a description, one by one; sizes, colors and places may be left out. None: it is no
    description."""
    words = " ".join(TAG.sub(" ", text).split())
    return [] if words == "nothing" else _parse_groups(words.split(","))


def parse_plan(text: str) -> list[Clause] | None:
    """What the last <des> ... </des> of a plan describes. None: there is none, or it cannot be read."""
    bodies = DES.findall(text)
    return parse_description(bodies[-1]) if bodies else None


def _parse_slots(text: str) -> list[Clause] | None:
    """The objects that an inspection sees; what it wants and whether it agrees may be left out."""
    seen: list[Clause] = []
    for part in text.split(","):
        words = part.split()
        words = words[words.index("=") + 1 :] if "=" in words else words
        words = words[:-1] if words and words[-1] in ("yes", "no") else words
        if words == ["nothing"]:
            continue
        found = _parse_groups(" ".join(words).split(" and "))
        if found is None:
            return None
        seen += found
    return seen


def claims(text: str) -> Claim:
    """What an inspection (or a critique: an inspection and a refinement joined by ";") says. Takes any text."""
    said = " ".join(TAG.sub(" ", text).split(";")[0].split())
    before, colon, after = said.rpartition(":")
    listed = _parse_slots(before) if colon else None
    seen = None if listed is None else tuple(listed)
    words = after.split()
    verdicts = {word for word in words if word in ("fine", "wrong")}
    if len(verdicts) != 1:
        return Claim(None, (), seen)
    if "fine" in verdicts:
        return Claim("fine", (), seen)
    mistakes: list[Mistake] = []
    for part in " ".join(words[words.index("wrong") + 1 :]).split(","):
        kind, *group_words = part.split() or [""]
        group = _parse_group(group_words)
        if kind in GRID_KINDS and group is not None:
            mistakes += [Mistake(kind, clause) for clause in group]  # type: ignore[arg-type]
    return Claim("wrong", tuple(mistakes), seen)


# ---- what an image must show, and what is wrong with it ---------------------------------------------------------


def requirement(record: Record, plan_text: str) -> Record:
    """The record that the image drawn after this plan must satisfy, as language.py's."""
    planned = parse_plan(plan_text)
    return record if planned is None else owed_by(record, planned)


def seen_in(detections: Iterable[Detection]) -> list[Clause]:
    """Detections as the language would name them."""
    return [Clause(d.cls, d.color, CELLS[place_of(d.box, d.size or "small")], d.size) for d in detections]


def holds(mistake: Mistake, record: Record, detections: Sequence[Detection]) -> bool:
    """Whether a named mistake is truly one, as language.py's."""
    return holds_of(mistake, record, [(c, d.box) for c, d in zip(seen_in(detections), detections, strict=True)])
