"""GenEval's rules: parity with the released scorer's answers, hand-computed tables, and bounds of the graded score."""

from __future__ import annotations

import numpy as np
import pytest
from rewards_helpers import image_segment, trajectory_of

from record.trajectory import Author, Modality, Segment, Trajectory
from rewards.config import RewardsConfig
from rewards.contract import RewardContext
from rewards.detectors.base import COLORS, CachedDetector, Detection, UnknownClass
from rewards.functions.geneval import RecordColumnError, check_clauses, check_record, evaluate, geneval, relations
from rewards.manager import RewardManager
from runtime.errors import UserError


def seen(*scores_and_boxes, color="red"):
    return [{"box": box, "score": score, "color": color} for score, box in scores_and_boxes]


BOX = (0.0, 0.0, 10.0, 10.0)
RIGHT = (30.0, 0.0, 40.0, 10.0)
BELOW = (0.0, 30.0, 10.0, 40.0)


@pytest.mark.parity
def test_equals_the_released_scorer(reference_records):
    wrong = [
        case
        for case in reference_records("geneval_cases.jsonl")
        if evaluate(case["metadata"], case["detections"]) != (case["correct"], case["reason"])
    ]
    assert not wrong, f"{len(wrong)} cases differ; the first: {wrong[0]}"


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (RIGHT, {"left of"}),  # dx = -(30 - 2) / 30 = -0.93
        (BELOW, {"above"}),
        ((30.0, 30.0, 40.0, 40.0), {"left of", "above"}),  # -28 / 42.4 = -0.66 on both axes
        ((1.0, 1.0, 11.0, 11.0), set()),  # offset 1 < 0.1 * (10 + 10)
        ((30.0, 14.0, 40.0, 24.0), {"left of"}),  # dx = -28 / 33.1 = -0.85, dy = -12 / 33.1 = -0.36
    ],
)
def test_relations_by_hand(other, expected):
    inverse = {"left of": "right of", "above": "below"}
    assert relations(BOX, other) == expected
    assert relations(other, BOX) == {inverse[name] for name in expected}


def test_scores_are_compared_strictly_and_counting_wants_more():
    one = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    assert evaluate(one, {"dog": seen((0.3, BOX))}) == (False, "expected dog>=1, found 0")
    assert evaluate(one, {"dog": seen((0.31, BOX))}) == (True, "")
    two = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}
    assert evaluate(two, {"dog": seen((0.95, BOX), (0.9, RIGHT))}) == (False, "expected dog>=2, found 1")
    assert evaluate(two, {"dog": seen((0.95, BOX), (0.91, RIGHT))}) == (True, "")
    three = seen((0.95, BOX), (0.91, RIGHT), (0.92, BELOW))
    assert evaluate(two, {"dog": three}) == (False, "expected dog<3, found 3")


def test_at_most_sixteen_of_a_class():
    many = {"tag": "two_object", "include": [{"class": "dog", "count": 17}]}
    assert evaluate(many, {"dog": seen(*[(0.5, BOX)] * 20)}) == (False, "expected dog>=17, found 16")


def test_color_is_judged_on_the_best_boxes_alone():
    record = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    found = seen((0.9, BOX), color="blue") + seen((0.8, RIGHT), color="red")
    assert evaluate(record, {"dog": found}) == (False, "expected red dog>=1, found 0 red; and 1 blue")
    assert evaluate(record, {"dog": found[::-1]})[0] is False  # the order given does not matter
    assert evaluate(record, {"dog": found[1:]}) == (True, "")


POSITION = {
    "tag": "position",
    "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
}


def test_position_reasons():
    assert evaluate(POSITION, {"cat": seen((0.9, BOX)), "dog": seen((0.9, RIGHT))}) == (True, "")
    assert evaluate(POSITION, {"cat": seen((0.9, RIGHT)), "dog": seen((0.9, BOX))}) == (
        False,
        "expected dog right of target, found left of target",
    )
    diagonal = seen((0.9, (-30.0, -30.0, -20.0, -20.0)))
    assert evaluate(POSITION, {"cat": seen((0.9, BOX)), "dog": diagonal}) == (
        False,
        "expected dog right of target, found above and left of target",
    )
    assert evaluate(POSITION, {"dog": seen((0.9, RIGHT))}) == (
        False,
        "expected cat>=1, found 0\nno target for dog to be right of",
    )


