"""Published rewards on drawn images: parity with the releases, hand-computed tables, and every relation on
rendered scenes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rewards_helpers import image_segment, text, trajectory_of

from record.trajectory import Author
from rewards.contract import RewardContext, RewardError
from rewards.detectors.base import Detection, UnknownClass
from rewards.detectors.shapes import TaskDetector
from rewards.functions.geneval import geneval
from rewards.published import got_r1 as got
from rewards.published import janus_pro_r1 as janus
from rewards.published import t2i_r1 as t2i
from rewards.published.flow_grpo import flow_grpo_geneval
from runtime.errors import UserError
from tasks.registry import get_task
from tasks.shapes.render import render
from tasks.shapes.world import PLACES, Object, Scene

# ---- parity -----------------------------------------------------------------------------------------------------


def t2i_score(record, variant):
    given = record["inputs"]
    found = {d["phrase"]: (d["boxes"], d["scores"]) for d in given.get("detections", ())}
    if record["function"] == "spatial":
        return t2i.spatial(found, given["object_1"], given["object_2"], given["relation"], given["image_size"], variant)
    if record["function"] == "numeracy":
        return t2i.numeracy(found, [(row["object"], row["count"]) for row in given["counts"]], variant)
    if record["function"] == "objects":
        return t2i.objects_share(found, given["objects"])
    return t2i.yes_share(given["logits"], given["task"], given["phrases"], given["objects"], variant)


@pytest.mark.parity
def test_t2i_r1_equals_the_release_and_its_repair(reference_records):
    for number, record in enumerate(reference_records("rewards/t2i_r1.jsonl")):
        assert t2i_score(record, "release") == pytest.approx(record["outputs"]["total"], abs=1e-4), number
        if "total_repaired" in record["outputs"]:
            repaired = t2i_score(record, "repaired")
            assert repaired == pytest.approx(record["outputs"]["total_repaired"], abs=1e-4), number


class Placed:
    """Sees the fixture's boxes, whatever the image is."""

    open_vocabulary, classes = True, ()

    def __init__(self, detections, size):
        self.detections, self.size = detections, size

    def detect_phrases(self, images, phrases):
        width, height = self.size
        return [
            {
                d["phrase"]: [
                    Detection(
                        ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height), score
                    )
                    for (x, y, w, h), score in zip(d["boxes"], d["scores"], strict=True)
                ]
                for d in self.detections
                if d["phrase"] in some
            }
            for some in phrases
        ]


@pytest.mark.parity
def test_t2i_r1_gives_the_same_through_a_detector_and_a_trajectory(reference_records):
    for number, record in enumerate(reference_records("rewards/t2i_r1.jsonl")):
        if record["function"] == "yes_share":
            continue
        given = record["inputs"]
        size = given.get("image_size", [384, 384])
        context = RewardContext.of(None, None, Placed(given["detections"], size))
        row = trajectory_of(
            {key: given[key] for key in ("object_1", "object_2", "relation", "counts", "objects") if key in given},
            image_segment("sketch", np.zeros((size[1], size[0], 3), np.uint8)),
        )
        for variant, key in (("release", "total"), ("repaired", "total_repaired")):
            if key in record["outputs"]:
                (got_value,) = t2i.t2i_r1_detector([row], context, variant=variant)
                assert got_value == pytest.approx(record["outputs"][key], abs=1e-4), (number, variant)


@pytest.mark.parity
def test_janus_pro_r1_equals_the_release(reference_records):
    for number, record in enumerate(reference_records("rewards/janus_pro_r1.jsonl")):
        given, expected = record["inputs"], record["outputs"]
        rows = [
            janus.segments(*row)
            for row in zip(given["first_score"], given["final_score"], given["self_check_yes"], strict=True)
        ]
        assert [sum(row) for row in rows] == pytest.approx(expected["total"], abs=1e-4), number
        for part, name in enumerate(("draw", "self_check", "redraw")):
            column = [row[part] for row in rows]
            assert column == pytest.approx(expected[name], abs=1e-4), (number, name)
            credit = janus.advantages(column, given["group_size"])
            assert credit == pytest.approx(expected[f"advantage_{name}"], abs=1e-3), (number, name)


