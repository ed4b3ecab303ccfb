"""The levels middle and hard: what exists, what is asked for, and what is seen."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.functions.geneval import evaluate
from runtime.errors import UserError
from tasks.registry import get_task
from tasks.shapes.grid import (
    CELLS,
    MASKS_OF,
    SIZES,
    Sized,
    box_of,
    covered,
    free_places,
    place_of,
    places_of,
    render,
    sample_scene,
    sample_scene_for,
    satisfies,
)
from tasks.shapes.grid_detector import detect
from tasks.shapes.grid_prompts import (
    CONTENTS,
    HELDOUT,
    HELDOUT_PER_TAG,
    OBJECTS,
    TAGS,
    TRAIN_PER_TAG,
    Dice,
    compositions,
    pool,
    prompt_words,
    prompts,
    record_of,
    split_of,
)
from tasks.shapes.world import CANVAS, COLORS, PATCH, SHAPES, Scene

LEVELS = tuple(TAGS)
KINDS = [(level, tag) for level in LEVELS for tag in TAGS[level]]
objects = st.builds(
    lambda shape, color, at: Sized(shape, color, at[1], size=at[0]),
    st.sampled_from(SHAPES),
    st.sampled_from(list(COLORS)),
    st.sampled_from([(size, place) for size in SIZES for place in places_of(size)]),
)
seeds = st.integers(0, 2**32 - 1)


def any_record(level: str, tag: str, seed: int):
    return record_of(tag, "a photo of", CONTENTS[level][tag](Dice([seed])))


def as_judged(scene: Scene) -> dict:
    """A scene as the judge would see it if it saw perfectly."""
    seen: dict = {}
    for item in scene.objects:
        seen.setdefault(item.shape, []).append({"box": item.box, "score": 1.0, "color": item.color, "size": item.size})
    return seen


# ---- the easy level ---------------------------------------------------------------------------------------------


def test_the_easy_level_is_what_it_was():
    """Fingerprints of prompts, words and demonstrations, so that recipes keep their figures."""

    def digest(value) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    task = get_task("shapes")
    assert digest(task.prompts("train")) == "445ca50689e6a555"
    assert digest(task.prompts("heldout")) == "348641f874855d00"
    assert digest(task.words) == "67801f520ae6d406"
    wanted = {
        "strokes": "4d04b516034a8e41",
        "subgoals": "f890ce7fc0a9dc99",
        "self_critique": "5fc211c189fd57a9",
        "look": "74ad01206209f4d6",
    }
    for name, fingerprint in wanted.items():
        found = hashlib.sha256()
        for one in task.demonstrations(name, 40, 0):
            about = [one.prompt, one.record, list(one.mistakes), list(one.needless)]
            found.update(json.dumps(about, sort_keys=True).encode())
            for part in one.parts:
                image = b"" if part.image is None else part.image.tobytes()
                found.update(part.role.encode() + part.text.encode() + image)
        assert found.hexdigest()[:16] == fingerprint, name
    assert task.sizes == () and get_task("shapes", level="easy").words == task.words


# ---- the grid ---------------------------------------------------------------------------------------------------


def test_places_are_cells_by_column_and_row():
    assert CELLS[0] == "a1" and CELLS[3] == "d1" and CELLS[4] == "a2" and CELLS[15] == "d4"
    assert box_of("small", CELLS.index("b3")) == (9, 17, 15, 23)  # 6 px, 1 px inside of the cell (8, 16)
    assert box_of("large", CELLS.index("c2")) == (17, 9, 29, 21)
    assert covered("large", CELLS.index("b2")) == {CELLS.index(cell) for cell in ("b2", "c2", "b3", "c3")}
    assert [CELLS[place] for place in places_of("large")] == ["a1", "b1", "c1", "a2", "b2", "c2", "a3", "b3", "c3"]
    large = Sized("square", "red", CELLS.index("c3"), size="large")
    free = {CELLS[place] for place in free_places("small", [large])}
    assert free == set(CELLS) - {"c3", "d3", "c4", "d4"}
    assert [CELLS[place] for place in free_places("large", [large])] == ["a1", "b1", "c1", "a2", "a3"]


def test_images_are_made_of_121_patches():
    patches = set()
    for size in SIZES:
        for place in places_of(size):
            for shape in SHAPES:
                for color in COLORS:
                    image = render(Scene((Sized(shape, color, place, size=size),)))
                    for y in range(0, CANVAS, PATCH):
                        for x in range(0, CANVAS, PATCH):
                            patches.add(image[y : y + PATCH, x : x + PATCH].tobytes())
    assert len(patches) == 121  # 24 small ones, 96 quarters, the blank one


@given(seeds, st.integers(0, 8), st.integers(0, 2))
def test_sampled_objects_do_not_overlap(seed, small, large):
    scene = sample_scene(np.random.default_rng(seed), small, large)
    assert Counter(item.size for item in scene.objects) == Counter({"small": small, "large": large})
    cells = [cell for item in scene.objects for cell in item.cells]
    assert len(cells) == len(set(cells)) == small + 4 * large


def test_too_many_objects_are_refused():
    with pytest.raises(ValueError, match="13 small and 1 large objects do not fit"):
        sample_scene(np.random.default_rng(0), 13, 1)


# ---- the detector -----------------------------------------------------------------------------------------------


@given(seeds, st.integers(0, 8), st.integers(0, 2))
def test_a_rendered_scene_is_read_back(seed, small, large):
    scene = sample_scene(np.random.default_rng(seed), small, large)
    found = detect(render(scene))
    assert all(d.score == 1.0 for d in found)
    seen = sorted((d.cls, d.color, d.size, place_of(d.box, d.size), d.box) for d in found)
    assert seen == sorted((i.shape, i.color, i.size, i.place, tuple(map(float, i.box))) for i in scene.objects)
    assert all(d.mask.sum() == MASKS_OF[d.size][d.cls].sum() for d in found)


def test_a_quarter_of_a_large_object_is_no_object():
    """A policy that tears one draws no small object."""
    for shape in SHAPES:
        image = render(Scene((Sized(shape, "blue", CELLS.index("b2"), size="large"),)))
        for y in (8, 16):
            for x in (8, 16):
                torn = np.full_like(image, 255)
                torn[y : y + 8, x : x + 8] = image[y : y + 8, x : x + 8]
                assert all(d.score <= 0.3 for d in detect(torn)), (shape, x, y)


# ---- prompts ----------------------------------------------------------------------------------------------------


def test_wording_and_schema_by_hand():
    include = [
        {"class": "circle", "count": 1, "color": "red"},
        {"class": "square", "count": 2, "color": "blue", "position": ["right of", 0]},
        {"class": "cross", "count": 1, "color": "orange", "position": ["below", 0]},
    ]
    record = record_of("position", "a photo of", include)
    assert record == {
        "tag": "position",
        "prompt": "a photo of a red circle left of two blue squares and above an orange cross",
        "include": include,
        "exclude": [{"class": "square", "count": 3}],
    }
    assert compositions(record) == {
        ("colored", "circle", "red"),
        ("colored", "square", "blue"),
        ("colored", "cross", "orange"),
        ("count", "square", 2),
        ("relation", "circle", "left of", "square"),
        ("relation", "square", "right of", "circle"),
        ("relation", "circle", "above", "cross"),
        ("relation", "cross", "below", "circle"),
        ("fork", "above", "left of"),
    }
    sized = [{"class": "square", "count": 1, "size": "large"}, {"class": "cross", "count": 5, "size": "small"}]
    assert record_of("size", "an icon of", sized)["prompt"] == "an icon of a large square and five small crosses"


@given(st.sampled_from(KINDS), seeds)
def test_whatever_is_asked_for_can_be_drawn_and_is_right(kind, seed):
    level, tag = kind
    record = any_record(level, tag, seed)
    least, most = OBJECTS[level]
    assert least <= sum(clause["count"] for clause in record["include"]) <= most
    assert len({clause["class"] for clause in record["include"]}) == len(record["include"])
    assert set(record["prompt"].split()) <= prompt_words()
    scene = sample_scene_for(record, np.random.default_rng(seed))
    assert satisfies(record, scene, margin=0.1)
    assert Counter(i.shape for i in scene.objects) == {c["class"]: c["count"] for c in record["include"]}
    for mode in ("standard", "strict"):
        correct, reason = evaluate(record, as_judged(scene), mode)
        assert correct, reason
    cells = [cell for item in scene.objects for cell in item.cells]
    assert len(cells) == len(set(cells))


@given(st.sampled_from(KINDS), seeds)
def test_held_out_is_exactly_what_names_a_held_out_composition(kind, seed):
    record = any_record(*kind, seed)
    assert (split_of(record) == "heldout") == any(found in HELDOUT for found in compositions(record))


@pytest.mark.parametrize("level", LEVELS)
def test_no_train_prompt_names_a_heldout_composition(level):
    trained = [record for tag in TAGS[level] for record in pool(level, "train", tag)]
    heldout = prompts(level, "heldout")
    assert not any(compositions(record) & HELDOUT for record in trained)
    assert all(compositions(record) & HELDOUT for record in heldout)
    assert not {record["prompt"] for record in trained} & {record["prompt"] for record in heldout}
    assert {r["prompt"] for r in prompts(level, "train")} <= {r["prompt"] for r in trained}
    words = {word for record in prompts(level, "train") for word in record["prompt"].split()}
    assert {word for record in heldout for word in record["prompt"].split()} <= words


@pytest.mark.parametrize("level", LEVELS)
def test_every_kind_of_composition_is_held_out_and_trained(level):
    kinds = {"colored", "sized", "count", "relation", "fork"}
    for split in ("train", "heldout"):
        assert {c[0] for record in prompts(level, split) for c in compositions(record)} == kinds
    named = {c for record in prompts(level, "heldout") for c in compositions(record)} & HELDOUT
    assert {c[0] for c in named} == kinds


@pytest.mark.parametrize("level", LEVELS)
def test_prompts_are_distinct_even_over_the_tags_and_safe_to_change(level):
    for split, count in (("train", TRAIN_PER_TAG), ("heldout", HELDOUT_PER_TAG)):
        found = prompts(level, split)
        assert Counter(record["tag"] for record in found) == dict.fromkeys(TAGS[level], count)
        assert len({record["prompt"] for record in found}) == len(found)
        before = json.dumps(found)
        found[0]["include"][0]["class"] = "changed"
        assert json.dumps(prompts(level, split)) == before


def test_held_out_sizes_are_drawn_where_nobody_asks_for_them():
    """Else their codes would never be drawn in training."""
    rng, drawn = np.random.default_rng(0), set()
    for tag in TAGS["middle"]:
        for record in pool("middle", "train", tag)[:100]:
            drawn |= {(item.shape, item.size) for item in sample_scene_for(record, rng).objects}
    assert drawn == {(shape, size) for shape in SHAPES for size in SIZES}


# ---- the task ---------------------------------------------------------------------------------------------------


def test_a_level_is_an_option_of_the_task():
    assert get_task("shapes", level="hard").sizes == ("small", "large")
    with pytest.raises(UserError, match="task.options.level: .*'easy', 'middle' or 'hard'"):
        get_task("shapes", level="harder")
    with pytest.raises(UserError, match="did you mean 'heldout'"):
        get_task("shapes", level="middle").prompts("held_out")