def test_strict_wants_the_exact_count_and_ignores_exclude():
    one = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "exclude": [{"class": "cat", "count": 1}]}
    found = {"dog": seen((0.9, BOX)), "cat": seen((0.9, BOX))}
    assert evaluate(one, found) == (False, "expected cat<1, found 1")
    assert evaluate(one, found, "strict") == (True, "")
    assert evaluate(one, {"dog": seen((0.9, BOX), (0.8, RIGHT))}, "strict") == (False, "expected dog=1, found 2")


def test_graded_by_hand():
    # count 2 of 2 (1), color 1 of 2 (0.5): mean 0.75
    record = {"tag": "color_attr", "include": [{"class": "dog", "count": 2, "color": "red"}]}
    found = seen((0.9, BOX)) + seen((0.9, RIGHT), color="blue")
    assert evaluate(record, {"dog": found}, "graded")[0] == pytest.approx(0.75)
    # both there (1, 1), relation wrong (0): 2 / 3
    assert evaluate(POSITION, {"cat": seen((0.9, RIGHT)), "dog": seen((0.9, BOX))}, "graded")[0] == pytest.approx(2 / 3)
    # only the cat: 1, 0, and no pair (0): 1 / 3
    assert evaluate(POSITION, {"cat": seen((0.9, RIGHT))}, "graded")[0] == pytest.approx(1 / 3)
    # counting 2: one gives 1/2, two 1, three 1 - 1/2, four 0, five 0 and not -1/2
    two = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}
    graded = [evaluate(two, {"dog": seen(*[(0.95, BOX)] * n)}, "graded")[0] for n in range(6)]
    assert graded == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    # outside counting a surplus is no fault, as in the released scorer
    assert evaluate({"include": [{"class": "dog", "count": 1}]}, {"dog": seen(*[(0.95, BOX)] * 3)}, "graded")[0] == 1
    # ... but not strictly: one dog wanted, 2 found is one too many, 1 - 1 / 1
    strict = [
        evaluate({"include": [{"class": "dog", "count": 2}]}, {"dog": seen(*[(0.95, BOX)] * n)}, "graded_strict")[0]
        for n in range(5)
    ]
    assert strict == [0.0, 0.5, 1.0, 0.5, 0.0]


def test_bad_records_and_modes_are_named():
    with pytest.raises(RecordColumnError, match="relative to clause 3"):
        evaluate({"include": [{"class": "dog", "count": 1, "position": ["left of", 3]}]}, {"dog": seen((0.9, BOX))})
    with pytest.raises(UserError, match="no mode 'loose'.*standard, strict, graded"):
        evaluate(POSITION, {}, "loose")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"position": ["on top of", 0]},
            "here asks for the relation 'on top of'.* knows left of, right of, above, below",
        ),
        (
            {"position": ["left of", 1]},
            "here: 'dog' has the position .'left of', 1.; it is .relation, index of an earlier",
        ),
        ({"position": "left of"}, "'dog' has the position 'left of'"),
        ({"color": "grey"}, "here asks for the color 'grey'.*did you mean 'green'.* Known: black, blue"),
        ({"color": "chartreuse"}, "'chartreuse'.* Known: black, blue"),
    ],
)
def test_what_no_image_can_meet_is_refused(more, message):
    record = {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, **more}]}
    with pytest.raises(RecordColumnError, match=message):
        check_record(CachedDetector(Marked()), record, "here")
    with pytest.raises(RecordColumnError, match=message):  # without a detector, for detections that were stored
        check_clauses(record, "here")
    thoughts = [trajectory_of(record, image_segment("sketch", np.ones((4, 4, 3), np.uint8)))]
    with pytest.raises(RecordColumnError):  # and not a 0 for every row
        geneval(thoughts, RewardContext.of(None, None, Marked()), mode="graded")


