"""VisTA's with-tool against without: by hand, over thoughts, and where the naive reading errs."""

from __future__ import annotations

import numpy as np
import pytest
from rewards_helpers import image_segment, text, trajectory_of

from record.trajectory import Author
from rewards.contract import RewardContext, RewardError
from rewards.judge.base import Reply
from rewards.published.vista import (
    final_answer_release,
    read_tools,
    read_tools_release,
    relaxed_match_release,
    relaxed_or_listed,
    score_release,
    tool_gain,
    vista,
)
from runtime.errors import UserError

CHART = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("without", "with_tools", "pay"), [(True, True, 1), (False, True, 1), (True, False, -0.5), (False, False, 0)]
)
def test_the_formula_by_hand(without, with_tools, pay):
    assert tool_gain(without, with_tools) == pay


@pytest.mark.parametrize(
    ("said", "ours", "release"),
    [
        ("<answer>3, 0, 3</answer>", ([3, 0], True), [3, 0]),
        ("<answer>[6]</answer>", ([6], True), None),
        ("<answer></answer>", ([], True), None),
        ("I need no tool.", ([], False), None),
        (
            "<answer>7, 9, -1</answer>",
            ([], False),
            [7],
        ),  # tools that are not there: no list of tools, or those that are
        ("4, 2", ([], False), [4, 2]),
        ("[6]", ([], False), [6]),
        ("<answer>2</answer> no, <answer>0</answer>", ([0], True), [2]),  # the last word counts, or the first
        ("user <answer>8</answer> assistant\n<answer>5, 1</answer>", ([5, 1], True), [5, 1]),
        ("assistant\n4\n\n<answer>7</answer>", ([7], True), [4]),
    ],
)
def test_tools_are_read(said, ours, release):
    assert read_tools(said) == ours and read_tools_release(said) == release


@pytest.mark.parametrize(
    ("said", "gold", "ours", "release"),
    [
        ("105", "100", 1, 1),
        ("95", "100", 1, 1),
        ("106", "100", 0, 0),
        ("403%", "403%", 1, 1),
        ("-38", "38", 0, 1),  # the release drops the sign
        ("0.0", "0", 1, 0),
        ("0", "0", 1, 1),  # and knows only one way to write zero
        ("3 4", "34", 0, 1),
        ("3:4", "75%", 0, 0),
        ("about 91%", "91%", 0, 1),
        ("green and red", "[red, green]", 1, 1),
        ("red", "[red, green]", 0, 0),
        ("BROWN", "brown", 1, 1),
        ("unknown", "0", 0, 0),
        ("teal", "7", 0, 0),
    ],
)
def test_answers_are_compared(said, gold, ours, release):
    assert relaxed_or_listed(said, gold) == ours and relaxed_match_release(said, gold) == release


def test_the_release_pays_failures_and_stops_on_questions():
    assert score_release(None, "7", "7") == {"total": 0.0}
    assert score_release("<answer>7</answer>", "8", "7")["total"] == -0.5
    with pytest.raises(KeyError):
        score_release("7", "7", "7", matches=0)
    assert final_answer_release("user assistant <answer> 7 </answer>") == "7" == final_answer_release(" 7 ")


# ---- over thoughts --------------------------------------------------------------------------------------------------


class Frozen:
    """A frozen model that is right about 7 when it is told of seven; None where it is to fail."""

    def __init__(self, fails=False):
        self.fails, self.asked = fails, []

    def ask(self, questions):
        self.asked += questions
        return [
            Reply(None, "timeout", "no reply")
            if self.fails
            else Reply("<answer>7</answer>" if "seven" in str(q.messages) else "<answer>3</answer>")
            for q in questions
        ]


def picked(said, **record):
    return trajectory_of(
        {"ground_truth": "7", "question": "How many bars?", **record},
        image_segment("prompt", CHART, Author.USER),
        text("answer", said),
    )


OUTPUTS = {"tool_outputs": {"0": "a table: seven", "2": "nothing"}}


def test_the_frozen_model_is_asked_with_and_without():
    frozen = Frozen()
    rows = [
        picked("<answer>0, 2</answer>", **OUTPUTS),
        picked("<answer>2</answer>", **OUTPUTS),
        picked("<answer></answer>"),
        picked("none", ground_truth=None),
    ]
    logged = {}
    assert vista(rows, RewardContext(judge=frozen), logged.__setitem__) == [1, 0, 0, None]
    assert len(frozen.asked) == 5  # two, two, and one for the pick of no tool
    assert all(q.messages[-1]["content"][0]["type"] == "image" for q in frozen.asked)
    assert logged == pytest.approx({"total": 1 / 3, "right_without": 0, "right_with": 1 / 3, "format": 1, "tools": 1})


def test_replies_that_were_computed_before_are_not_asked_for():
    known = {"answer_without_tools": "<answer>7</answer>", "answers_with_tools": {"0,2": "8", "1": "7"}}
    rows = [
        picked("<answer>2, 0</answer>", **known),
        picked("<answer>1</answer>", **known),
        picked("<answer></answer>", **known),
        picked("no list", **known),
    ]
    assert vista(rows, RewardContext()) == [-0.5, 1, 1, 1]
    assert vista(rows, RewardContext(), format=0.1) == pytest.approx([-0.4, 1.1, 1.1, 1])


def test_a_model_that_did_not_answer_is_not_a_wrong_one():
    rows = [picked("<answer>0</answer>", **OUTPUTS), picked("<answer>1</answer>", answer_without_tools="7", **OUTPUTS)]
    assert vista(rows, RewardContext(judge=Frozen(fails=True))) == [None, None]
    assert vista(rows, RewardContext(judge=Frozen(fails=True)), variant="release") == [0, 0]


def test_bad_input_is_named():
    with pytest.raises(RewardError, match="no 'tool_outputs'"):
        vista([picked("<answer>0</answer>")], RewardContext(judge=Frozen()))
    with pytest.raises(RewardError, match="vista"):
        vista([picked("<answer>0</answer>", **OUTPUTS)], RewardContext())
    with pytest.raises(UserError, match="no variant 'paper'"):
        vista([], RewardContext(), variant="paper")
