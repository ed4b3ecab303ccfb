"""improvement, steps, format and geneval on rendered scenes of the shapes world; what `completions` holds."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from rewards_helpers import image_segment, text, trajectory_of

from formats.registry import get_format
from record.trajectory import Author, StopReason
from rewards.contract import Logs, RewardContext, columns, completion, policy_ids, policy_text
from rewards.detectors.shapes import TaskDetector
from rewards.functions.format import format_reward
from rewards.functions.geneval import geneval
from rewards.functions.improvement import improvement
from rewards.functions.steps import steps
from runtime.errors import UserError
from tasks.registry import get_task
from tasks.shapes.render import render
from tasks.shapes.world import PLACES, Object, Scene


@pytest.fixture(scope="module")
def context():
    task = get_task("shapes")
    return RewardContext.of(task, get_format("strokes"), TaskDetector.of(task))


def scene(*objects):
    return render(Scene(tuple(Object(shape, color, PLACES.index(place)) for shape, color, place in objects)))


# ---- geneval on rendered scenes ----------------------------------------------------------------------------------

AT = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}
OPPOSITE = {"left of": "right", "right of": "left", "above": "bottom", "below": "top"}


@pytest.mark.parametrize("relation", AT)
def test_relations_pay_and_refuse_on_rendered_scenes(context, relation):
    record = {
        "tag": "position",
        "include": [{"class": "circle", "count": 1}, {"class": "square", "count": 1, "position": [relation, 0]}],
    }
    held = scene(("square", "red", AT[relation]), ("circle", "blue", OPPOSITE[relation]))
    turned = scene(("circle", "red", AT[relation]), ("square", "blue", OPPOSITE[relation]))
    alone = scene(("square", "red", AT[relation]))
    thoughts = [trajectory_of(record, image_segment("sketch", image)) for image in (held, turned, alone)]
    assert geneval(thoughts, context) == [1, 0, 0]
    assert geneval(thoughts, context, mode="graded") == pytest.approx([1, 2 / 3, 1 / 3])


def test_colors_and_counts_on_rendered_scenes(context):
    record = {
        "tag": "color_attr",
        "include": [{"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 1, "color": "blue"}],
    }
    swapped = scene(("circle", "blue", "left"), ("square", "red", "right"))
    right = scene(("circle", "red", "left"), ("square", "blue", "right"))
    thoughts = [trajectory_of(record, image_segment("sketch", image)) for image in (right, swapped)]
    assert geneval(thoughts, context) == [1, 0]
    logs = Logs()
    geneval(thoughts, context, logs.log_extra)
    assert logs.columns["reason"] == [
        "",
        "expected red circle>=1, found 0 red; and 1 blue\nexpected blue square>=1, found 0 blue; and 1 red",
    ]
    two = {
        "tag": "counting",
        "include": [{"class": "circle", "count": 2}],
        "exclude": [{"class": "circle", "count": 3}],
    }
    places = ("top-left", "top-right", "bottom-left")
    drawn = [scene(*[("circle", "red", place) for place in places[:n]]) for n in range(4)]
    assert geneval([trajectory_of(two, image_segment("sketch", p)) for p in drawn], context) == [0, 0, 1, 0]


# ---- improvement --------------------------------------------------------------------------------------------------

ATTR = {
    "tag": "color_attr",
    "include": [{"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 1, "color": "blue"}],
}
NOTHING = scene()  # graded 0
ONE = scene(("circle", "red", "left"))  # 2 of 4
BOTH = scene(("circle", "red", "left"), ("square", "blue", "right"))  # 4 of 4


def test_improvement_by_hand(context):
    thoughts = [
        trajectory_of(ATTR, *[image_segment("sketch", p) for p in images])
        for images in ([NOTHING, ONE, BOTH], [BOTH, ONE], [ONE], [])
    ]
    logs = Logs()
    assert improvement(thoughts, context, logs.log_metric) == [1, -0.5, 0, None]
    assert logs.metrics == {"better": [1 / 3], "worse": [1 / 3]}
    # segment 0 is the prompt
    assert improvement(thoughts, context, credit="segments") == [{2: 0.5, 3: 0.5}, {2: -0.5}, None, None]


# ---- steps --------------------------------------------------------------------------------------------------------


def test_steps_by_hand():
    def drawing(images, turns=1, stop=StopReason.END):
        return trajectory_of(
            {}, *[text("plan", "words")] * turns, *[image_segment("sketch", NOTHING)] * images, stop=stop
        )

    thoughts = [drawing(n) for n in range(5)]
    assert steps(thoughts, min_images=1, max_images=3) == [0.5, 1, 1, 1, 0.5]
    assert steps(thoughts, min_images=2, max_images=2, penalty=0.75) == [0, 0.25, 1, 0.25, 0]  # never below 0
    assert steps(thoughts, per_image=0.1) == pytest.approx([0.5, 1, 0.9, 0.8, 0.7])
    assert steps([drawing(1, turns=n) for n in range(4)], min_turns=1, max_turns=2) == [0.5, 1, 1, 0.5]
    assert steps([drawing(1, stop=StopReason.MAX_TOKENS)], cut_off=0.3) == [0.7]
    with pytest.raises(UserError, match="max_images is 1, below min_images = 2"):
        steps(thoughts, min_images=2, max_images=1)


# ---- format -------------------------------------------------------------------------------------------------------


def strokes(*segments):
    return trajectory_of({}, *segments)


PLAN = text("plan", "<ins> draw </ins><des> circle </des>", ids=[1])
SKETCH = image_segment("sketch", NOTHING, ids=[2])
INSPECT = text("inspect", "<inspect> fine </inspect>", ids=[3])


def test_format_by_hand(context):
    whole = strokes(PLAN, SKETCH, INSPECT)
    unclosed = strokes(PLAN, SKETCH, text("inspect", "<inspect> fine", ids=[3]))
    assert format_reward([whole, unclosed], context) == [1, 0]
    # one of three segments is at fault; the thought as a whole counts as a fourth
    assert format_reward([whole, unclosed], context, mode="graded") == [1, 0.75]
    logs = Logs()
    format_reward([unclosed], context, logs.log_extra)
    assert "</inspect>" in logs.columns["violations"][0][0]


def test_format_is_found_by_the_trajectory_when_the_judge_was_given_none():
    assert format_reward([strokes(PLAN, SKETCH, INSPECT)], RewardContext()) == [1]


# ---- completions ----------------------------------------------------------------------------------------------------


def test_completions_hold_the_policys_words_and_images_alone():
    image = np.full((4, 4, 3), 7, np.uint8)
    seen = trajectory_of(
        {"tag": "colors", "prompt": "p"},
        text("think", "look "),
        text("call", "closer"),
        image_segment("observation", image, Author.ENVIRONMENT),
        text("observation", "SECRET", Author.ENVIRONMENT),
        text("think", "I see"),
        image_segment("sketch", image),
        text("answer", "done"),
    )
    first, second = completion(seen)
    assert first == {"role": "assistant", "content": "look closer"}
    assert [part["type"] for part in second["content"]] == ["text", "image", "text"]
    assert isinstance(second["content"][1]["image"], Image.Image)
    assert np.array_equal(np.asarray(second["content"][1]["image"]), image)
    assert completion(seen, "text") == [{"role": "assistant", "content": "look closerI seedone"}]
    assert "SECRET" not in policy_text(seen) and "p" not in completion(seen)[0]["content"].split()
    assert completion(trajectory_of({})) == [{"role": "assistant", "content": ""}]


def test_ids_and_columns():
    rows = [
        trajectory_of(
            {"prompt": "p", "tag": "colors", "include": [1]},
            text("plan", "a", ids=[4, 5]),
            text("observation", "b", Author.ENVIRONMENT, ids=[6]),
            image_segment("sketch", NOTHING, ids=[7]),
        ),
        trajectory_of({"tag": "position", "extra": 2}),
    ]
    assert policy_ids(rows[0]) == [4, 5, 7]
    assert columns(rows) == {"tag": ["colors", "position"], "include": [[1], None], "extra": [None, 2]}
