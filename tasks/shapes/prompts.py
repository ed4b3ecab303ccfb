"""What may be asked for: GenEval's six kinds of prompt over the shapes world, split so that held-out ones are new.

Records have GenEval's schema (arXiv:2310.11513; evaluation_metadata.jsonl). The split is by composition: a held-out
(shape, color), unordered pair of shapes, (shape, relation, shape) or (shape, count) is named by no train prompt of any
tag, and every held-out prompt names at least one. Relations are held out together with their inverses, since "a left
of b" and "b right of a" are one image. `single_object` names one shape and composes nothing: all shapes are in both
splits, and only the wording (template with shape) of a held-out prompt is new.

What is held out is the asking, not the image. Where a train prompt leaves something open (the color of a circle,
where two shapes stand), demonstrations fill it in with anything, held-out compositions included, and name it in their
plans. Otherwise visual codes that only a held-out composition uses would never be drawn at all, and no policy over
discrete codes could be expected to draw them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from itertools import permutations
from typing import Any

import numpy as np

from tasks.base import Record, Split
from tasks.shapes.world import COLORS, JITTERS, SHAPES, Object, Scene, layouts, unit_offset

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = {2: "two", 3: "three", 4: "four"}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TEMPLATES = (
    "a photo of",
    "a picture of",
    "an image of",
    "a drawing of",
    "a sketch of",
    "a painting of",
    "an illustration of",
    "an icon of",
    "a poster of",
    "a print of",
    "a rendering of",
    "a view of",
    "a scene with",
    "a card with",
    "a page with",
    "a canvas with",
    "a sign with",
    "a slide with",
    "a stamp with",
    "a tile with",
)

HELDOUT_COLORED = frozenset(
    {
        ("triangle", "red"),
        ("square", "orange"),
        ("cross", "yellow"),
        ("circle", "green"),
        ("triangle", "blue"),
        ("square", "purple"),
    }
)
HELDOUT_PAIRS = frozenset({frozenset({"circle", "cross"}), frozenset({"square", "triangle"})})
HELDOUT_COUNTS = frozenset({("circle", 3), ("square", 4), ("triangle", 2), ("cross", 3)})
HELDOUT_ARRANGEMENTS = (
    ("circle", "left of", "square"),
    ("circle", "above", "triangle"),
    ("square", "right of", "cross"),
    ("triangle", "below", "cross"),
)


def both_ways(arrangements: Iterable[tuple[str, str, str]]) -> frozenset[tuple[str, str, str]]:
    """(a, relation, b) and what says the same of b."""
    return frozenset(either for a, r, b in arrangements for either in ((a, r, b), (b, INVERSE[r], a)))


HELDOUT_RELATIONS = both_ways(HELDOUT_ARRANGEMENTS) | {
    (a, r, b) for a, b in permutations(SHAPES, 2) if frozenset({a, b}) in HELDOUT_PAIRS for r in INVERSE
}

TRAIN_PER_TAG = 96  # of prompts("train"); single_object has 32
HELDOUT_PER_TAG = 52  # of prompts("heldout"); single_object has 48
RELATION_MARGIN = 0.1  # beyond GenEval's 0.5, so that a blurred image is judged as the exact one


# ---- what a prompt composes -------------------------------------------------------------------------------------


def compositions(record: Record) -> set[tuple[Any, ...]]:
    """Everything that a record composes: ("colored", ...), ("pair", ...), ("relation", ...), ("count", ...)."""
    include = record["include"]
    found: set[tuple[Any, ...]] = set()
    for index, clause in enumerate(include):
        shape = clause["class"]
        if "color" in clause:
            found.add(("colored", shape, clause["color"]))
        if clause["count"] > 1:
            found.add(("count", shape, clause["count"]))
        for other in include[:index]:
            found.add(("pair", *sorted((shape, other["class"]))))
        if "position" in clause:
            relation, target = clause["position"]
            found.add(("relation", shape, relation, include[target]["class"]))
            found.add(("relation", include[target]["class"], INVERSE[relation], shape))
    return found


HELDOUT = frozenset(
    {("colored", *pair) for pair in HELDOUT_COLORED}
    | {("pair", *sorted(pair)) for pair in HELDOUT_PAIRS}
    | {("relation", *triple) for triple in HELDOUT_RELATIONS}
    | {("count", *pair) for pair in HELDOUT_COUNTS}
)


def split_of(record: Record, template: int) -> Split:
    """The split that a record belongs to; its template decides where there is no composition."""
    if record["tag"] == "single_object":
        # Two in five templates of each shape are for training, staggered so that every template is in both splits.
        return "train" if (template + 2 * SHAPES.index(record["include"][0]["class"])) % 5 < 2 else "heldout"
    return "heldout" if compositions(record) & HELDOUT else "train"


# ---- wording ----------------------------------------------------------------------------------------------------


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _contents() -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Every (tag, phrase after the template, include) of the world."""
    found: list[tuple[str, str, list[dict[str, Any]]]] = []
    for shape in SHAPES:
        found.append(("single_object", article(shape), [{"class": shape, "count": 1}]))
        for count, word in NUMBERS.items():
            found.append(("counting", f"{word} {plural(shape)}", [{"class": shape, "count": count}]))
        for color in COLORS:
            found.append(("colors", article(f"{color} {shape}"), [{"class": shape, "count": 1, "color": color}]))
    for a, b in permutations(SHAPES, 2):
        found.append(
            ("two_object", f"{article(a)} and {article(b)}", [{"class": a, "count": 1}, {"class": b, "count": 1}])
        )
        for relation in INVERSE:  # clause 0 is the reference, as in GenEval
            found.append(
                (
                    "position",
                    f"{article(a)} {relation} {article(b)}",
                    [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}],
                )
            )
        for color_a, color_b in permutations(COLORS, 2):
            found.append(
                (
                    "color_attr",
                    f"{article(f'{color_a} {a}')} and {article(f'{color_b} {b}')}",
                    [{"class": a, "count": 1, "color": color_a}, {"class": b, "count": 1, "color": color_b}],
                )
            )
    return found