class Says:
    """A judge that gives each image the probability written into its first pixel, in per mille; None from 65 on."""

    def __init__(self):
        self.asked = []

    def yes_probability(self, questions):
        values = []
        for question in questions:
            self.asked.append(question.messages[-1]["content"][-1]["text"])
            marked = question.messages[-1]["content"][0]["image"][0, 0]
            values.append(None if marked[0] > 64 else (int(marked[0]) * 256 + int(marked[1])) / 10_000)
        return values


def marked(probability):
    value = round(probability * 10_000) if probability is not None else 65 * 256
    image = np.zeros((4, 4, 3), np.uint8)
    image[0, 0, :2] = divmod(value, 256)
    return image


@pytest.mark.parity
def test_janus_pro_r1_gives_the_same_through_trajectories(reference_records):
    for number, record in enumerate(reference_records("rewards/janus_pro_r1.jsonl")):
        given = record["inputs"]
        rows = []
        for first, final, yes in zip(given["first_score"], given["final_score"], given["self_check_yes"], strict=True):
            again = [] if yes and first == final else [image_segment("sketch", marked(final))]
            rows.append(
                trajectory_of(
                    {}, image_segment("sketch", marked(first)), text("inspect", "Yes" if yes else "No"), *again
                )
            )
        totals = janus.janus_pro_r1(rows, RewardContext(judge=Says()), credit="trajectory")
        assert totals == pytest.approx(record["outputs"]["total"], abs=1e-3), number
        for row, credited in enumerate(janus.janus_pro_r1(rows, RewardContext(judge=Says()))):
            expected = {
                1: record["outputs"]["draw"][row],
                2: record["outputs"]["self_check"][row],
                3: record["outputs"]["redraw"][row],
            }
            assert credited == pytest.approx({k: expected[k] for k in credited}, abs=1e-3)


# ---- T2I-R1 by hand ---------------------------------------------------------------------------------------------

LEFT, RIGHT = (0.2, 0.5, 0.2, 0.2), (0.8, 0.5, 0.2, 0.2)
TOP, CORNER = (0.5, 0.1, 0.2, 0.2), (0.9, 0.9, 0.1, 0.1)
SIZE = (1000, 1000)


@pytest.mark.parametrize(
    ("first", "second", "name", "repaired", "release"),
    [
        (LEFT, RIGHT, "left of", 1.0, 1.0),
        (LEFT, RIGHT, "on the right of", 0.0, 0.0),
        (TOP, (0.5, 0.9, 0.2, 0.2), "above", 1.0, 0.0),  # the naive reading of "above" is never paid by the release
        (TOP, (0.5, 0.9, 0.2, 0.2), "on top of", 1.0, 0.0),
        (TOP, (0.5, 0.9, 0.2, 0.2), "on the top of", 1.0, 1.0),
        (TOP, (0.5, 0.9, 0.2, 0.2), "below", 0.0, 0.0),
        ((0.5, 0.9, 0.2, 0.2), TOP, "below", 1.0, 1.0),
        # a diagonal further apart in y than in x is not "left"
        ((0.3, 0.1, 0.1, 0.1), (0.6, 0.6, 0.1, 0.1), "left of", 0.0, 0.0),
        ((0.3, 0.1, 0.1, 0.1), (0.6, 0.3, 0.1, 0.1), "left of", 1.0, 1.0),
        # boxes 0.4 wide, 0.2 apart: IoU (0.2 * 0.4) / (2 * 0.16 - 0.08) = 1/3, so 0.1 / (1/3)
        ((0.4, 0.5, 0.4, 0.4), (0.6, 0.5, 0.4, 0.4), "left of", 0.3, 0.3),
        # 700 and 600 px apart: 150 / 700; the release compares 0.7 with 150
        ((0.1, 0.1, 0.1, 0.1), (0.8, 0.7, 0.1, 0.1), "next to", 150 / 700, 1.0),
        ((0.1, 0.1, 0.1, 0.1), (0.8, 0.2, 0.1, 0.1), "near", 1.0, 1.0),  # 100 px apart in y is near, whatever x is
        (LEFT, RIGHT, "beside", 1.0, 0.0),  # a wording that the release lacks
    ],
)
def test_relations_by_hand(first, second, name, repaired, release):
    assert t2i.relation(first, second, name, SIZE) == pytest.approx(repaired)
    assert t2i.relation(first, second, name, SIZE, "release") == pytest.approx(release)


