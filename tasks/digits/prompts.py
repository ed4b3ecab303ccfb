"""What may be asked for: GenEval's six kinds of prompt over digits, split so that held-out ones are new.

Records have GenEval's schema, and the split is by composition, as in tasks/shapes/prompts.py, whose relations,
templates and rules of an image these are. A digit is named by its numeral, so that "three 7s" has one reading. Held out
are

    a (digit, color)             every second digit with one color
    an unordered pair            digits that are 5 apart
    a (digit, relation, digit)   a digit and the one 3 after it in one relation, its inverse, and all of held-out pairs
    a (digit, count)             one count of each digit
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import permutations
from typing import Any

import numpy as np

from tasks.base import Record, Split
from tasks.digits.scans import DIGITS
from tasks.digits.world import COLORS, Digit, digit
from tasks.shapes.prompts import INVERSE, NUMBERS, RELATION_MARGIN, TAGS, compositions, pools_of, related
from tasks.shapes.world import Scene, layouts

_NAMES = tuple(COLORS)
HELDOUT_COLORED = frozenset((name, _NAMES[int(name) // 2 % len(_NAMES)]) for name in DIGITS[::2])
HELDOUT_PAIRS = frozenset(frozenset({a, b}) for a, b in zip(DIGITS[:5], DIGITS[5:], strict=True))
HELDOUT_COUNTS = frozenset((name, 2 + int(name) % 3) for name in DIGITS)
_ARRANGED = tuple((a, tuple(INVERSE)[int(a) % 4], DIGITS[(int(a) + 3) % 10]) for a in DIGITS)
HELDOUT_RELATIONS = frozenset(
    {*_ARRANGED, *((b, INVERSE[relation], a) for a, relation, b in _ARRANGED)}
    | {
        (a, relation, b)
        for a, b in permutations(DIGITS, 2)
        if frozenset({a, b}) in HELDOUT_PAIRS
        for relation in INVERSE
    }
)
HELDOUT = frozenset(
    {("colored", *pair) for pair in HELDOUT_COLORED}
    | {("pair", *sorted(pair)) for pair in HELDOUT_PAIRS}
    | {("relation", *triple) for triple in HELDOUT_RELATIONS}
    | {("count", *pair) for pair in HELDOUT_COUNTS}
)

TRAIN_PER_TAG = 96  # of prompts("train"); single_object has 80
HELDOUT_PER_TAG = 52  # of prompts("heldout")


def split_of(record: Record, template: int) -> Split:
    """The split that a record belongs to; its template decides where there is no composition."""
    if record["tag"] == "single_object":
        return "train" if (template + int(record["include"][0]["class"])) % 5 < 2 else "heldout"
    return "heldout" if compositions(record) & HELDOUT else "train"


def _article(words: str) -> str:
    return f"{'an' if words == '8' else 'a'} {words}"  # no color begins with a vowel


def _contents() -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Every (tag, phrase after the template, include) of the world."""
    found: list[tuple[str, str, list[dict[str, Any]]]] = []
    for name in DIGITS:
        found.append(("single_object", _article(name), [{"class": name, "count": 1}]))
        for count, word in NUMBERS.items():
            found.append(("counting", f"{word} {name}s", [{"class": name, "count": count}]))
        for color in COLORS:
            found.append(("colors", _article(f"{color} {name}"), [{"class": name, "count": 1, "color": color}]))
    for a, b in permutations(DIGITS, 2):
        both = [{"class": a, "count": 1}, {"class": b, "count": 1}]
        found.append(("two_object", f"{_article(a)} and {_article(b)}", both))
        for relation in INVERSE:  # clause 0 is the reference, as in GenEval
            include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
            found.append(("position", f"{_article(a)} {relation} {_article(b)}", include))
        for color_a, color_b in permutations(COLORS, 2):
            include = [{"class": a, "count": 1, "color": color_a}, {"class": b, "count": 1, "color": color_b}]
            found.append(("color_attr", f"{_article(f'{color_a} {a}')} and {_article(f'{color_b} {b}')}", include))
    return found


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
    rng = np.random.default_rng(1_797)
    chosen = [record for tag in TAGS for record in _even(rng, pool(split, tag), limit)]
    return tuple(chosen[i] for i in rng.permutation(len(chosen)))


def _even(rng: np.random.Generator, records: Sequence[Record], limit: int) -> list[Record]:
    """At most `limit` records, every content about equally often: all contents once before one comes twice."""
    rounds: dict[str, int] = {}
    keyed = []
    for i in rng.permutation(len(records)):
        content = repr(records[i]["include"])
        rounds[content] = rounds.get(content, -1) + 1
        keyed.append((rounds[content], i))
    return [records[i] for _, i in sorted(keyed, key=lambda pair: pair[0])[:limit]]


def prompts(split: Split) -> list[Record]:
    """The split's prompts: distinct strings, all six tags, always the same ones in the same order."""
    return [{**record, "include": [dict(clause) for clause in record["include"]]} for record in _chosen(split)]


def prompt_words() -> set[str]:
    return {word for records in _pools().values() for record in records for word in record["prompt"].split()}


def sample_scene_for(record: Record, rng: np.random.Generator) -> Scene:
    """A scene that satisfies the record with RELATION_MARGIN, digits in the order of its clauses, and in reading order
    unless the record says where they stand. Color, place and scan are sampled where the record leaves them open."""
    wanted: list[tuple[str, str]] = []
    for clause in record["include"]:
        color = clause.get("color") or _NAMES[rng.integers(len(_NAMES))]
        wanted += [(clause["class"], color)] * clause["count"]
    items = [digit(rng, name, color, 0) for name, color in wanted]
    relation = next((clause["position"][0] for clause in record["include"] if "position" in clause), None)
    choices = [_placed(items, places) for places in layouts(len(items))]
    if relation is None:
        scene = choices[rng.integers(len(choices))]
        places = sorted(item.place for item in scene.objects)
        return _placed(items, places)
    choices = [scene for scene in choices if _plainly(relation, scene)]
    return choices[rng.integers(len(choices))]


def _placed(items: Sequence[Digit], places: Sequence[int]) -> Scene:
    return Scene(
        tuple(Digit(item.shape, item.color, place, scan=item.scan) for item, place in zip(items, places, strict=True))
    )


def _plainly(relation: str, scene: Scene) -> bool:
    """Whether the second object is in this relation to the first by RELATION_MARGIN, and in no other."""
    reference, item = (one.box for one in scene.objects)
    held = [name for name in INVERSE if related(item, name, reference)]
    return held == [relation] and related(item, relation, reference, RELATION_MARGIN)
