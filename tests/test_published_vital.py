"""VITAL's scaled rewards and sample weights: by hand, by properties, over thoughts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewards_helpers import image_segment, text, trajectory_of

from record.trajectory import Author
from rewards.published.vital import sample_weight, scaled_iou, vital, vital_weight, well_formed
from rl.advantages import compute_advantages
from rl.config import GrpoConfig
from runtime.errors import UserError
from underdrawing.recipe import RecipeError, check_recipe

FRAME = np.zeros((4, 4, 3), np.uint8)
CALL = '<think>look closer</think><tool_call>{"name": "clip", "arguments": {"start": 1, "end": 9}}</tool_call>'


@pytest.mark.parametrize(
    ("iou", "low", "high", "scaled"),
    [
        (0.5, 0, 1, 0.5),
        (0.3, 0.1, 0.5, 0.5),
        (0.1, 0.1, 0.5, 0),
        (0.05, 0.1, 0.5, 0),
        (0.5, 0.1, 0.5, 1),
        (0.9, 0.1, 0.5, 1),  # without the upper clamp a hard task would pay 2 for one thought
    ],
)
def test_scaled_iou_by_hand(iou, low, high, scaled):
    assert scaled_iou(iou, low, high) == pytest.approx(scaled)


@pytest.mark.parametrize(("mean", "weight"), [(0, 1), (1, 1), (1.5, 0.75), (2, 0.5), (3, 0.5)])
def test_sample_weight_by_hand(mean, weight):
    assert sample_weight(mean) == weight


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_easier_samples_never_weigh_more(mean, other):
    assert 0.5 <= sample_weight(max(mean, other)) <= sample_weight(min(mean, other)) <= 1


@pytest.mark.parametrize(
    ("turns", "formed"),
    [
        (["<think>a</think><answer>b</answer>"], True),
        ([CALL, "<think>a</think>\n<answer>b</answer>"], True),
        ([CALL], False),
        (["<think>a</think><answer>b</answer>"] * 2, False),
        (["<answer>b</answer>"], False),
        (["<think>a</think><answer>b</answer> bye"], False),
        ([], False),
        (["<think>a</think></think><answer>b</answer>"], False),
    ],
)
def test_form(turns, formed):
    assert well_formed(turns) is formed


def clipped(answer, gold, group=0, task="grounding", observed=None):
    seen = observed or image_segment("observation", FRAME, Author.ENVIRONMENT)
    return trajectory_of(
        {"ground_truth": gold, "task": task},
        text("tool_call", CALL),
        seen,
        text("answer", f"<think>so</think><answer>{answer}</answer>"),
        group=group,
    )


def test_over_thoughts():
    failed = text("observation", "Error: no such clip", Author.ENVIRONMENT)
    rows = [
        clipped("10 to 20", [10, 30]),  # IoU 0.5 + form 1 + tool 1
        clipped("10 to 20", [10, 30], observed=failed),  # the call failed: no pay for the tool
        clipped("B", "B", task="qa"),
        clipped("(C)", "B", task="qa"),
        trajectory_of({"ground_truth": [10, 30]}, text("answer", "10 to 20")),  # no answer block: nothing is paid
        clipped("B", None),
        clipped("0:10 - 0:30", [[10, 20], [20, 30]]),
    ]
    assert vital(rows) == [2.5, 1.5, 3, 2, 0, None, 3]
    assert vital(rows, bounds={"grounding": [0.1, 0.6]})[:2] == pytest.approx([2.8, 1.8])  # 0.4 / 0.5
    assert vital(rows[:1], accuracy=2, format=0, tool=0.5) == [1.5]


def test_weights_are_the_groups():
    rows = [
        clipped("10 to 20", [10, 30]),
        clipped("10 to 30", [10, 30], group=1),
        clipped("no time", [10, 30]),
        clipped("B", None, group=2),
        clipped("B", None, group=1),
    ]
    # group 0: 2.5 and 2 -> 2.25 -> 0.5; group 1: 3, and one without a reference, which is no 0
    assert vital_weight(rows) == [0.5, 0.5, 0.5, None, 0.5]
    assert vital_weight(rows, format=0, tool=0) == [1, 1, 1, None, 1]
    assert vital_weight([clipped("1 to 2", [1, 2]), clipped("B", "C", task="qa")], format=0) == [0.75, 0.75]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bounds": {"qa": [0.5, 0.5]}}, r"bounds.qa is \[0.5, 0.5\]"),
        ({"bounds": {"qa": 0.5}}, "must be"),
        ({"bounds": {"qa": [0, 2]}}, "at most 1"),
        ({"compare": "taste"}, "no comparison 'taste'"),
    ],
)
def test_options_are_checked_before_anything_is_scored(options, message):
    for function in (vital, vital_weight):
        with pytest.raises(UserError, match=message):
            function([], **options)


@pytest.mark.parametrize(("scale", "first"), [("none", 0.125), ("group", 1 / 2**0.5)])
def test_a_factor_of_the_whole_group_is_divided_out_by_its_own_deviation(scale, first):
    rows = [clipped("10 to 20", [10, 30]), clipped("no time", [10, 30])]  # 2.5 and 2, weight 0.5
    for row, value, weight in zip(rows, vital(rows), vital_weight(rows), strict=True):
        row.reward = value * weight
    # 1.25 and 1: 0.125 from their mean, and their standard deviation is 0.25 / sqrt(2)
    compute_advantages([rows], GrpoConfig(scale_rewards=scale))
    trained = [index for index, s in enumerate(rows[0].segments) if s.trained]
    assert rows[0].advantage_S[trained] == pytest.approx([first] * len(trained), rel=1e-3)


def graded_by(total, **grpo):
    return {
        "name": "mine",
        "policy": {},
        "task": {"name": "shapes"},
        "format": {"name": "strokes"},
        "grpo": grpo,
        "rewards": {"parts": {"right": {"function": "vital"}, "w": {"function": "vital_weight"}}, "total": total},
    }


def test_a_recipe_that_pays_a_weight_that_is_divided_out_is_refused():
    for scale in ("none", "batch", False):
        check_recipe(graded_by("right * w", scale_rewards=scale), "here")
    check_recipe(graded_by("right"), "here")  # computed and logged
    for grpo in ({}, {"scale_rewards": "group"}):
        with pytest.raises(
            RecipeError,
            match=r"here: rewards.parts.w \(vital_weight\) is one factor .* set "
            "grpo.scale_rewards: none or batch, or take 'w' out",
        ):
            check_recipe(graded_by("right * w", **grpo), "here")