def test_spatial_by_hand():
    found = {"cat": ([LEFT, CORNER], [0.9, 0.4]), "dog": ([RIGHT], [0.5])}
    assert t2i.spatial(found, "cat", "dog", "left of", SIZE) == pytest.approx(0.9)  # 0.2 + 0.2 + 0.5
    assert t2i.spatial(found, "cat", "dog", "right of", SIZE) == pytest.approx(0.4)
    assert t2i.spatial(found, "cat", "bird", "left of", SIZE) == pytest.approx(0.2)
    assert t2i.spatial(found, "cat", "cat", "left of", SIZE) == 0
    surer = {**found, "cat": ([LEFT, CORNER], [0.4, 0.9])}  # the most certain cat is the one in the corner
    assert t2i.spatial(surer, "cat", "dog", "left of", SIZE) == pytest.approx(0.4)
    with pytest.raises(RewardError, match="no relation 'behind'"):
        t2i.spatial(found, "cat", "dog", "behind", SIZE)


def test_numeracy_by_hand():
    # two boxes on one object (IoU 0.81) and one apart: 2 objects
    twice = ([(0.2, 0.2, 0.2, 0.2), (0.21, 0.21, 0.2, 0.2), RIGHT], [0.9, 0.8, 0.7])
    assert t2i.numeracy({"cat": twice}, [("cat", 2)]) == 1.0
    assert t2i.numeracy({"cat": twice}, [("cat", 3)]) == pytest.approx(0.2)
    assert t2i.numeracy({"cat": twice}, [("cat", 2), ("dog", 1)]) == pytest.approx(0.5)
    # as corners (0.2, 0.2, 0.2, 0.2) encloses nothing: the release counts otherwise
    assert t2i.kept(*twice, "repaired") == 2 and t2i.kept(*twice, "release") != 2


def test_objects_and_yes_by_hand():
    assert t2i.objects_share({"cat": ([LEFT], [0.9]), "dog": ([], [])}, ["cat", "dog"]) == 0.5
    assert t2i.objects_share({}, []) == 1.0
    even = {"red cat": {"yes": 1.0, "no": 1.0, "other": 9.0}, "dog": {"yes": math.log(3), "no": 0.0}}
    assert t2i.yes_share(even, "attribute", ["red cat", "dog"], []) == pytest.approx((0.5 + 0.75) / 2)
    assert t2i.yes_share(even, "spatial", ["dog"], []) is None
    assert t2i.yes_share(even, "spatial", ["dog"], [], "release") == 0.0


def test_t2i_r1_yes_asks_once_a_phrase_and_an_unjudged_phrase_leaves_the_thought_unjudged():
    judge = Says()
    rows = [
        trajectory_of({"task": "attribute", "phrases": ["a red cat", "a dog"]}, image_segment("sketch", marked(0.5))),
        trajectory_of({"task": "attribute", "objects": ["cat"]}, image_segment("sketch", marked(None))),
        trajectory_of({"task": "numeracy", "objects": ["cat"]}, image_segment("sketch", marked(0.5))),
        trajectory_of({"task": "complex", "objects": []}, image_segment("sketch", marked(0.5))),
        trajectory_of({"task": "complex", "objects": ["cat"]}),
        trajectory_of({}),
    ]
    assert t2i.t2i_r1_yes(rows, RewardContext(judge=judge)) == [0.5, None, None, 1.0, 0.0, None]
    assert judge.asked == [
        "Does the picture show a red cat? Answer with yes or no.",
        "Does the picture show a dog? Answer with yes or no.",
        "Does the picture show cat? Answer with yes or no.",
    ]
    with pytest.raises(RewardError, match="'t2i_r1_yes' asks a judge"):
        t2i.t2i_r1_yes(rows, RewardContext())


# ---- relations on rendered scenes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    task = get_task("shapes")
    return RewardContext.of(task, None, TaskDetector.of(task))


def scene(circle, square):
    """A red circle and a blue square at named places."""
    return render(
        Scene((Object("circle", "red", PLACES.index(circle)), Object("square", "blue", PLACES.index(square))))
    )


