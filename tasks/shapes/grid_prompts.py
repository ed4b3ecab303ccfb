"""What may be asked for at the levels middle and hard, split so that held-out prompts are new.

Records have GenEval's schema with one key more: a clause may name a `size`. No class stands in two clauses, so the
rules can judge every clause by itself, and classes that are counted are also in `exclude`. The tags:

    counting      "five small crosses"; at hard "four red circles and three blue squares"
    two_counts    "two circles and three red squares" (middle)
    three_counts  "a red cross and three blue circles and two green squares" (hard)
    size          "a large circle and a small square and a small cross"; at hard in numbers
    color_attr    "a red circle and a blue square and a green cross"; at hard four kinds, some in numbers
    size_color    "a large red circle and a small blue square and a small green cross"; at hard in numbers
    position      "a red circle left of a blue square and above a green cross"; at hard in numbers

The split is by composition, as the easy level's: a held-out (shape, color), (shape, size), (shape, count), (shape,
relation, shape) or pair of relations of one object is named by no train prompt, and every held-out prompt names at
least one. In "a left of b and above c" clause 0 is a, and the others say where they stand seen from it.

There are millions of prompts, so a split has a fixed sample of them: `pool` for demonstrations, the first of which are
`prompts`, for GRPO and evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import product
from typing import Any, Literal

import numpy as np

from tasks.base import Record, Split
from tasks.shapes.grid import MOST_LARGE
from tasks.shapes.prompts import (
    HELDOUT_ARRANGEMENTS,
    HELDOUT_COLORED,
    INVERSE,
    TEMPLATES,
    article,
    both_ways,
    plural,
)
from tasks.shapes.world import COLORS, SHAPES

Level = Literal["middle", "hard"]
Clause = dict[str, Any]
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
SIZE_NAMES = ("small", "large")
OBJECTS = {"middle": (3, 5), "hard": (6, 8)}  # in a prompt, both included

HELDOUT_SIZED = frozenset({("triangle", "large"), ("square", "small")})
HELDOUT_COUNTS = frozenset({("circle", 3), ("square", 4), ("triangle", 2), ("cross", 3), ("triangle", 5)})
HELDOUT_RELATIONS = both_ways(HELDOUT_ARRANGEMENTS)
HELDOUT_FORKS = frozenset({("below", "left of"), ("above", "right of")})  # in alphabetical order
HELDOUT = frozenset(
    {("colored", *pair) for pair in HELDOUT_COLORED}
    | {("sized", *pair) for pair in HELDOUT_SIZED}
    | {("count", *pair) for pair in HELDOUT_COUNTS}
    | {("relation", *triple) for triple in HELDOUT_RELATIONS}
    | {("fork", *pair) for pair in HELDOUT_FORKS}
)

POOL = 1200  # records of a tag to draw demonstrations from
TRAIN_PER_TAG = 192  # of prompts("train")
HELDOUT_PER_TAG = 52  # of prompts("heldout")


def compositions(record: Record) -> set[tuple[Any, ...]]:
    """Everything that a record composes: ("colored", ...), ("sized", ...), ("count", ...), ("relation", ...), and
    ("fork", ...) for the relations of one object to two others."""
    include = record["include"]
    found: set[tuple[Any, ...]] = set()
    seen_from: dict[int, list[str]] = {}
    for clause in include:
        shape = clause["class"]
        if "color" in clause:
            found.add(("colored", shape, clause["color"]))
        if "size" in clause:
            found.add(("sized", shape, clause["size"]))
        if clause["count"] > 1:
            found.add(("count", shape, clause["count"]))
        if "position" in clause:
            relation, target = clause["position"]
            other = include[target]["class"]
            found |= {("relation", shape, relation, other), ("relation", other, INVERSE[relation], shape)}
            seen_from.setdefault(target, []).append(INVERSE[relation])
    return found | {("fork", *sorted(relations)) for relations in seen_from.values() if len(relations) > 1}


def split_of(record: Record) -> Split:
    return "heldout" if compositions(record) & HELDOUT else "train"


# ---- wording ----------------------------------------------------------------------------------------------------


def wording(include: list[Clause]) -> str:
    """What stands after the template."""
    relations = [f" {INVERSE[clause['position'][0]]} " if "position" in clause else "" for clause in include]
    said = [_named(clause) for clause in include]
    if not any(relations):
        return " and ".join(said)
    return said[0] + " and".join(relation + one for relation, one in zip(relations[1:], said[1:], strict=True))


def _named(clause: Clause) -> str:
    shape, count = clause["class"], clause["count"]
    words = [clause[key] for key in ("size", "color") if key in clause]
    if count == 1:
        return article(" ".join([*words, shape]))
    return " ".join([NUMBERS[count], *words, plural(shape)])


# ---- contents ---------------------------------------------------------------------------------------------------


class Dice:
    """Uniform draws, cheap ones: the lists are made of some hundred thousand."""

    def __init__(self, seed: Sequence[int]) -> None:
        self._rng = np.random.default_rng(list(seed))
        self._left: list[float] = []

    def random(self) -> float:
        if not self._left:
            self._left = self._rng.random(4096).tolist()
        return self._left.pop()

    def pick(self, items: Sequence[Any]) -> Any:
        return items[int(self.random() * len(items))]

    def some(self, items: Iterable[Any], count: int) -> list[Any]:
        """`count` different ones, in any order."""
        return sorted(items, key=lambda _: self.random())[:count]


def _kinds(dice: Dice, counts: Sequence[int]) -> list[Clause]:
    """Clauses of so many objects each, of different shapes."""
    shapes = dice.some(SHAPES, len(counts))
    return [{"class": shape, "count": count} for shape, count in zip(shapes, counts, strict=True)]


@cache
def _splits(kinds: int, least: int, total: tuple[int, int], most: int) -> list[tuple[int, ...]]:
    """All ordered choices of `least` to `most` objects of each kind that come to a total within bounds."""
    choices = product(range(least, most + 1), repeat=kinds)
    return [counts for counts in choices if total[0] <= sum(counts) <= total[1]]


def _counted(dice: Dice, kinds: int, total: tuple[int, int], least: int = 1, most: int = 5) -> list[Clause]:
    return _kinds(dice, dice.pick(_splits(kinds, least, total, most)))


def _color(dice: Dice, include: list[Clause], share: float = 1.0) -> list[Clause]:
    """Different colors for the clauses, or for a share of them."""
    colors = dice.some(COLORS, len(include))
    return [
        {**clause, "color": color} if dice.random() < share else clause
        for clause, color in zip(include, colors, strict=True)
    ]


@cache
def _sizings(counts: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Sizes for clauses of so many objects: both sizes, and no more large objects than there is room for."""
    return [
        sizes
        for sizes in product(SIZE_NAMES, repeat=len(counts))
        if len(set(sizes)) > 1
        and sum(count for size, count in zip(sizes, counts, strict=True) if size == "large") <= MOST_LARGE
    ]


