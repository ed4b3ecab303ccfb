"""Box IoU, temporal IoU, NDCG: by hand, by properties, and read from what a policy answered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewards_helpers import image_segment, text, trajectory_of

from record.trajectory import Author
from rewards.contract import RewardError
from rewards.functions.overlap import (
    box_iou,
    box_iou_reward,
    boxes_in,
    corners,
    matched_iou,
    ndcg,
    spans_in,
    temporal_iou,
    temporal_iou_reward,
)
from runtime.errors import UserError

coordinate = st.floats(-1000, 1000)
boxes = st.tuples(coordinate, coordinate, coordinate, coordinate)
spans = st.lists(st.tuples(coordinate, coordinate), max_size=6)


@pytest.mark.parametrize(
    ("box", "other", "iou"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),  # 2 in common, 4 + 4 - 2
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 4, 4), (1, 1, 3, 3), 1 / 4),  # one inside the other
        ((0, 0, 2, 2), (2, 0, 4, 2), 0),  # touching
        ((0, 0, 2, 2), (5, 5, 6, 6), 0),  # two negative sides would multiply to a positive area
        ((2, 2, 0, 0), (0, 0, 2, 2), 0),  # corners the wrong way round: two negative sides again
        ((1, 1, 1, 1), (1, 1, 1, 1), 0),  # nothing enclosed
    ],
)
def test_box_iou_by_hand(box, other, iou):
    assert box_iou(box, other) == pytest.approx(iou)


@given(boxes, boxes)
def test_box_iou_is_a_share_and_symmetric(box, other):
    assert 0 <= box_iou(box, other) <= 1
    assert box_iou(box, other) == pytest.approx(box_iou(other, box))


@given(boxes, st.floats(0.01, 100), st.floats(0.01, 100), coordinate)
def test_box_iou_does_not_depend_on_the_unit_of_either_axis(box, wide, high, shift):
    other = (box[0] + 1, box[1] + 1, box[2] + 1, box[3] + 1)
    stretched = [(b[0] * wide, b[1] * high, b[2] * wide, b[3] * high) for b in (box, other)]
    assert box_iou(*stretched) == pytest.approx(box_iou(box, other), abs=1e-6)


def test_superfluous_boxes_cost_what_missing_ones_do():
    gold = [(0, 0, 2, 2), (4, 4, 6, 6)]
    assert matched_iou(gold[::-1], gold) == 1  # in any order
    assert matched_iou([(0, 0, 2, 2)], gold) == 0.5
    assert matched_iou([(0, 0, 2, 2), (4, 4, 6, 6), (4, 4, 6, 6), (0, 0, 2, 2)], gold) == 0.5
    assert matched_iou([], gold) == 0 and matched_iou([], []) == 1
    # greedy would give the first box the gold that it shares most with (1/3), and the second none
    assert matched_iou([(0, 0, 2, 2), (0, 0, 1, 2)], [(0, 0, 1, 2), (1, 0, 3, 2)]) == pytest.approx((1 + 1 / 3) / 2)
    assert matched_iou([(0, 0, 2, 2)], [(1, 0, 3, 2)], threshold=0.3) == 1
    assert matched_iou([(0, 0, 2, 2)], [(1, 0, 3, 2)], threshold=0.5) == 0


@pytest.mark.parametrize(
    ("first", "second", "iou"),
    [
        ([(0, 10)], [(5, 15)], 5 / 15),
        ([(0, 10)], [(20, 30)], 0),  # apart: min - max is negative
        ([(0, 4), (6, 10)], [(0, 10)], 0.8),
        ([(0, 10), (0, 10)], [(0, 10)], 1),  # said twice, counted once
        ([(10, 0)], [(0, 10)], 0),  # ends before it starts
        ([], [(0, 1)], 0),
        ([], [], 0),
    ],
)
def test_temporal_iou_by_hand(first, second, iou):
    assert temporal_iou(first, second) == pytest.approx(iou)


@given(spans, spans)
def test_temporal_iou_is_a_share_and_symmetric(first, second):
    assert 0 <= temporal_iou(first, second) <= 1
    assert temporal_iou(first, second) == pytest.approx(temporal_iou(second, first))


@pytest.mark.parametrize(
    ("ranked", "relevant", "value"),
    [
        (["a", "b"], ["a", "b"], 1),
        (["x", "a"], ["a"], 0.63092975),  # 1 / log2(3)
        (["a"], ["a", "b"], 0.61314719),  # 1 / (1 + 1 / log2(3)): what was not found counts in the ideal
        (["x"], ["a"], 0),
        ([], ["a"], 0),
        (["a"], [], 0),
        (["a", "a"], ["a"], 1),  # found once; counting both would be 1.63
        (["a", "a", "b"], ["a", "b"], 0.91972079),  # (1 + 1 / log2(4)) / (1 + 1 / log2(3))
    ],
)
def test_ndcg_by_hand(ranked, relevant, value):
    assert ndcg(ranked, relevant) == pytest.approx(value)


def test_ndcg_with_repeats_is_the_releases():
    assert ndcg(["a", "a"], ["a"], repeats=True) == pytest.approx(1.63092975)


@given(st.lists(st.integers(0, 9), max_size=12), st.lists(st.integers(0, 9), max_size=6))
def test_ndcg_is_a_share_and_earlier_is_never_worse(ranked, relevant):
    value = ndcg(ranked, relevant)
    assert 0 <= value <= 1 + 1e-12
    best_first = sorted(ranked, key=lambda item: item not in set(relevant))
    assert ndcg(list(dict.fromkeys(best_first)), relevant) >= value - 1e-12


# ---- reading and paying --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ('{"bbox_2d": [10, 20, 30.5, 40], "label": "cup"}', [(10, 20, 30.5, 40)]),
        ("<|box_start|>(10,20),(30,40)<|box_end|>", [(10, 20, 30, 40)]),
        ("[[1,2,3,4], [5,6,7,8]]", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("[1, 2, 3] and [1, 2, 3, 4, 5]", []),
        ("no box", []),
    ],
)
def test_boxes_are_read(said, found):
    assert boxes_in(said) == found


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("From 12.5 to 30 seconds", [(12.5, 30)]),
        ("12.5s - 30s", [(12.5, 30)]),
        ("[12.5, 30]", [(12.5, 30)]),
        ("1:02 - 1:30.5", [(62, 90.5)]),
        ("0:01:00 to 01:00:00", [(60, 3600)]),
        ("between 5 and 7", [(5, 7)]),
        ("at 12.5", []),
        ("1-2 and 4-6", [(1, 2), (4, 6)]),
    ],
)
def test_spans_are_read(said, found):
    assert spans_in(said) == found


def test_box_forms():
    assert corners((1, 2, 3, 4), "corners") == (1, 2, 3, 4)
    assert corners((1, 2, 3, 4), "corner_size") == (1, 2, 4, 6)
    assert corners((2, 2, 2, 4), "center_size") == (1, 0, 3, 4)


def boxed(said, record, *more):
    return trajectory_of({"prompt": "where?", **record}, *more, text("answer", said))


def test_the_last_answer_block_is_read_and_no_observation():
    record = {"ground_truth": [0, 0, 2, 2]}
    think = "perhaps [0, 0, 2, 2] <answer>[5, 5, 6, 6]</answer> no, <answer>[1, 0, 3, 2]</answer>"
    observed = text("observation", "<answer>[0, 0, 2, 2]</answer>", Author.ENVIRONMENT)
    assert box_iou_reward(
        [
            boxed(think, record, observed),
            boxed("[0, 0, 2, 2]", record),
            boxed("none", record),
            boxed("[0, 0, 2, 2]", {}),
        ]
    ) == [pytest.approx(1 / 3), 1, 0, None]


def test_frames_and_forms():
    wide = np.zeros((100, 200, 3), np.uint8)
    record = {"ground_truth": [20, 10, 40, 20], "image_size": [200, 100]}
    assert box_iou_reward([boxed("[0.1, 0.1, 0.2, 0.2]", record)], frame="unit", gold_frame="pixels") == [1]
    assert box_iou_reward([boxed("[100, 100, 200, 200]", record)], frame="thousand", gold_frame="pixels") == [1]
    # read as pixels, as the naive reading has it, the same answer misses
    assert box_iou_reward([boxed("[100, 100, 200, 200]", record)]) == [0]
    unsized = {"ground_truth": [20, 10, 40, 20]}
    shown = boxed("[100, 100, 200, 200]", unsized, image_segment("prompt", wide, Author.USER))
    assert box_iou_reward([shown], frame="thousand", gold_frame="pixels") == [1]
    assert box_iou_reward([boxed("[1, 1, 2, 2]", unsized)], frame="unit", gold_frame="pixels") == [None]
    resized = {**record, "seen": [100, 50]}
    assert box_iou_reward([boxed("[10, 5, 20, 10]", resized)], policy_size="seen") == [1]
    assert box_iou_reward([boxed("[20, 10, 20, 10]", record)], form="corner_size") == [1]
    assert box_iou_reward([boxed("[0, 0, 2, 2]", {"ground_truth": [1, 0, 3, 2]})], threshold=0.5) == [0]


def test_time_frames():
    record = {"ground_truth": [10, 30], "duration": 100, "fps": 2}
    assert temporal_iou_reward([boxed("<answer>10 to 20</answer>", record)]) == [0.5]
    assert temporal_iou_reward([boxed("<answer>0.1 to 0.3</answer>", record)], frame="unit", gold_frame="seconds") == [
        pytest.approx(1)
    ]
    assert temporal_iou_reward([boxed("<answer>20 to 60</answer>", record)], frame="frames", gold_frame="seconds") == [
        pytest.approx(1)
    ]
    assert temporal_iou_reward([boxed("0 to 5", {}), boxed("no time", record)]) == [None, 0]
    assert temporal_iou_reward([boxed("10 to 20", record)], threshold=0.5) == [1]
    undated = boxed("0.1 to 0.3", {"ground_truth": [1, 2]})
    assert temporal_iou_reward([undated, boxed("0.1 to 0.3", record)], frame="unit", gold_frame="seconds") == [None, 1]
    assert temporal_iou_reward([undated], frame="frames", gold_frame="seconds") == [None]


@pytest.mark.parametrize("value", ["[0, 1]", [1, 2, 3], [[0, 1], [2]], {"start": 1}, 3])
def test_a_gold_that_is_no_span_is_named(value):
    with pytest.raises(RewardError, match="'ground_truth'; it must be 2 numbers"):
        temporal_iou_reward([boxed("0 to 1", {"ground_truth": value})])


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (box_iou_reward, {"frame": "inches"}, "box_iou: no frame 'inches'"),
        (box_iou_reward, {"gold_form": "polygon"}, "box_iou: no gold_form"),
        (box_iou_reward, {"threshold": 0}, "threshold is 0"),
        (temporal_iou_reward, {"gold_frame": "hours"}, "temporal_iou: no gold_frame 'hours'"),
    ],
)
def test_options_are_checked_before_anything_is_scored(function, options, message):
    with pytest.raises(UserError, match=message):
        function([], **options)