def placed(relation):
    return {
        "tag": "position",
        "prompt": f"a circle {relation} a square",
        "include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": [relation, 0]}],
    }


HOLDS = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}


@pytest.mark.parametrize("asked", HOLDS)
@pytest.mark.parametrize("drawn", HOLDS)
def test_every_relation_pays_and_refuses_on_rendered_scenes(shapes, asked, drawn):
    row = trajectory_of(placed(asked), image_segment("sketch", scene(*HOLDS[drawn])))
    holds = asked == drawn
    assert geneval([row], shapes) == [float(holds)]
    assert geneval([row], shapes, mode="strict") == [float(holds)]
    assert geneval([row], shapes, mode="graded") == [pytest.approx(1.0 if holds else 2 / 3)]
    assert flow_grpo_geneval([row], shapes) == [pytest.approx(1.0 if holds else 0.75)]
    assert t2i.t2i_r1_detector([row], shapes) == [pytest.approx(0.9 if holds else 0.4)]
    paid_by_release = holds and asked != "above"
    assert t2i.t2i_r1_detector([row], shapes, variant="release") == [pytest.approx(0.9 if paid_by_release else 0.4)]


@pytest.mark.parametrize("wording", [*t2i.LEFT, *t2i.RIGHT, *t2i.ABOVE, *t2i.BELOW])
def test_every_wording_of_a_relation_pays_and_refuses(shapes, wording):
    means = next(
        name
        for names, name in ((t2i.LEFT, "left of"), (t2i.RIGHT, "right of"), (t2i.ABOVE, "above"), (t2i.BELOW, "below"))
        if wording in names
    )
    columns = {"object_1": "circle", "object_2": "square", "relation": wording}
    for drawn, places in HOLDS.items():
        (paid,) = t2i.t2i_r1_detector([trajectory_of(columns, image_segment("sketch", scene(*places)))], shapes)
        assert paid == pytest.approx(0.9 if drawn == means else 0.4), (wording, drawn)


@pytest.mark.parametrize("wording", t2i.NEAR)
def test_near_pays_and_refuses(shapes, wording):
    columns = {"object_1": "circle", "object_2": "square", "relation": wording}

    class Large:  # the same scene as if it were drawn 16 times as large: 512 px
        classes = ("circle", "square", "triangle", "cross")

        def detect(self, images):
            found = shapes.detector.detector.detect([p[::16, ::16] for p in images])
            return [
                {
                    name: [Detection(tuple(16 * c for c in o.box), o.score) for o in items]
                    for name, items in objects.items()
                }
                for objects in found
            ]

    large = RewardContext.of(None, None, Large())
    near, far = (
        np.kron(scene(*places), np.ones((16, 16, 1), np.uint8))
        for places in (("left", "right"), ("top-left", "bottom-right"))
    )
    rows = [trajectory_of(columns, image_segment("sketch", image)) for image in (near, far)]
    paid = t2i.t2i_r1_detector(rows, large)
    assert paid[0] == pytest.approx(0.9)  # on one height
    assert paid[1] == pytest.approx(0.4 + 0.5 * 150 / 256)  # 16 px of 32 apart on both axes: 256 px
    known = wording in ("near", "next to", "on side of")
    assert t2i.t2i_r1_detector(rows, large, variant="release") == pytest.approx([0.9 if known else 0.4] * 2)


def test_t2i_r1_reads_genevals_records_counts_and_objects(shapes):
    two = render(Scene((Object("circle", "red", 0), Object("circle", "blue", 8))))
    counting = {
        "tag": "counting",
        "include": [{"class": "circle", "count": 2}],
        "exclude": [{"class": "circle", "count": 3}],
    }
    both = {"tag": "two_object", "include": [{"class": "circle", "count": 1}, {"class": "square", "count": 1}]}
    rows = [
        trajectory_of(counting, image_segment("sketch", two)),
        trajectory_of({**counting, "include": [{"class": "circle", "count": 3}]}, image_segment("sketch", two)),
        trajectory_of(both, image_segment("sketch", two)),
        trajectory_of(both),
        trajectory_of({}, image_segment("sketch", two)),
        trajectory_of({"object_1": "circle", "object_2": "square", "relation": "behind"}, image_segment("sketch", two)),
    ]
    assert t2i.t2i_r1_detector(rows, shapes) == [1.0, pytest.approx(0.2), 0.5, 0.0, None, None]
    with pytest.raises(UnknownClass, match="'zebra'"):
        t2i.t2i_r1_detector([trajectory_of({"objects": ["zebra"]}, image_segment("sketch", two))], shapes)
    with pytest.raises(UserError, match="no variant 'paper'"):
        t2i.t2i_r1_detector([], shapes, variant="paper")


