import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.functions.geneval import evaluate
from tasks.base import Detection
from tasks.shapes.demonstrations import slip
from tasks.shapes.detector import detect
from tasks.shapes.language import (
    KINDS,
    Claim,
    Clause,
    Mistake,
    claims,
    clause_of,
    describe,
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
from tasks.shapes.prompts import TAGS, pool, sample_scene_for
from tasks.shapes.render import render
from tasks.shapes.world import COLORS, PLACES, SHAPES, Object, Scene, sample_scene

RED_SQUARE = Object("square", "red", PLACES.index("right"))
BLUE_CIRCLE = Object("circle", "blue", PLACES.index("top-left"))
BOTH = Scene((RED_SQUARE, BLUE_CIRCLE))

clauses = st.builds(
    Clause, st.sampled_from(SHAPES), st.none() | st.sampled_from(list(COLORS)), st.none() | st.sampled_from(PLACES)
)


def color_attr(a=("circle", "blue"), b=("square", "red")):
    return {
        "tag": "color_attr",
        "prompt": "",
        "include": [{"class": shape, "count": 1, "color": color} for shape, color in (a, b)],
    }


def counting(shape, count):
    return {
        "tag": "counting",
        "prompt": "",
        "include": [{"class": shape, "count": count}],
        "exclude": [{"class": shape, "count": count + 1}],
    }


# ---- descriptions -----------------------------------------------------------------------------------------------


def test_a_scene_is_described_in_its_own_order():
    assert describe(BOTH) == "red square right , blue circle top-left"
    assert describe(Scene(())) == "nothing" and parse_description("nothing") == []


@given(st.lists(clauses, min_size=1, max_size=4))
def test_what_is_described_is_read_back(said):
    read = parse_description(describe(said))
    assert read is not None and sorted(map(str, read)) == sorted(map(str, said))
    assert {word for clause in said for word in str(clause).split()} <= vocabulary()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "red",
        "red red circle",
        "circle square",
        "circle ,",
        "top circle",
        "hexagon",
        "red circle right left",
        "nothing , circle",
    ],
)
def test_nonsense_is_no_description(text):
    assert parse_description(text) is None


def test_a_plan_is_read_by_its_last_description():
    text = plan("draw all", BOTH)
    assert text == "<ins> draw all </ins> <des> red square right , blue circle top-left </des>"
    assert parse_plan(text) == [clause_of(RED_SQUARE), clause_of(BLUE_CIRCLE)]
    assert parse_plan("<des> red circle </des> <des> blue cross </des>") == [Clause("cross", "blue")]
    assert parse_plan("<ins> draw all </ins>") is None and parse_plan("<des> draw </des>") is None


# ---- claims -----------------------------------------------------------------------------------------------------


def test_claims_of_inspections():
    seen = (clause_of(BLUE_CIRCLE), clause_of(RED_SQUARE))
    assert claims(f"<inspect> {inspection(color_attr(), BOTH, None)} </inspect>") == Claim("fine", (), seen)
    wrong = Mistake("color", clause_of(RED_SQUARE))
    text = "blue circle = blue circle top-left yes , green square = red square right no : wrong color red square right"
    assert inspection(color_attr(b=("square", "green")), BOTH, wrong) == text
    assert claims(f"<inspect> {text} </inspect>") == Claim("wrong", (wrong,), seen)
    assert claims(f"{text} ; make red square right green") == Claim("wrong", (wrong,), seen)


@pytest.mark.parametrize(
    "text, claim",
    [
        ("", Claim(None)),
        ("fine", Claim("fine")),
        ("red hexagon : fine", Claim("fine")),
        ("circle : fine wrong", Claim(None, (), (Clause("circle"),))),
        ("nothing : wrong", Claim("wrong", (), ())),
        (
            "circle : wrong missing cross , extra circle",
            Claim(
                "wrong", (Mistake("missing", Clause("cross")), Mistake("extra", Clause("circle"))), (Clause("circle"),)
            ),
        ),
        ("circle : wrong circle", Claim("wrong", (), (Clause("circle"),))),
    ],
)
def test_claims_of_what_a_policy_might_write(text, claim):
    assert claims(text) == claim


@given(st.lists(st.sampled_from([*sorted(vocabulary()), "<inspect>", "<junk", "</inspect>"]), max_size=12))
def test_claims_never_fail(words):
    claim = claims(" ".join(words))
    assert claim.verdict in ("fine", "wrong", None)
    assert all(mistake.kind in KINDS for mistake in claim.mistakes)


