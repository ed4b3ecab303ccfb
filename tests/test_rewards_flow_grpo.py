"""The graded score of flow_grpo's reward server: parity with its answers, and its quirks by hand."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from rewards_helpers import image_segment, trajectory_of

from rewards.contract import RewardContext
from rewards.detectors.base import Detection
from rewards.functions.geneval import evaluate, geneval
from rewards.published.flow_grpo import flow_grpo_geneval


def seen(*boxes, color="red"):
    return [{"box": box, "score": 0.95, "color": color} for box in boxes]


BOX, RIGHT, BELOW = (0.0, 0.0, 10.0, 10.0), (30.0, 0.0, 40.0, 10.0), (0.0, 30.0, 10.0, 40.0)
POSITION = {
    "tag": "position",
    "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
}


@pytest.mark.parity
def test_equals_the_released_reward_server(reference_records):
    for number, record in enumerate(reference_records("rewards/flow_grpo_geneval.jsonl")):
        metadata, found = record["inputs"]["metadata"], record["inputs"]["detections"]
        for mode, key in (("flow_grpo", "total"), ("standard", "standard"), ("strict", "strict")):
            got = float(evaluate(metadata, found, mode)[0])
            assert got == pytest.approx(record["outputs"][key], abs=1e-4), (number, mode)


@pytest.mark.parametrize(
    ("record", "found", "score"),
    [
        # one wanted: none 0, one 1, two 0, five 1 - 4 = -3
        ({"include": [{"class": "dog", "count": 1}]}, {}, 0.0),
        ({"include": [{"class": "dog", "count": 1}]}, {"dog": seen(BOX)}, 1.0),
        ({"include": [{"class": "dog", "count": 1}]}, {"dog": seen(*[BOX] * 5)}, -3.0),
        # two red wanted, one of two is: (1 + 1/2) / 2
        (
            {"include": [{"class": "dog", "count": 2, "color": "red"}]},
            {"dog": seen(BOX) + seen(RIGHT, color="blue")},
            0.75,
        ),
        # the count fails, so the color adds a 0: (1/2 + 0) / 2
        ({"include": [{"class": "dog", "count": 2, "color": "red"}]}, {"dog": seen(BOX)}, 0.25),
        (POSITION, {"cat": seen(BOX), "dog": seen(RIGHT)}, 1.0),
        # wrong place: (1 + 1 + 0 + 1) / 4, where a naive reading pays (1 + 1 + 0) / 3
        (POSITION, {"cat": seen(RIGHT), "dog": seen(BOX)}, 0.75),
        # no cat: (0 + 1 + 0) / 3
        (POSITION, {"dog": seen(RIGHT)}, 1 / 3),
        # exclude is ignored
        (
            {"include": [{"class": "dog", "count": 1}], "exclude": [{"class": "cat", "count": 1}]},
            {"dog": seen(BOX), "cat": seen(BOX)},
            1.0,
        ),
        ({"include": []}, {}, 0.0),
    ],
)
def test_by_hand(record, found, score):
    assert evaluate(record, found, "flow_grpo")[0] == pytest.approx(score)


def test_the_graded_modes_of_our_own_pay_less_for_a_wrong_place_and_never_below_zero():
    wrong = {"cat": seen(RIGHT), "dog": seen(BOX)}
    assert evaluate(POSITION, wrong, "graded")[0] == pytest.approx(2 / 3)
    assert evaluate({"include": [{"class": "dog", "count": 1}]}, {"dog": seen(*[BOX] * 5)}, "graded_strict")[0] == 0


def test_it_has_the_options_of_geneval_and_they_hold():
    options = {name: p for name, p in inspect.signature(geneval).parameters.items() if name != "mode"}
    assert options == dict(inspect.signature(flow_grpo_geneval).parameters)

    class Dim:
        classes = ("dog",)

        def detect(self, images):
            return [{"dog": [Detection(BOX, 0.2), Detection(RIGHT, 0.5)]} for _ in images]

    def paid(tag, **options):
        row = trajectory_of(
            {"tag": tag, "include": [{"class": "dog", "count": 1}]},
            image_segment("sketch", np.zeros((4, 4, 3), np.uint8)),
        )
        return flow_grpo_geneval([row], RewardContext.of(None, None, Dim()), **options)

    # one wanted; of scores 0.2 and 0.5 one is above 0.3, none above 0.9, and both above 0.1: 1, 1 - 1 and 1 - 1
    assert paid("single_object") == [1] and paid("counting") == [0]
    assert paid("single_object", threshold=0.1) == [0] and paid("counting", counting_threshold=0.4) == [1]