def _size(dice: Dice, include: list[Clause]) -> list[Clause]:
    sizes = dice.pick(_sizings(tuple(clause["count"] for clause in include)))
    return [{**clause, "size": size} for clause, size in zip(include, sizes, strict=True)]


def _fork(dice: Dice, include: list[Clause], between: bool) -> list[Clause]:
    """Two different relations of the first clause to the others; opposite ones only where it may lie `between` them."""
    first, *others = include
    relations = dice.some(INVERSE, 2)
    while not between and relations[1] == INVERSE[relations[0]]:
        relations = dice.some(INVERSE, 2)
    placed = [{**clause, "position": [relation, 0]} for clause, relation in zip(others, relations, strict=True)]
    return [first, *placed]


def _one_kind(dice: Dice) -> list[Clause]:
    include = _color(dice, _counted(dice, 1, OBJECTS["middle"]), 0.5)
    return [{**clause, "size": "small"} for clause in include] if dice.random() < 0.5 else include


def _corner(dice: Dice) -> list[Clause]:
    """One or two objects of the first kind: three would leave no room for all relations."""
    counts = dice.pick([counts for counts in _splits(3, 1, (6, 6), 3) if counts[0] < 3])
    return _fork(dice, _color(dice, _kinds(dice, counts)), between=False)


