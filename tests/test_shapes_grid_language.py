"""The little language of the levels middle and hard, and thoughts in every format."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.registry import get_format
from record.trajectory import Author
from rewards.functions.geneval import evaluate
from rollout.tools.look import Look
from runtime.errors import UserError
from tasks.contract import check_task
from tasks.registry import get_task
from tasks.shapes.grid import CELLS, SIZES, Sized, render, sample_scene_for, satisfies
from tasks.shapes.grid_demonstrations import FORMATS, steps
from tasks.shapes.grid_detector import detect
from tasks.shapes.grid_language import (
    GRID_KINDS,
    claims,
    clause_of,
    describe,
    groups,
    holds,
    inspection,
    parse_description,
    parse_plan,
    plan,
    refinement,
    requirement,
    seen_in,
    slots,
    vocabulary,
)
from tasks.shapes.grid_mistakes import slip
from tasks.shapes.grid_prompts import TAGS, pool
from tasks.shapes.language import Claim, Clause, Mistake
from tasks.shapes.world import COLORS, SHAPES, Scene

KINDS = [(level, tag) for level in TAGS for tag in TAGS[level]]
COUNT = 60
clauses = st.builds(
    Clause,
    st.sampled_from(SHAPES),
    st.sampled_from(list(COLORS)),
    st.sampled_from(CELLS),
    st.sampled_from(list(SIZES)),
)


def thing(text: str) -> Sized:
    size, color, shape, cell = text.split()
    return Sized(shape, color, CELLS.index(cell), size=size)


CIRCLES = [thing(f"small red circle {cell}") for cell in ("a1", "b2", "c4")]
SQUARE = thing("large blue square c1")
RECORD = {
    "tag": "size_color",
    "prompt": "three small red circles and a large blue square",
    "include": [
        {"class": "circle", "count": 3, "size": "small", "color": "red"},
        {"class": "square", "count": 1, "size": "large", "color": "blue"},
    ],
    "exclude": [{"class": "circle", "count": 4}],
}


def judged(record, image, mode="strict"):
    found: dict = {}
    for seen in detect(image):
        found.setdefault(seen.cls, []).append(seen)
    return evaluate(record, found, mode)[0]


# ---- descriptions -----------------------------------------------------------------------------------------------


def test_what_looks_alike_is_named_together():
    assert describe([*CIRCLES, SQUARE]) == "small red circle a1 b2 c4 , large blue square c1"
    assert describe([]) == "nothing" and parse_description("nothing") == []
    text = plan("add", [SQUARE, *CIRCLES[:2]], [*CIRCLES, SQUARE])
    assert text.startswith("<ins> add one square and two circles </ins> <des> small red circle a1 b2 c4 ,")
    assert parse_plan(text) == [clause_of(item) for item in [*CIRCLES, SQUARE]]
    assert parse_description("red circle a1 b2 , cross") == [
        Clause("circle", "red", "a1"),
        Clause("circle", "red", "b2"),
        Clause("cross"),
    ]


@given(st.lists(clauses, min_size=1, max_size=8))
def test_what_is_described_is_read_back(said):
    text = " , ".join(groups(said))
    assert parse_description(text) == said
    assert set(text.split()) <= vocabulary()


@pytest.mark.parametrize("text", ["", "red", "red small circle", "circle a5", "circle ,", "circle top-left", "a1"])
def test_nonsense_is_no_description(text):
    assert parse_description(text) is None


# ---- inspections ------------------------------------------------------------------------------------------------


def test_slots_by_hand():
    whole = Scene((*CIRCLES, SQUARE))
    assert slots(RECORD, whole) == (
        "three small red circle = small red circle a1 b2 c4 yes , large blue square = large blue square c1 yes"
    )
    # One circle is large (and c4 is no place for one, so it moves), one of another color.
    odd = Scene((CIRCLES[0], thing("small green circle b2"), thing("large red circle c3"), SQUARE))
    assert slots(RECORD, odd) == (
        "three small red circle = small red circle a1 and small green circle b2 and large red circle c3 no , "
        "large blue square = large blue square c1 yes"
    )
    # A square in a circle's place stands where the circle is missing.
    other = Scene((*CIRCLES[:2], thing("small red square c4"), SQUARE))
    assert slots(RECORD, other) == (
        "three small red circle = small red circle a1 b2 and small red square c4 no , "
        "large blue square = large blue square c1 yes"
    )
    four = Scene((*CIRCLES, thing("small red circle d4"), SQUARE))  # one too many
    assert "small red circle a1 b2 c4 d4 no" in slots(RECORD, four)
    assert slots(RECORD, Scene((SQUARE,))).startswith("three small red circle = nothing no ,")


def test_a_relation_of_three_is_marked_at_the_end_that_breaks_it():
    fork = {
        "include": [
            {"class": "circle", "count": 1},
            {"class": "square", "count": 1, "position": ["right of", 0]},
            {"class": "cross", "count": 1, "position": ["below", 0]},
        ]
    }
    scene = Scene((thing("small red circle a1"), thing("small red square c1"), thing("small red cross a3")))
    assert slots(fork, scene).split().count("yes") == 3
    moved = Scene((*scene.objects[:2], thing("small red cross d1")))
    said = (
        "circle = small red circle a1 yes , right of square = small red square c1 yes , "
        "below cross = small red cross d1 no"
    )
    assert slots(fork, moved) == said
    wrong = Mistake("place", clause_of(moved.objects[2]))
    assert holds(wrong, fork, detect(render(moved))) and not holds(wrong, fork, detect(render(scene)))
    square = Mistake("place", clause_of(moved.objects[1]))  # it stands where it should
    assert not holds(square, fork, detect(render(moved)))


def test_claims_by_hand():
    seen = tuple(clause_of(item) for item in [*CIRCLES, SQUARE])
    whole = Scene((*CIRCLES, SQUARE))
    assert claims(f"<inspect> {inspection(RECORD, whole, [])} </inspect>") == Claim("fine", (), seen)
    wrong = Mistake("size", clause_of(SQUARE))
    text = f"{inspection(RECORD, whole, [wrong])} ; make large blue square c1 small"
    assert claims(text) == Claim("wrong", (wrong,), seen)
    missing = [Mistake("missing", clause_of(item)) for item in [*CIRCLES[:2], SQUARE]]
    said = inspection(RECORD, Scene(()), missing)
    assert said.endswith(": wrong missing small red circle a1 b2 , missing large blue square c1")
    assert claims(said) == Claim("wrong", tuple(missing), ())
    assert claims("circle = red circle a1 yes") == Claim(None)
    assert claims("circle : fine wrong").verdict is None and claims("circle : wrong size").mistakes == ()


@given(st.lists(st.sampled_from([*sorted(vocabulary()), "<inspect>", "<junk", "and"]), max_size=12))
def test_claims_never_fail(words):
    claim = claims(" ".join(words))
    assert claim.verdict in ("fine", "wrong", None)
    assert all(mistake.kind in GRID_KINDS for mistake in claim.mistakes)


def test_refinements_by_kind():
    circle = clause_of(CIRCLES[0])
    assert refinement([Mistake("size", circle)], thing("large red circle a1")) == "make small red circle a1 large"
    assert refinement([Mistake("color", circle)], thing("small blue circle a1")) == "make small red circle a1 blue"
    assert refinement([Mistake("shape", circle)], thing("small red cross a1")) == "make small red circle a1 cross"
    assert refinement([Mistake("place", circle)], thing("small red circle d2")) == "move small red circle a1 to d2"
    assert refinement([Mistake("extra", circle)], None) == "remove small red circle a1"
    missing = [Mistake("missing", clause_of(item)) for item in [*CIRCLES[:2], SQUARE]]
    assert refinement(missing, None) == "add small red circle a1 b2 and large blue square c1"


def test_a_partial_plan_owes_its_part_with_its_sizes():
    part = requirement(RECORD, plan("draw", CIRCLES[:2], CIRCLES[:2]))
    assert part["include"] == [{"class": "circle", "count": 2, "size": "small", "color": "red"}]
    assert part["exclude"] == [{"class": "circle", "count": 3}]
    assert requirement(RECORD, plan("add", [SQUARE], [*CIRCLES, SQUARE])) is RECORD
    assert requirement(RECORD, "<des> gibberish </des>") is RECORD


def test_a_wrong_size_holds_only_where_one_is_asked_for():
    wrong = thing("small blue square c1")
    shown = detect(render(Scene((*CIRCLES, wrong))))
    assert holds(Mistake("size", clause_of(wrong)), RECORD, shown)
    assert not holds(Mistake("size", clause_of(CIRCLES[0])), RECORD, shown)
    assert not holds(Mistake("color", clause_of(wrong)), RECORD, shown)
    unsized = {"include": [{"class": "square", "count": 1}]}
    assert not holds(Mistake("size", clause_of(wrong)), unsized, shown)


@given(st.sampled_from(KINDS), st.integers(0, 1199), st.integers(0, 2**32 - 1))
def test_mistakes_are_true_and_repairs_undo_them(kind, number, seed):
    rng = np.random.default_rng(seed)
    record = pool(kind[0], "train", kind[1])[number]
    scene = sample_scene_for(record, rng)
    assert "no" not in slots(record, scene).split()
    made = slip(record, scene, range(len(scene.objects)), rng)
    assert not satisfies(record, made.scene) and not judged(record, render(made.scene), "standard")
    assert "no" in slots(record, made.scene).split()
    shown = detect(render(made.scene))
    assert holds(made.mistake, record, shown), made.mistake
    assert Counter(seen_in(shown)) == Counter(map(clause_of, made.scene.objects))
    claim = claims(inspection(record, made.scene, [made.mistake]))
    assert claim.verdict == "wrong" and claim.mistakes == (made.mistake,)
    assert Counter(claim.seen) == Counter(map(clause_of, made.scene.objects))
    wrong = {clause_of(item) for item in made.scene.objects} ^ {clause_of(item) for item in scene.objects}
    assert wrong == {made.mistake.object, *([clause_of(made.target)] if made.target else [])}


# ---- demonstrations ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written():
    tasks = {level: get_task("shapes", level=level) for level in TAGS}
    return {
        (level, name): task.demonstrations(name, COUNT, seed=0) for level, task in tasks.items() for name in FORMATS
    }


def drawn(shown):
    return [(i, p.image) for i, p in enumerate(shown.parts) if p.image is not None and p.author is Author.POLICY]


@pytest.mark.parametrize("level", list(TAGS))
def test_the_task_keeps_its_contract(level):
    formats, numbers = [get_format(name) for name in FORMATS], Look(Look.Options()).words
    check_task(get_task("shapes", level=level), formats, demonstrations=6, words=numbers)


def test_every_last_image_is_right_and_no_picture_is_composed_at_once(written):
    for (level, name), thoughts in written.items():
        assert Counter(shown.record["tag"] for shown in thoughts) == dict.fromkeys(TAGS[level], COUNT // 6)
        for shown in thoughts:
            images = drawn(shown)
            assert judged(shown.record, images[-1][1]), shown.prompt
            if name == "direct":
                assert len(shown.parts) == 1
                continue
            assert 2 <= len(images) <= (3 if name == "look" else 4)
            first = next(image for i, image in images if i not in shown.mistakes)
            assert len(detect(first)) < len(detect(images[-1][1]))


def test_about_half_have_a_mistake_and_all_kinds_are_made(written):
    kinds: Counter = Counter()
    for name in FORMATS:
        thoughts = [shown for level in TAGS for shown in written[level, name]]
        if name != "direct":
            assert 0.35 < np.mean([bool(shown.mistakes) for shown in thoughts]) < 0.65, name
        kinds.update(m.kind for shown in thoughts for part in shown.parts for m in claims(part.text).mistakes)
    assert set(kinds) == set(GRID_KINDS) and min(kinds.values()) > 10, kinds
    assert not any(s.mistakes for s in get_task("shapes", level="hard", mistake_rate=0).demonstrations("look", 30, 0))


@pytest.mark.parametrize("name", ["strokes", "self_critique", "look"])
def test_inspections_say_what_is_there_and_are_right(written, name):
    said: Counter = Counter()
    for level in TAGS:
        for shown in written[level, name]:
            owed = shown.record
            for i, part in enumerate(shown.parts):
                if part.role == "plan" and name == "strokes":
                    owed = requirement(shown.record, part.text)
                after = i + (3 if name == "look" else 1)  # after a look and its crop
                if part.image is None or part.author is not Author.POLICY or after >= len(shown.parts):
                    continue
                found, claim = detect(part.image), claims(shown.parts[after].text)
                assert claim.verdict == ("fine" if judged(owed, part.image) else "wrong")
                assert Counter(claim.seen) == Counter(seen_in(found))
                assert all(holds(mistake, owed, found) for mistake in claim.mistakes)
                assert (claim.verdict == "wrong") or i not in shown.mistakes
                said[claim.verdict] += 1
    assert min(said["fine"], said["wrong"]) > 30


def test_thoughts_in_strokes_are_short(written):
    """With 18 ids an image, they fit into rows of 384 ids; the mean is what a rollout costs."""
    for level, most in (("middle", 200), ("hard", 220)):
        lengths = [
            len(shown.prompt.split())
            + sum(18 if part.image is not None else len(part.text.split()) for part in shown.parts)
            for shown in written[level, "strokes"]
        ]
        assert np.mean(lengths) < most and max(lengths) < 384


def test_steps_grow_to_the_whole():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(40):
        parts = steps(Scene((*CIRCLES, SQUARE, thing("small red cross a3"))), rng)
        sizes = [len(part.objects) for part in parts]
        assert sizes[-1] == 5 and sizes == sorted(set(sizes))
        seen.add(tuple(sizes))
    assert seen == {(3, 5), (4, 5), (3, 4, 5)}
    assert [len(part.objects) for part in steps(Scene(tuple(CIRCLES)), rng)] == [2, 3]


def test_the_seed_decides_and_an_unknown_format_is_named():
    task = get_task("shapes", level="middle")
    first, again, other = (task.demonstrations("strokes", 8, seed) for seed in (1, 1, 2))
    said = [[(s.prompt, [p.text for p in s.parts]) for s in some] for some in (first, again, other)]
    assert said[0] == said[1] and said[0] != said[2]
    with pytest.raises(UserError, match="did you mean 'strokes'"):
        task.demonstrations("stroke", 1, 0)
