"""The world's little language: what plans, inspections and refinements say, written and read.

A description names objects, each as color, shape, place: "red circle top-left , blue square right" ("nothing" for an
empty image). What it says in each role (the tags are the format's, not the language's):

    plan        <ins> draw all </ins> <des> DESCRIPTION </des>          what to do now, and the image after it
                <ins> draw one circle </ins>, <ins> add two squares </ins>, <ins> keep all </ins>
    inspection  SLOT , SLOT : fine                                      what is wanted and seen, then the verdict
                SLOT , SLOT : wrong color red square right              and the mistake, by kind and object
                with SLOTs such as: circle = red circle top-left yes    one for each object that the prompt asks for
                                    blue square = red square right no
                                    left of cross = green cross top no
                                    circle = nothing no                 it is missing
                                    nothing = red circle top no         one too many
    refinement  make red square right blue | make red square right circle | move red circle top to left
                add blue square right | remove red circle top

An inspection says what is wanted and what it sees side by side before it judges: a small model compares words that
stand next to each other long before it compares words with codes, or with words far back. The kinds of mistake are
those that break a prompt under GenEval's rules: color, shape, place (the relation that was asked for does not hold; the
object named is the one to move), missing, extra. "missing" names what the plan wanted.

The reading half serves rewards/functions/critique_consistency.py: `claims`, `requirement`, `holds`; and
evals/critiques.py: `verdict`. It reads what a policy wrote, so it takes any text and says None where there is no sense
in it. `shapes` are the names of what can stand in an image: tasks/digits speaks the same language of other objects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tasks.base import Detection, Record, VerdictSpan
from tasks.shapes.prompts import INVERSE, NUMBERS, plural, related
from tasks.shapes.world import COLORS, PLACES, SHAPES, Object, Scene, place_of

Verdict = Literal["fine", "wrong"]
Kind = Literal["color", "shape", "place", "missing", "extra", "size"]  # size: of levels that have sizes
KINDS: tuple[Kind, ...] = ("color", "shape", "place", "missing", "extra")
COUNT_WORDS = {1: "one", **NUMBERS}
VERBS = ("draw", "add", "keep", "make", "move", "remove", "all", "to")

TAG = re.compile(r"<[^<>\s]*>")
DES = re.compile(r"<des>(.*?)</des>", re.DOTALL)


@dataclass(frozen=True)
class Clause:
    """One object of a description. None: not said."""

    shape: str
    color: str | None = None
    place: str | None = None
    size: str | None = None  # of levels that have sizes

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.color, self.shape, self.place) if word)

    def matches(self, other: Clause) -> bool:
        """Whether nothing that both say differs."""
        return self.shape == other.shape and all(
            mine is None or theirs is None or mine == theirs
            for mine, theirs in ((self.color, other.color), (self.place, other.place), (self.size, other.size))
        )


@dataclass(frozen=True)
class Mistake:
    kind: Kind
    object: Clause

    def __str__(self) -> str:
        return f"{self.kind} {self.object}"


@dataclass(frozen=True)
class Claim:
    """What an inspection says of the image before it."""

    verdict: Verdict | None  # None: no verdict, or both at once
    mistakes: tuple[Mistake, ...] = ()  # named ones that could be read; empty for "fine"
    seen: tuple[Clause, ...] | None = None  # None: it does not say, or not readably


def vocabulary(shapes: Collection[str] = SHAPES, colors: Collection[str] = tuple(COLORS)) -> set[str]:
    """Every word of the language, prompts apart."""
    words = {*shapes, *colors, *PLACES, *VERBS, *KINDS, *COUNT_WORDS.values(), *map(plural, shapes)}
    words |= {word for relation in INVERSE for word in relation.split()}
    return words | {"nothing", "fine", "wrong", "yes", "no", "=", ",", ":", ";"}


# ---- writing ----------------------------------------------------------------------------------------------------


def clause_of(item: Object) -> Clause:
    return Clause(item.shape, item.color, PLACES[item.place])


def describe(scene: Scene | Iterable[Clause]) -> str:
    """All objects in the order given: a scene's is that of the record's clauses, so a plan can follow its prompt."""
    clauses = [clause_of(item) for item in scene.objects] if isinstance(scene, Scene) else list(scene)
    return " , ".join(map(str, clauses)) or "nothing"


def plan(instruction: str, scene: Scene) -> str:
    return f"<ins> {instruction} </ins> <des> {describe(scene)} </des>"


def instruction(verb: Literal["draw", "add"], items: Sequence[Object]) -> str:
    """ "draw one circle", "add two squares": the items are of one shape."""
    shape, count = items[0].shape, len(items)
    return f"{verb} {COUNT_WORDS[count]} {shape if count == 1 else plural(shape)}"


def inspection(owed: Record, scene: Scene, mistake: Mistake | None) -> str:
    """owed: what the image must show (`requirement`)."""
    return f"{slots(owed, scene)} : {'fine' if mistake is None else f'wrong {mistake}'}"


def slots(owed: Record, scene: Scene) -> str:
    """What is wanted beside what is seen, in the order of the record's clauses, and whether they agree.

    An object stands in a slot of its own shape (and color, if it can); what is left stands where nothing fits, in
    reading order. A class without `exclude` may have more objects than were asked for: they are not listed.
    """
    wanted, filled, left = assigned(owed, scene)
    said = []
    for index, (clause, item) in enumerate(zip(wanted, filled, strict=True)):
        mark = "yes" if _agrees(index, wanted, filled) else "no"
        said.append(f"{_wanted(clause)} = {clause_of(item) if item else 'nothing'} {mark}")
    counted = {clause["class"] for clause in owed.get("exclude", ())}
    said += [f"nothing = {clause_of(item)} no" for item in left if item.shape in counted]
    return " , ".join(said)


def assigned(owed: Record, scene: Scene) -> tuple[list[dict[str, Any]], list[Object | None], list[Object]]:
    """The clause of each slot, the object that stands in it (None: none is left), and the objects without a slot."""
    wanted = [clause for clause in owed["include"] for _ in range(clause["count"])]
    left = sorted(scene.objects, key=lambda item: item.place)
    filled: list[Object | None] = [None] * len(wanted)
    for strict in (True, False):
        for index, clause in enumerate(wanted):
            fits = [
                item
                for item in left
                if item.shape == clause["class"] and (not strict or item.color == clause.get("color", item.color))
            ]
            if filled[index] is None and fits:
                filled[index] = fits[0]
                left.remove(fits[0])
    for index, item in enumerate(filled):
        if item is None and left:
            filled[index] = left.pop(0)
    return wanted, filled, left


def _wanted(clause: dict[str, Any]) -> str:
    relation = [clause["position"][0]] if "position" in clause else []
    return " ".join([*relation, *([clause["color"]] if "color" in clause else []), clause["class"]])


def _agrees(index: int, wanted: Sequence[dict[str, Any]], filled: Sequence[Object | None]) -> bool:
    clause, item = wanted[index], filled[index]
    if item is None or item.shape != clause["class"] or item.color != clause.get("color", item.color):
        return False
    if "position" not in clause:
        return True
    relation, target = clause["position"]
    other = filled[target]
    return other is not None and related(item.box, relation, other.box)


def refinement(mistake: Mistake, target: Object | None) -> str:
    """How to repair it. target: the object as it should be; None where one is to be removed."""
    if target is None:
        return f"remove {mistake.object}"
    if mistake.kind == "missing":
        return f"add {clause_of(target)}"
    if mistake.kind == "place":
        return f"move {mistake.object} to {PLACES[target.place]}"
    return f"make {mistake.object} {target.color if mistake.kind == 'color' else target.shape}"


# ---- reading ----------------------------------------------------------------------------------------------------


def _parse_clause(words: Sequence[str], shapes: Collection[str] = SHAPES) -> Clause | None:
    rest = list(words)
    color = rest.pop(0) if rest and rest[0] in COLORS else None
    shape = rest.pop(0) if rest and rest[0] in shapes else None
    place = rest.pop(0) if rest and rest[0] in PLACES else None
    return Clause(shape, color, place) if shape and not rest else None


def parse_description(text: str, shapes: Collection[str] = SHAPES) -> list[Clause] | None:
    """Clauses of a description; colors and places may be left out. None: it is no description."""
    words = TAG.sub(" ", text).split()
    if words == ["nothing"]:
        return []
    clauses = [_parse_clause(part.split(), shapes) for part in " ".join(words).split(",")]
    return None if None in clauses else [clause for clause in clauses if clause is not None]


def parse_plan(text: str, shapes: Collection[str] = SHAPES) -> list[Clause] | None:
    """What the last <des> ... </des> of a plan describes. None: there is none, or it cannot be read."""
    bodies = DES.findall(text)
    return parse_description(bodies[-1], shapes) if bodies else None


def _parse_slots(text: str, shapes: Collection[str] = SHAPES) -> list[Clause] | None:
    """The objects that an inspection sees; what it wants and whether it agrees may be left out."""
    seen: list[Clause] = []
    for part in text.split(","):
        words = part.split()
        words = words[words.index("=") + 1 :] if "=" in words else words
        words = words[:-1] if words and words[-1] in ("yes", "no") else words
        if words == ["nothing"]:
            continue
        clause = _parse_clause(words, shapes)
        if clause is None:
            return None
        seen.append(clause)
    return seen


def claims(text: str, shapes: Collection[str] = SHAPES) -> Claim:
    """What an inspection (or a critique: an inspection and a refinement joined by ";") says. Takes any text."""
    said = " ".join(TAG.sub(" ", text).split(";")[0].split())
    before, colon, after = said.rpartition(":")
    seen = _parse_slots(before, shapes) if colon else None
    words = after.split()
    verdicts = {word for word in words if word in ("fine", "wrong")}
    if len(verdicts) != 1:
        return Claim(None, (), None if seen is None else tuple(seen))
    if "fine" in verdicts:
        return Claim("fine", (), None if seen is None else tuple(seen))
    mistakes = []
    for part in " ".join(words[words.index("wrong") + 1 :]).split(","):
        kind, *object_words = part.split() or [""]
        clause = _parse_clause(object_words, shapes)
        if kind in KINDS and clause is not None:
            mistakes.append(Mistake(kind, clause))  # type: ignore[arg-type]
    return Claim("wrong", tuple(mistakes), None if seen is None else tuple(seen))


def verdict(text: str, read: Callable[[str], Claim] | None = None) -> VerdictSpan | None:
    """Where an inspection says "fine" or "wrong". None: where `read` (`claims`) reads no verdict. Takes any text."""
    said = (read or claims)(text).verdict
    if said is None:
        return None
    blank = TAG.sub(lambda tag: " " * len(tag[0]), text).split(";")[0]  # every character where it was
    found = re.search(rf"(?<!\S){said}(?!\S)", blank[blank.rfind(":") + 1 :])
    if found is None:  # a word that only the removal of a tag makes
        return None
    start = blank.rfind(":") + 1 + found.start()
    return VerdictSpan(said, start, start + len(said), "wrong" if said == "fine" else "fine")


# ---- what an image must show, and what is wrong with it ---------------------------------------------------------


def requirement(record: Record, plan_text: str, shapes: Collection[str] = SHAPES) -> Record:
    """The record that the image drawn after this plan must satisfy.

    A plan whose description names fewer objects of the prompt's shapes than the prompt asks for is a partial stroke:
    its image owes only those (a relation only where both ends are planned; exact counts stay exact). Any other plan,
    an unreadable one included, owes the whole prompt.
    """
    planned = parse_plan(plan_text, shapes)
    return record if planned is None else owed_by(record, planned)


def owed_by(record: Record, planned: Sequence[Clause]) -> Record:
    """`requirement` of what a plan describes."""
    owed: list[dict[str, Any]] = []
    index_of: dict[int, int] = {}  # index in the record's include -> index in `owed`
    partial = False
    for index, clause in enumerate(record["include"]):
        count = min(clause["count"], sum(item.shape == clause["class"] for item in planned))
        partial |= count < clause["count"]
        if count == 0:
            continue
        reduced = {**clause, "count": count}
        if "position" in clause:
            relation, target = clause["position"]
            if target in index_of:
                reduced["position"] = [relation, index_of[target]]
            else:
                del reduced["position"]
        index_of[index] = len(owed)
        owed.append(reduced)
    if not (partial and owed):
        return record
    exact = {clause["class"] for clause in record.get("exclude", ())}
    most: dict[str, int] = {}  # by class, of the clauses that name it: each of them is about all of its objects
    for clause in owed:
        most[clause["class"]] = max(clause["count"], most.get(clause["class"], 0))
    exclude = [{"class": shape, "count": count + 1} for shape, count in most.items() if shape in exact]
    return {**record, "include": owed, **({"exclude": exclude} if exclude else {})}


def seen_in(detections: Iterable[Detection]) -> list[Clause]:
    """Detections as the language would name them."""
    return [Clause(d.cls, d.color, PLACES[place_of(d.box)]) for d in detections]


def holds(mistake: Mistake, record: Record, detections: Sequence[Detection]) -> bool:
    """Whether a named mistake is truly one: the object is in the image (or missing from it) and at odds with the
    record, which is `requirement`'s for a partial stroke. Detections below the rules' threshold are for the caller
    to leave out.
    """
    return holds_of(mistake, record, [(item, d.box) for item, d in zip(seen_in(detections), detections, strict=True)])


def holds_of(mistake: Mistake, record: Record, seen: Sequence[tuple[Clause, tuple[float, ...]]]) -> bool:
    """`holds`, of what is seen as the language would name it, with its boxes."""
    include = record["include"]
    clauses = [clause for clause in include if clause["class"] == mistake.object.shape]
    found = [item for item, _ in seen if item.shape == mistake.object.shape]
    if mistake.kind == "missing":
        return any(
            len(found) < clause["count"]
            and (None in (clause.get("color"), mistake.object.color) or clause["color"] == mistake.object.color)
            and (None in (clause.get("size"), mistake.object.size) or clause["size"] == mistake.object.size)
            for clause in clauses
        )
    boxes = [box for item, box in seen if item.matches(mistake.object)]
    if not boxes:  # what it points at is not there
        return False
    if mistake.kind == "extra":
        limits = [e["count"] for e in record.get("exclude", ()) if e["class"] == mistake.object.shape]
        return any(len(found) >= limit for limit in limits)
    if mistake.kind == "shape":
        lacking = any(sum(item.shape == c["class"] for item, _ in seen) < c["count"] for c in include)
        return lacking and all(len(found) > clause["count"] for clause in clauses)
    if mistake.kind == "color":
        pointed_at = [item for item in found if item.matches(mistake.object)]
        return any(clause.get("color") not in (None, item.color) for clause in clauses for item in pointed_at)
    if mistake.kind == "size":
        pointed_at = [item for item in found if item.matches(mistake.object)]
        return any(clause.get("size") not in (None, item.size) for clause in clauses for item in pointed_at)
    return any(_breaks_relation(mistake.object.shape, box, include, seen) for box in boxes)


def _breaks_relation(
    shape: str,
    box: tuple[float, ...],
    include: Sequence[dict[str, Any]],
    seen: Sequence[tuple[Clause, tuple[float, ...]]],
) -> bool:
    for clause in include:
        if "position" not in clause:
            continue
        relation, target = clause["position"]
        reference = include[target]["class"]
        if clause["class"] == shape:
            if any(item.shape == reference and not related(box, relation, other) for item, other in seen):
                return True
        if reference == shape:
            if any(item.shape == clause["class"] and not related(other, relation, box) for item, other in seen):
                return True
    return False