# ---- Janus-Pro-R1 by hand -----------------------------------------------------------------------------------------


def test_janus_by_hand():
    assert janus.segments(0.9, 0.9, True) == pytest.approx((0.9, 0.9, 0.9))
    assert janus.segments(0.9, 0.2, False) == pytest.approx((0.9, 0.1, 0.2))  # a wrong "no" is paid 0.1, not 0.9
    # mean 0.5, sample standard deviation sqrt(0.08) = 0.28284 (the population's would be 0.2)
    assert janus.advantages([0.3, 0.7], 2) == pytest.approx([-0.70686, 0.70686], abs=1e-5)  # 0.2 / 0.28294
    assert janus.advantages([0.3, 0.3, 0.9, 0.9], 2) == [0, 0, 0, 0]


def test_janus_credits_segments_and_leaves_the_unscored_unjudged():
    rows = [
        trajectory_of(
            {"prompt": "a cat"},
            image_segment("sketch", marked(0.8)),
            text("inspect", "No, the cat is missing"),
            image_segment("sketch", marked(0.6)),
        ),
        trajectory_of({}, image_segment("sketch", marked(0.8)), text("inspect", "Yes.")),
        trajectory_of(
            {}, image_segment("sketch", marked(0.8)), text("inspect", "hm"), image_segment("sketch", marked(0.6))
        ),
        trajectory_of({}, image_segment("sketch", marked(0.8)), image_segment("sketch", marked(None))),
        trajectory_of({}),
        trajectory_of({}, image_segment("sketch", marked(0.8))),
    ]
    judge = Says()
    logged = {}
    credited = janus.janus_pro_r1(rows, RewardContext(judge=judge), lambda name, value: logged.update({name: value}))
    assert credited[0] == pytest.approx({1: 0.8, 2: 0.2, 3: 0.6})
    assert credited[1] == pytest.approx({1: 0.8, 2: 0.8})
    assert credited[2] == pytest.approx({1: 0.8, 2: 0.0, 3: 0.6})  # unreadable: as wrong as can be
    assert credited[3:5] == [None, 0.0] and credited[5] == pytest.approx({1: 0.8})
    assert logged == {"says_yes": 0.5}
    assert judge.asked[0] == janus.QUESTION.format(prompt="a cat") and len(judge.asked) == 8
    totals = janus.janus_pro_r1(rows, RewardContext(judge=Says()), credit="trajectory")
    assert totals == [pytest.approx(1.6), pytest.approx(2.4), pytest.approx(1.4), None, 0.0, pytest.approx(1.6)]


def test_janus_by_the_detector_on_rendered_scenes(shapes):
    good, bad = scene("left", "right"), scene("right", "left")
    record = placed("left of")
    rows = [
        trajectory_of(
            record, image_segment("sketch", bad), text("inspect", "<inspect> wrong"), image_segment("sketch", good)
        ),
        trajectory_of(record, image_segment("sketch", good), text("inspect", "yes")),
        trajectory_of({}, image_segment("sketch", good)),
    ]
    fixed, kept, without = janus.janus_pro_r1_geneval(rows, shapes)
    assert fixed == pytest.approx({1: 2 / 3, 2: 1 / 3, 3: 1.0})
    assert kept == {1: 1.0, 2: 1.0} and without is None


def test_what_a_self_check_says(shapes):
    assert janus.says_yes("Yes, it does") is True and janus.says_yes("I say no.") is False
    assert janus.says_yes("yesterday") is None and janus.says_yes("nothing") is None
    for words, verdict in (("<inspect> fine", True), ("<inspect> wrong", False)):
        read = shapes.task.claims(words).verdict
        assert janus.says_yes(words, shapes.task) == (verdict if read is not None else None)