CONTENTS: dict[Level, dict[str, Callable[[Dice], list[Clause]]]] = {
    "middle": {
        "counting": _one_kind,
        "two_counts": lambda dice: _color(dice, _counted(dice, 2, (4, 5)), 0.5),
        "size": lambda dice: _size(dice, _kinds(dice, (1, 1, 1))),
        "color_attr": lambda dice: _color(dice, _kinds(dice, (1, 1, 1))),
        "size_color": lambda dice: _size(dice, _color(dice, _kinds(dice, (1, 1, 1)))),
        "position": lambda dice: _fork(dice, _color(dice, _kinds(dice, (1, 1, 1))), between=True),
    },
    "hard": {
        "counting": lambda dice: _color(dice, _counted(dice, 2, OBJECTS["hard"])),
        "three_counts": lambda dice: _color(dice, _counted(dice, 3, OBJECTS["hard"]), 0.5),
        "size": lambda dice: _size(dice, _counted(dice, 3, (6, 7))),
        "color_attr": lambda dice: _color(dice, _counted(dice, 4, (6, 7), most=3)),
        "size_color": lambda dice: _size(dice, _color(dice, _counted(dice, 3, (6, 7)))),
        "position": _corner,
    },
}
TAGS: dict[Level, tuple[str, ...]] = {level: tuple(makers) for level, makers in CONTENTS.items()}


# ---- the lists --------------------------------------------------------------------------------------------------


def record_of(tag: str, template: str, include: list[Clause]) -> Record:
    record: Record = {"tag": tag, "prompt": f"{template} {wording(include)}", "include": include}
    counted = [{"class": c["class"], "count": c["count"] + 1} for c in include if c["count"] > 1]
    return {**record, "exclude": counted} if counted else record


@cache
def pool(level: Level, split: Split, tag: str) -> tuple[Record, ...]:
    """POOL distinct records of a level, split and tag, always the same ones. They are shared: copy before changing one.

    A held-out tag has HELDOUT_PER_TAG.
    """
    count = POOL if split == "train" else HELDOUT_PER_TAG
    # The seed is part of the task's definition: it says which prompts there are, for everybody alike.
    dice = Dice([20_26, list(CONTENTS).index(level), TAGS[level].index(tag), int(split == "train")])
    found: dict[str, Record] = {}
    while len(found) < count:
        record = record_of(tag, dice.pick(TEMPLATES), CONTENTS[level][tag](dice))
        if split_of(record) == split:
            found.setdefault(record["prompt"], record)
    return tuple(found.values())


def prompts(level: Level, split: Split) -> list[Record]:
    """The split's prompts: distinct strings, the tags in turn, always the same ones in the same order."""
    count = TRAIN_PER_TAG if split == "train" else HELDOUT_PER_TAG
    pools = [pool(level, split, tag)[:count] for tag in TAGS[level]]
    return [_copy(records[index]) for index in range(count) for records in pools]


def _copy(record: Record) -> Record:
    copied: Record = {key: [dict(clause) for clause in record[key]] for key in ("include", "exclude") if key in record}
    return {**record, **copied}


def prompt_words() -> set[str]:
    """Every word of every prompt of these levels, whether it is in the lists or not."""
    words = {word for template in TEMPLATES for word in template.split()}
    words |= {*SHAPES, *map(plural, SHAPES), *COLORS, *SIZE_NAMES, *NUMBERS.values(), "a", "an", "and"}
    return words | {word for relation in INVERSE for word in relation.split()}