def pools_of(
    contents: Iterable[tuple[str, str, list[dict[str, Any]]]], split_of: Callable[[Record, int], Split]
) -> dict[tuple[str, str], tuple[Record, ...]]:
    """Records by split and tag: every content (tag, phrase, clauses) in every template's words."""
    pools: dict[tuple[str, str], list[Record]] = {}
    for tag, phrase, include in contents:
        for index, template in enumerate(TEMPLATES):
            record: Record = {"tag": tag, "prompt": f"{template} {phrase}", "include": include}
            if tag == "counting":
                record["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
            pools.setdefault((split_of(record, index), tag), []).append(record)
    return {key: tuple(records) for key, records in pools.items()}


@cache
def _pools() -> dict[tuple[str, str], tuple[Record, ...]]:
    return pools_of(_contents(), split_of)


def pool(split: Split, tag: str) -> tuple[Record, ...]:
    """Every record of one split and tag. They are shared: copy before changing one."""
    return _pools()[split, tag]


@lru_cache(maxsize=2)
def _chosen(split: Split) -> tuple[Record, ...]:
    limit = TRAIN_PER_TAG if split == "train" else HELDOUT_PER_TAG
    # The seed is part of the task's definition: it says which prompts are in the list, for everybody alike.
    rng = np.random.default_rng(20_26)
    chosen: list[Record] = []
    for tag in TAGS:
        chosen += _even(rng, pool(split, tag), limit)
    return tuple(chosen[i] for i in rng.permutation(len(chosen)))


def _even(rng: np.random.Generator, records: tuple[Record, ...], limit: int) -> list[Record]:
    """At most `limit` records, every content about equally often."""
    by_content: dict[str, list[Record]] = {}
    for i in rng.permutation(len(records)):
        by_content.setdefault(repr(records[i]["include"]), []).append(records[i])
    chosen: list[Record] = []
    while len(chosen) < min(limit, len(records)):
        for waiting in by_content.values():
            if waiting and len(chosen) < limit:
                chosen.append(waiting.pop())
    return chosen


def prompts(split: Split) -> list[Record]:
    """The split's prompts: distinct strings, all six tags, always the same ones in the same order."""
    return [{**record, "include": [dict(clause) for clause in record["include"]]} for record in _chosen(split)]


def prompt_words() -> set[str]:
    return {word for key in _pools() for record in _pools()[key] for word in record["prompt"].split()}


# ---- scenes that a prompt asks for ------------------------------------------------------------------------------


def related(box: tuple[float, ...], relation: str, other: tuple[float, ...], margin: float = 0.0) -> bool:
    """GenEval's relation of a box to another, with its threshold of 0.5 raised by `margin`."""
    dx, dy = unit_offset(box, other)
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    return along > 0.5 + margin


def satisfies(record: Record, scene: Scene, margin: float = 0.0) -> bool:
    """Whether a scene, perfectly seen, is what the record asks for under GenEval's rules.

    margin > 0 is stricter about relations, < 0 more lenient; rewards/functions/geneval.py has the rules
    proper.
    The rules look at the best-scored objects of a class; seen perfectly all are equally good, so all must comply.
    """
    counts = Counter(item.shape for item in scene.objects)
    groups: list[list[Object]] = []
    for clause in record["include"]:
        group = [item for item in scene.objects if item.shape == clause["class"]]
        if len(group) < clause["count"]:
            return False
        if "color" in clause and any(item.color != clause["color"] for item in group):
            return False
        if "position" in clause:
            relation, target = clause["position"]
            if not all(related(item.box, relation, other.box, margin) for item in group for other in groups[target]):
                return False
        groups.append(group)
    return all(counts[clause["class"]] < clause["count"] for clause in record.get("exclude", ()))


@cache
def _related_layouts(relation: str) -> tuple[tuple[int, ...], ...]:
    """Places of (reference, other) such that the relation holds by RELATION_MARGIN for every jitter, and no second
    relation does: an image that is plainly what was asked for."""
    found = []
    for places in layouts(2):
        pairs = [
            (Object("square", "red", places[1], a).box, Object("square", "red", places[0], b).box)
            for a in range(len(JITTERS))
            for b in range(len(JITTERS))
        ]
        if all(related(item, relation, other, RELATION_MARGIN) for item, other in pairs) and not any(
            related(item, second, other) for item, other in pairs for second in INVERSE if second != relation
        ):
            found.append(places)
    return tuple(found)


def sample_scene_for(record: Record, rng: np.random.Generator) -> Scene:
    """A scene that satisfies the record with RELATION_MARGIN, objects in the order of its clauses: reading order too,
    unless the record says where they stand. A plan then follows both its prompt and the codes that it is drawn with.

    What the record leaves open is sampled: places and colors (one color for all objects of a clause). Jitters are
    not, for no words say them: a policy that had to guess one for each quarter of an object would tear it apart.
    """
    colors = tuple(COLORS)
    wanted: list[tuple[str, str]] = []
    for clause in record["include"]:
        color = clause.get("color") or colors[rng.integers(len(colors))]
        wanted += [(clause["class"], color)] * clause["count"]
    relation = next((clause["position"][0] for clause in record["include"] if "position" in clause), None)
    choices = layouts(len(wanted)) if relation is None else _related_layouts(relation)
    places = choices[rng.integers(len(choices))]
    if relation is None:
        places = tuple(sorted(places))
    return Scene(tuple(Object(shape, color, place) for (shape, color), place in zip(wanted, places, strict=True)))
