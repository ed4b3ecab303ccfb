"""DeepEyes and DeepEyesV2 by hand, over trajectories with calls, observations and images."""

from __future__ import annotations

import pytest
from published_helpers import IMAGE, ScriptedJudge, conversation, judged_by, say, tool

from rewards.contract import RewardContext, RewardError
from rewards.published.deepeyes import MATH_WEIGHTS, Reading, Weights, deepeyes, read_release, score
from rewards.published.deepeyes_v2 import deepeyes_v2
from runtime.errors import UserError

RECORD = {"question": "What colour is the kite?", "ground_truth": "red"}
THINK, CALL, ANSWER = "<think>hm</think>", "<tool_call>{}</tool_call>", "<answer>red</answer>"


def paid(reward, *segments, verdict=True, record=RECORD, **options):
    """(the value, what the judge was asked about)."""
    judge = ScriptedJudge(verdict)
    value = reward([conversation(record, *segments)], judged_by(judge), **options)[0]
    return value, [check.answer for check in judge.checks]


def test_the_formula():
    assert score(Reading("x", True, True), True) == {"total": 2.0, "accuracy": 1, "format": 0, "tool": 1}
    assert score(Reading("x", False, True), False)["total"] == pytest.approx(-0.2)  # looked, but wrong: no bonus
    assert score(Reading("x", False), True)["total"] == pytest.approx(0.6)
    assert score(Reading("x", False), True, MATH_WEIGHTS)["total"] == pytest.approx(0.8)
    assert score(Reading("x", True, True), True, Weights(1, 1, 1))["total"] == 2


@pytest.mark.parametrize(
    ("segments", "judge", "value", "asked"),
    [
        # right: 0.8, and 1.2 more for an image that came back
        ((say(THINK + ANSWER),), True, 0.8, ["red"]),
        ((say(THINK + CALL), tool("", IMAGE), say(ANSWER)), True, 2.0, ["red"]),
        ((say(THINK + CALL), tool("", IMAGE), say(ANSWER)), False, 0.0, ["red"]),
        # a call that failed brings no bonus; nor does an image that the prompt showed
        ((say(THINK + CALL), tool("Error: no such box"), say(ANSWER)), True, 0.8, ["red"]),
        # an answer tag in the tool's reply is nobody's answer: no answer, no accuracy, a format error
        ((say(THINK + CALL), tool("<answer>red</answer>", None), say("I am done.")), True, -0.2, []),
        # one in the reply beside the policy's own changes nothing
        ((say(THINK + CALL), tool("write <answer> or <think>", None), say(ANSWER)), True, 0.8, ["red"]),
        # no opening tag: the whole text is no answer
        ((say(THINK + "red</answer>"),), True, -0.2, []),
        # never closed: judged, and a format error
        ((say(THINK + "<answer>red<|im_end|>"),), True, 0.6, ["red"]),
        # a blank answer is none; one of 1000 characters is void and not worth a call
        ((say(THINK + "<answer>  </answer>"),), True, -0.2, []),
        ((say(THINK + f"<answer>{'x' * 1000}</answer>"),), True, -0.2, []),
        ((say(THINK + f"<answer>{'x' * 999}</answer>"),), True, 0.8, ["x" * 999]),
        ((say("hm</think>" + ANSWER),), True, 0.6, ["red"]),
        # not judged is not wrong
        ((say(THINK + ANSWER),), None, None, ["red"]),
        ((), True, -0.2, []),
    ],
)
def test_perception_by_hand(segments, judge, value, asked):
    got, checks = paid(deepeyes, *segments, verdict=judge)
    assert got == (None if value is None else pytest.approx(value)) and checks == asked


@pytest.mark.parametrize(
    ("segments", "judge", "value", "asked"),
    [
        ((say(THINK + ANSWER),), True, 0.8, ["red"]),
        # an answer inside the thinking does not count here
        ((say("<think>" + ANSWER + "</think>done"),), True, -0.2, []),
        # the first of two answers counts
        ((say(THINK + "<answer>blue</answer>" + ANSWER),), False, 0.0, ["blue"]),
    ],
)
def test_general_reasoning_by_hand(segments, judge, value, asked):
    got, checks = paid(deepeyes, *segments, verdict=judge, kind="general_reasoning")
    assert got == pytest.approx(value) and checks == asked