# ---- GoT-R1 by hand -----------------------------------------------------------------------------------------------


def test_got_formula_by_hand():
    assert got.total(0.8, 0.5, 0.7, 0.5) == pytest.approx(0.48)
    plan = [("dog", (0.0, 0.0, 10.0, 10.0)), ("dog", (20.0, 0.0, 30.0, 10.0)), ("cat", (0.0, 0.0, 10.0, 10.0))]
    # the second dog exactly; the first shifted by 5: 50 / 150; no cat: 0
    found = {"dog": [(20.0, 0.0, 30.0, 10.0), (5.0, 0.0, 15.0, 10.0)]}
    assert got.reasoning_image(plan, found) == pytest.approx((1 + 1 / 3) / 3)
    # one found dog serves one planned dog
    assert got.reasoning_image(plan[:2], {"dog": [(20.0, 0.0, 30.0, 10.0)]}) == pytest.approx(0.5)
    assert got.reasoning_image([], found) == 0.0


def test_got_pairs_boxes_so_that_the_sum_is_largest():
    plan = [("dog", (0.0, 0.0, 10.0, 10.0)), ("dog", (6.0, 0.0, 16.0, 10.0))]
    near_both, far_left = (4.0, 0.0, 14.0, 10.0), (-4.0, 0.0, 6.0, 10.0)
    # greedy: the best pair is (second, near_both) 80/120, then (first, far_left) 60/140
    assert got.reasoning_image(plan, {"dog": [near_both, far_left]}) == pytest.approx((80 / 120 + 60 / 140) / 2)


@pytest.mark.parametrize(
    ("words", "names", "expected"),
    [
        (
            "a playful brown dog (100,200),(350,450) and a cat (500, 0), (900, 400)",
            (),
            [("playful brown dog", (100, 200, 350, 450)), ("cat", (500, 0, 900, 400))],
        ),
        ("a playful brown dog (100,200),(350,450)", ("dog", "cat"), [("dog", (100, 200, 350, 450))]),
        ("There is a hot dog at [10, 20, 30, 40].", ("dog", "hot dog"), [("hot dog", (10, 20, 30, 40))]),
        ("A cat. Two dogs at (10,20),(30,40)", ("dog", "cat"), [("dog", (10, 20, 30, 40))]),
        ("The cup is located at (30,40),(10,20)", (), [("cup", (10, 20, 30, 40))]),  # corners in the other order
        ("a lion (1,2),(3,4)", ("dog",), []),
        ("a dog at (1,2)", ("dog",), []),
        ("", (), []),
    ],
)
def test_got_reads_plans(words, names, expected):
    assert got.planned_boxes(words, names) == expected


def test_got_on_rendered_scenes(shapes):
    record = placed("left of")
    circle = Object("circle", "red", PLACES.index("left")).box
    square = Object("square", "blue", PLACES.index("right")).box

    def plan(one, other):
        a, b = ([round(c * 1000 / 32, 2) for c in box] for box in (one, other))
        return f"a red circle ({a[0]},{a[1]}),({a[2]},{a[3]}), a blue square ({b[0]},{b[1]}),({b[2]},{b[3]})"

    image = scene("left", "right")
    rows = [
        trajectory_of(record, text("plan", plan(circle, square)), image_segment("sketch", image)),
        trajectory_of(record, text("plan", plan(square, circle)), image_segment("sketch", image)),
        trajectory_of(record, text("plan", "a circle and a square"), image_segment("sketch", image)),
        trajectory_of(record, text("plan", plan(circle, square))),
        trajectory_of(record, text("hint", plan(circle, square), Author.ENVIRONMENT), image_segment("sketch", image)),
        trajectory_of(record, image_segment("sketch", image), text("plan", plan(circle, square))),
    ]
    values = got.got_r1(rows, shapes)
    assert values[0] == pytest.approx(1.0, abs=0.02) and values[1:] == [0.0] * 5
    pixels = trajectory_of(
        record, text("plan", f"circle [{', '.join(map(str, circle))}]"), image_segment("sketch", image)
    )
    assert got.got_r1([pixels], shapes, frame="pixels") == [pytest.approx(1.0)]
    with pytest.raises(UserError, match="no frame 'px'"):
        got.got_r1([], shapes, frame="px")