def test_refinements_by_kind():
    square = clause_of(RED_SQUARE)
    assert refinement(Mistake("color", square), Object("square", "green", 5)) == "make red square right green"
    assert refinement(Mistake("shape", square), Object("cross", "red", 5)) == "make red square right cross"
    assert refinement(Mistake("place", square), Object("square", "red", 3)) == "move red square right to left"
    assert refinement(Mistake("missing", square), RED_SQUARE) == "add red square right"
    assert refinement(Mistake("extra", square), None) == "remove red square right"


# ---- slots ------------------------------------------------------------------------------------------------------

GREEN_CIRCLE = Object("circle", "green", PLACES.index("bottom"))


@pytest.mark.parametrize(
    "record, objects, said",
    [
        # a color that fits comes before reading order, a shape that fits before one that doesn't
        (
            color_attr(("circle", "green"), ("square", "red")),
            (BLUE_CIRCLE, GREEN_CIRCLE, RED_SQUARE),
            "green circle = green circle bottom yes , red square = red square right yes",
        ),
        (
            color_attr(("cross", "green"), ("square", "red")),
            (BLUE_CIRCLE, RED_SQUARE),
            "green cross = blue circle top-left no , red square = red square right yes",
        ),
        (color_attr(), (RED_SQUARE,), "blue circle = nothing no , red square = red square right yes"),
        # too many are a fault where the record counts, and only there
        (
            counting("circle", 1),
            (BLUE_CIRCLE, GREEN_CIRCLE),
            "circle = blue circle top-left yes , nothing = green circle bottom no",
        ),
        (
            {"include": [{"class": "circle", "count": 1}]},
            (BLUE_CIRCLE, GREEN_CIRCLE),
            "circle = blue circle top-left yes",
        ),
        (
            {"include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}]},
            (RED_SQUARE, BLUE_CIRCLE),
            "square = red square right yes , left of circle = blue circle top-left yes",
        ),
        (
            {"include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["below", 0]}]},
            (RED_SQUARE, BLUE_CIRCLE),
            "square = red square right yes , below circle = blue circle top-left no",
        ),
    ],
)
def test_an_inspection_puts_what_is_seen_beside_what_is_wanted(record, objects, said):
    assert slots(record, Scene(objects)) == said
    listed = claims(f"{said} : fine").seen
    assert listed is not None and set(listed) <= {clause_of(item) for item in objects}


def test_marks_say_no_exactly_where_the_image_is_wrong():
    rng = np.random.default_rng(4)
    for tag in TAGS:
        for record in pool("train", tag)[::40]:
            scene = sample_scene_for(record, rng)
            assert "no" not in slots(record, scene).split()
            assert "no" in slots(record, slip(record, scene, rng).scene).split()


# ---- requirements -----------------------------------------------------------------------------------------------


def test_a_whole_plan_owes_the_whole_prompt():
    record = color_attr()
    assert requirement(record, plan("draw all", BOTH)) is record
    assert requirement(record, "<des> gibberish </des>") is record
    assert requirement(record, plan("draw all", Scene(()))) is record  # nothing planned: no excuse
    wrong_color = Scene((BLUE_CIRCLE, Object("square", "green", 5)))
    assert requirement(record, plan("draw all", wrong_color)) is record  # a wrong plan owes the prompt too


def test_a_partial_plan_owes_its_part():
    part = requirement(color_attr(), plan("draw one square", Scene((RED_SQUARE,))))
    assert part["include"] == [{"class": "square", "count": 1, "color": "red"}]
    part = requirement(counting("cross", 4), "<des> red cross top-left , red cross right </des>")
    assert part["include"] == [{"class": "cross", "count": 2}] and part["exclude"] == [{"class": "cross", "count": 3}]


def test_a_partial_plan_owes_its_part_of_a_class_that_several_clauses_name():
    record = {
        "include": [{"class": "cross", "count": 1}, {"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
    }
    for turned in (record, {**record, "include": record["include"][::-1]}):
        part = requirement(turned, "<des> red cross top-left , red cross right </des>")
        assert sorted(clause["count"] for clause in part["include"]) == [1, 2]
        assert part["exclude"] == [{"class": "cross", "count": 3}]  # two are right, though one clause wants one
        two = {"cross": [Detection((0.0, 0.0, 9.0, 9.0), 0.99, "red"), Detection((20.0, 0.0, 29.0, 9.0), 0.99, "red")]}
        assert evaluate(part, two) == (True, "")


def test_a_relation_is_owed_where_both_ends_are_planned():
    record = {
        "tag": "position",
        "prompt": "",
        "include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
    }
    assert requirement(record, "<des> circle </des>")["include"] == [{"class": "circle", "count": 1}]
    assert requirement(record, "<des> square </des>")["include"] == [{"class": "square", "count": 1}]
    assert requirement(record, "<des> square , circle </des>") is record


# ---- named mistakes ---------------------------------------------------------------------------------------------


def look(*items):
    return detect(render(Scene(items)))


def test_named_mistakes_hold_or_not():
    record = color_attr(("circle", "blue"), ("square", "green"))
    shown = look(RED_SQUARE, BLUE_CIRCLE)  # the square ought to be green
    assert holds(Mistake("color", Clause("square", "red", "right")), record, shown)
    assert holds(Mistake("color", Clause("square")), record, shown)
    assert not holds(Mistake("color", Clause("circle", "blue", "top-left")), record, shown)
    assert not holds(Mistake("color", Clause("square", "purple")), record, shown)  # there is none
    assert not holds(Mistake("missing", Clause("square", "green")), record, shown)
    assert not holds(Mistake("extra", Clause("square")), record, shown)


def test_what_is_seen_is_named_as_it_is_described():
    rng = np.random.default_rng(2)
    for _ in range(50):
        scene = sample_scene(rng, int(rng.integers(1, 5)))
        assert set(seen_in(look(*scene.objects))) == {clause_of(item) for item in scene.objects}


def test_missing_and_shape():
    record = color_attr()
    assert holds(Mistake("missing", Clause("square", "red")), record, look(BLUE_CIRCLE))
    assert not holds(Mistake("missing", Clause("square", "blue")), record, look(BLUE_CIRCLE))
    assert not holds(Mistake("missing", Clause("cross")), record, look(BLUE_CIRCLE))
    cross = Object("cross", "red", 5)
    assert holds(Mistake("shape", clause_of(cross)), record, look(BLUE_CIRCLE, cross))
    assert not holds(Mistake("shape", clause_of(BLUE_CIRCLE)), record, look(BLUE_CIRCLE, cross))
    assert not holds(Mistake("shape", clause_of(cross)), record, look(BLUE_CIRCLE, RED_SQUARE, cross)[:0])


@pytest.mark.parametrize("turned", [False, True])
def test_a_mistake_holds_for_any_clause_of_its_class(turned):
    include = [{"class": "cross", "count": 1, "color": "red"}, {"class": "cross", "count": 3}]
    record = {"include": include[::-1] if turned else include}
    red, blue, green = (Object("cross", color, place) for color, place in (("red", 0), ("blue", 2), ("green", 6)))
    assert holds(Mistake("missing", Clause("cross")), record, look(red, blue))  # the second wants three
    assert not holds(Mistake("missing", Clause("cross")), record, look(red, blue, green))
    assert holds(Mistake("color", Clause("cross", "blue")), record, look(red, blue, green))  # the first wants red
    assert not holds(Mistake("color", Clause("cross", "red")), record, look(red, blue, green))
    # A cross in a circle's place: crosses are too many only where every clause of theirs has more than it wants.
    lacking = {"include": [*record["include"], {"class": "circle", "count": 1}]}
    fourth = Object("cross", "red", 8)
    assert not holds(Mistake("shape", Clause("cross", "blue")), lacking, look(red, blue, green))
    assert holds(Mistake("shape", Clause("cross", "blue")), lacking, look(red, blue, green, fourth))


def test_extra_is_a_fault_in_counting_only():
    squares = [Object("square", "red", place) for place in (0, 2, 6)]
    assert holds(Mistake("extra", Clause("square")), counting("square", 2), look(*squares))
    assert not holds(Mistake("extra", Clause("square")), counting("square", 3), look(*squares))
    assert not holds(Mistake("extra", Clause("square")), color_attr(), look(*squares))


def test_a_broken_relation_holds_for_either_end():
    record = next(r for r in pool("heldout", "position") if "a circle left of a square" in r["prompt"])
    wrong = look(Object("circle", "blue", PLACES.index("right")), Object("square", "red", PLACES.index("left")))
    right = look(Object("circle", "blue", PLACES.index("left")), Object("square", "red", PLACES.index("right")))
    for shape in ("circle", "square"):
        assert holds(Mistake("place", Clause(shape)), record, wrong)
        assert not holds(Mistake("place", Clause(shape)), record, right)
    assert not holds(Mistake("place", Clause("cross")), record, wrong)


def test_every_sentence_is_made_of_known_words():
    rng = np.random.default_rng(0)
    for _ in range(100):
        scene = sample_scene(rng, int(rng.integers(1, 5)))
        item = scene.objects[0]
        for kind in KINDS:
            mistake = Mistake(kind, clause_of(item))
            target = item if kind != "extra" else None
            said = f"{inspection(color_attr(), scene, mistake)} {refinement(mistake, target)}"
            assert set(said.split()) <= vocabulary()