@pytest.mark.parametrize(
    ("words", "judge", "value", "asked"),
    [
        ("<think>a</think>\\boxed{3/4}", False, 1.2, []),  # by rule: the judge is not asked
        ("<think>a</think>\\boxed{\\frac{3}{4}}", False, 1.2, []),  # the release reads "\frac{3" here
        (
            "<think>a</think>\\boxed{1} no, \\boxed{0.75}",
            False,
            0.8,
            [],
        ),  # several boxes: a format error, the last counts
        ("<think>\\boxed{3/4}</think>done", True, -0.4, []),  # a box in the thinking is none
        ("<think>a</think>\\boxed{}", True, -0.4, []),
        ("<think>a</think>\\boxed{three quarters}", True, 1.2, ["three quarters"]),
        ("<think>a</think>\\boxed{5}", False, 0.0, ["5"]),
        ("<think>a</think>\\boxed{5}", None, None, ["5"]),
    ],
)
def test_math_by_hand(words, judge, value, asked):
    got, checks = paid(
        deepeyes, say(words), verdict=judge, kind="math", record={"question": "?", "ground_truth": "3/4"}
    )
    assert got == (None if value is None else pytest.approx(value)) and checks == asked


def test_the_release_reads_what_the_tool_says():
    segments = say(THINK + CALL), tool("<answer>red</answer>", None), say("I am done.")
    assert paid(deepeyes, *segments, variant="release") == (pytest.approx(0.8), ["red"])
    assert paid(deepeyes, *segments, variant="release", verdict=None)[0] == 0  # paid as wrong
    assert read_release("x\\boxed{\\frac{3}{4}}", "math").answer == "\\frac{3"


def test_rows_without_a_reference_and_mixed_kinds():
    judge = ScriptedJudge(True)
    rows = [
        conversation({"question": "?"}, say(THINK + ANSWER)),
        conversation({**RECORD, "kind": "vstar_chart"}, say(THINK + ANSWER)),
        conversation({"ground_truth": "7", "kind": "math"}, say(THINK + "\\boxed{7}")),
    ]
    extra, logged = {}, {}
    assert deepeyes(rows[:1], judged_by(None)) == [None]
    values = deepeyes(rows[1:], judged_by(judge), logged.__setitem__, extra.__setitem__, kind_column="kind")
    assert values == pytest.approx([0.8, 1.2])
    assert extra["parts"][0]["accuracy"] == 1 and logged["accuracy"] == 1 and logged["total"] == pytest.approx(1.0)
    rows[0].record["ground_truth"] = "7"  # and still no kind
    assert deepeyes(rows, judged_by(judge), kind_column="kind") == [None, *values]


def test_bad_options_and_a_missing_judge_are_named():
    with pytest.raises(UserError, match="deepeyes: no kind of data 'vstar'; did you mean 'vstar_chart'"):
        deepeyes([], judged_by(None), kind="vstar")
    with pytest.raises(UserError, match="deepeyes: no variant 'paper'"):
        deepeyes([], judged_by(None), variant="paper")
    with pytest.raises(RewardError, match="reward 'deepeyes' asks a judge"):
        deepeyes([conversation(RECORD, say(THINK + ANSWER))], RewardContext())
    assert deepeyes([conversation(RECORD, say(THINK))], RewardContext()) == [pytest.approx(-0.2)]  # nothing to ask


@pytest.mark.parametrize(
    ("segments", "options", "judge", "value", "asked"),
    [
        ((say(THINK + ANSWER),), {}, True, 1.0, ["red"]),
        ((say("hm</think>" + ANSWER),), {}, True, 1.0, ["red"]),  # the template opened the think tag
        ((say(THINK + "red"),), {}, True, 0.0, []),  # the release asks the judge about None and pays 0.8
        ((say(THINK + "<code>1<|im_end|>"), tool("2"), say(ANSWER)), {}, True, 0.8, ["red"]),
        ((say(THINK + f"<answer>{'x' * 300}</answer>"),), {}, True, 0.0, []),
        ((say(THINK + CALL), tool("found"), say(ANSWER)), {}, True, 1.0, ["red"]),
        ((say(THINK + CALL), tool("found"), say(ANSWER)), {"kind": "search"}, True, 0.92, ["red"]),
        ((say(THINK + CALL), tool("found"), say(ANSWER)), {"kind": "search"}, False, 0.2, ["red"]),
        ((say(THINK + ANSWER),), {"kind": "search"}, True, 1.0, ["red"]),
        # a call tag that the search result quotes is no call, and unbalances nothing
        ((say(THINK + "<code>1</code>"), tool("<tool_call>"), say(ANSWER)), {"kind": "search"}, True, 1.0, ["red"]),
        ((say(THINK + ANSWER),), {}, None, None, ["red"]),
    ],
)
def test_v2_by_hand(segments, options, judge, value, asked):
    got, checks = paid(deepeyes_v2, *segments, verdict=judge, **options)
    assert got == (None if value is None else pytest.approx(value)) and checks == asked


def test_v2_release_asks_about_nothing():
    assert paid(deepeyes_v2, say(THINK + "red"), variant="release") == (pytest.approx(0.8), [""])
