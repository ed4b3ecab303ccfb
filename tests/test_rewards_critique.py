"""Critique consistency: the formula by hand, what a rubber stamp earns, and agreement with what the shapes world's
demonstrations say of their own images."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewards_helpers import from_parts, image_segment, text, trajectory_of

from rewards.contract import Logs, RewardContext, RewardError
from rewards.detectors.shapes import TaskDetector
from rewards.functions.critique_consistency import Inspection, critique_consistency, pay, rates
from runtime.errors import UserError
from tasks.registry import get_task
from tasks.shapes.render import render
from tasks.shapes.world import Object, Scene


@pytest.fixture(scope="module")
def context():
    task = get_task("shapes")
    return RewardContext.of(task, None, TaskDetector.of(task))


def inspections(*truth_and_said, named=1.0):
    return [Inspection(row, 0, said, fine, named, 1.0) for row, (fine, said) in enumerate(truth_and_said)]


def test_the_formula_by_hand():
    # f = 3/4, w = 1/4, c = 1/4: right "fine" earns 1/3, wrong "fine" -1, an unreadable one of a fine image -1/3
    judged = inspections((True, "fine"), (True, "wrong"), (True, None), (False, "fine"))
    assert pay(judged) == pytest.approx([1 / 3, -1 / 3, -1 / 3, -1])


def test_half_of_a_right_wrong_is_for_naming_the_mistake():
    assert pay(inspections((True, "fine"), (False, "wrong"), named=1.0)) == [1, 1]
    assert pay(inspections((True, "fine"), (False, "wrong"), named=0.5)) == [1, 0.75]
    assert pay(inspections((True, "fine"), (False, "wrong"), named=0.0)) == [1, 0.5]
    assert pay(inspections((True, "fine"), (False, "wrong"), named=0.0), named=0) == [1, 1]


@given(st.lists(st.booleans(), min_size=1, max_size=50), st.floats(0, 1))
def test_no_stamp_pays_whatever_the_share_of_wrong_images(truths, named):
    assert sum(pay(inspections(*[(fine, "fine") for fine in truths]))) == pytest.approx(0)
    assert sum(pay(inspections(*[(fine, "wrong") for fine in truths], named=named))) <= 1e-9
    honest = sum(pay(inspections(*[(fine, "fine" if fine else "wrong") for fine in truths])))
    assert honest == pytest.approx(2 * min(sum(truths), len(truths) - sum(truths)))


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["fine", "wrong", None])), min_size=1, max_size=30))
def test_no_inspection_weighs_more_than_one(judged):
    assert all(-1 <= value <= 1 for value in pay(inspections(*judged)))


def test_rates_by_hand():
    judged = inspections((True, "fine"), (True, "wrong"), (False, "fine"), (False, "fine"), (False, "wrong"), named=0.5)
    assert rates(judged) == pytest.approx(
        {
            "rubber_stamp_rate": 3 / 5,
            "unreadable": 0,
            "wrong_images": 3 / 5,
            "right_fine": 1 / 2,
            "right_wrong": 1 / 3,
            "approves_wrong": 2 / 3,
            "named": 0.5,
            "described": 1,
        }
    )
    assert rates([]) == {}


# ---- on rendered scenes -------------------------------------------------------------------------------------------

RED_CIRCLE = {
    "prompt": "a photo of a red circle",
    "tag": "colors",
    "include": [{"class": "circle", "count": 1, "color": "red"}],
}
RIGHT = render(Scene((Object("circle", "red", 0),)))
WRONG = render(Scene((Object("circle", "blue", 0),)))


def inspected(image, words, record=RED_CIRCLE):
    return trajectory_of(
        record,
        text("plan", "<ins> draw one circle </ins><des> red circle top-left </des>"),
        image_segment("sketch", image),
        text("inspect", f"<inspect> {words} </inspect>"),
    )


def test_verdicts_on_rendered_images(context):
    thoughts = [
        inspected(RIGHT, "red circle top-left : fine"),
        inspected(RIGHT, "red circle top-left : wrong color red circle top-left"),
        inspected(WRONG, "blue circle top-left : fine"),
        inspected(WRONG, "blue circle top-left : wrong color blue circle top-left"),
        inspected(WRONG, "blue circle top-left : wrong shape red square right"),
        inspected(RIGHT, "green green : perhaps"),
    ]
    logs = Logs()
    # f = w = 1/2, so everything weighs 1; the fifth is right but names nothing that is so
    assert critique_consistency(thoughts, context, logs.log_metric) == [1, -1, -1, 1, 0.5, -1]
    assert logs.metrics["rubber_stamp_rate"] == [2 / 6]
    assert logs.metrics["approves_wrong"] == [1 / 3]


def test_none_without_an_inspection_and_before_any_image(context):
    early = trajectory_of(
        RED_CIRCLE, text("inspect", "<inspect> nothing : wrong </inspect>"), image_segment("sketch", RIGHT)
    )
    bare = trajectory_of(RED_CIRCLE, image_segment("sketch", RIGHT))
    free = inspected(RIGHT, "red circle top-left : fine", record={"prompt": "anything"})
    assert critique_consistency([early, bare, free], context) == [None, None, None]


def test_credit_by_segment_and_the_latest_image(context):
    repaired = inspected(WRONG, "blue circle top-left : wrong color blue circle top-left")
    repaired.segments += [
        text("refine", "<refine> make blue circle top-left red </refine>"),
        image_segment("redraw", RIGHT),
        text("inspect", "<inspect> red circle top-left : wrong color red circle </inspect>"),
    ]
    assert critique_consistency([repaired], context, credit="segments") == [{3: 1, 6: -1}]
    assert critique_consistency([repaired], context) == [0]


def test_a_partial_plan_owes_only_its_own_stroke(context):
    record = {
        "prompt": "a photo of a circle and a square",
        "tag": "two_object",
        "include": [{"class": "circle", "count": 1}, {"class": "square", "count": 1}],
    }
    first = inspected(RIGHT, "red circle top-left : fine", record)
    whole = inspected(RIGHT, "red circle top-left : fine", record)
    whole.segments[1].text = "<ins> draw all </ins><des> red circle top-left , red square right </des>"
    logs = Logs()
    assert critique_consistency([first, whole], context, logs.log_metric) == [1, -1]


def test_describing_what_is_seen_can_be_paid(context):
    thoughts = [
        inspected(RIGHT, "red circle top-left : fine"),
        inspected(RIGHT, "red square top-left : fine"),
        inspected(RIGHT, "red circle top-left , red circle right : fine"),
    ]
    # only fine images, so verdicts earn nothing; F1 is 1, 0 and 2 * 1 / 3
    assert critique_consistency(thoughts, context, described=0.5) == pytest.approx([0.5, 0, 1 / 3])


@pytest.mark.parametrize("fmt", ["strokes", "self_critique"])
def test_agrees_with_what_demonstrations_say_of_their_own_images(context, fmt):
    demos = context.task.demonstrations(fmt, 120, seed=3)
    thoughts = [from_parts(d.record, d.parts, fmt) for d in demos]
    logs = Logs()
    values = critique_consistency(thoughts, context, logs.log_metric)
    assert logs.metrics["right_fine"] == [1] and logs.metrics["right_wrong"] == [1]
    assert logs.metrics["named"] == [1] and logs.metrics["described"] == [1]
    assert logs.metrics["wrong_images"][0] > 0.15
    assert all(value is not None and value > 0 for value in values)


def test_bad_options_and_tasks_are_named(context):
    with pytest.raises(UserError, match="named is 2"):
        critique_consistency([], context, named=2)
    with pytest.raises(UserError, match="no credit 'all'"):
        critique_consistency([], context, credit="all")
    with pytest.raises(RewardError, match="has no function 'claims'"):
        critique_consistency([], RewardContext(object(), None, context.detector))