def test_a_detector_may_name_colors_of_its_own():
    class Greys(Marked):
        colors = ("grey", "black")

    record = {"include": [{"class": "dog", "count": 1, "color": "grey"}]}
    check_record(CachedDetector(Greys()), record, "here")
    with pytest.raises(RecordColumnError, match="Known: black, grey"):
        check_record(CachedDetector(Greys()), {"include": [{"class": "dog", "count": 1, "color": "red"}]}, "here")
    check_clauses({"include": [{"class": "dog", "count": 1, "color": color} for color in COLORS]}, "here")


class Placed:
    """A task whose prompt says "on top of"."""

    name, classes = "placed", ("dog", "cat")

    def prompts(self, split):
        return [
            {
                "prompt": "a dog on top of a cat",
                "tag": "position",
                "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["on top of", 0]}],
            }
        ]

    def detect(self, image):
        return []


@pytest.mark.parametrize("place", [{}, {"workers": {}}])
def test_a_run_is_refused_at_its_start_unless_its_rewards_know_the_relation(place):
    def judge(function):
        return RewardManager(RewardsConfig.model_validate({"parts": {"a": {"function": function, **place}}}), Placed())

    judge("t2i_r1_detector").close()  # knows more relations
    for function in ("geneval", "flow_grpo_geneval", "improvement", "janus_pro_r1_geneval"):
        with pytest.raises(UserError, match="'a dog on top of a cat' .train. asks for the relation 'on top of'"):
            judge(function)
        if place:
            break


# ---- the reward -------------------------------------------------------------------------------------------------


class Marked:
    """Sees one dog where the first pixel is bright."""

    classes = ("dog", "cat")

    def detect(self, images):
        return [{"dog": [Detection(BOX, 0.9, "red")]} if image[0, 0, 0] else {} for image in images]


def drawn(*bright, record=None):
    segments = [
        Segment("sketch", Author.POLICY, Modality.IMAGE_TOKENS, True, image=np.full((4, 4, 3), 255 * b, np.uint8))
        for b in bright
    ]
    return Trajectory(
        "a photo of a dog",
        record or {"prompt": "a photo of a dog", "tag": "single_object", "include": [{"class": "dog", "count": 1}]},
        "strokes",
        segments,
    )


def test_reward_reads_the_final_or_the_first_image_and_no_image_earns_nothing():
    context = RewardContext.of(None, None, Marked())
    thoughts = [drawn(0, 1), drawn(1, 0), drawn(), drawn(1, record={"tag": "free"})]
    assert geneval(trajectories=thoughts, context=context) == [1.0, 0.0, 0.0, None]
    assert geneval(trajectories=thoughts, context=context, image="first") == [0.0, 1.0, 0.0, None]
    assert context.detector.looks == 2  # two distinct images, whoever asks


def test_each_image_credits_its_own_segment():
    context = RewardContext.of(None, None, Marked())
    thoughts = [drawn(0, 1), drawn(1), drawn(), drawn(1, record={"tag": "free"})]
    assert geneval(trajectories=thoughts, context=context, image="each") == [{0: 0.0, 1: 1.0}, {0: 1.0}, 0.0, None]


def test_reward_ignores_images_that_the_policy_did_not_draw():
    thought = drawn(0, 1)
    thought.segments[-1].author = Author.ENVIRONMENT
    assert geneval(trajectories=[thought], context=RewardContext.of(None, None, Marked())) == [0.0]


def test_a_class_that_the_detector_lacks_is_named():
    record = {"prompt": "a photo of a dgo", "include": [{"class": "dgo", "count": 1}]}
    with pytest.raises(UnknownClass, match="'a photo of a dgo' asks for 'dgo'.*did you mean 'dog'"):
        geneval(trajectories=[drawn(1, record=record)], context=RewardContext.of(None, None, Marked()))
