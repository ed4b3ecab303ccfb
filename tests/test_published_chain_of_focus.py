"""Chain-of-Focus by hand: the base score over trajectories, and the table that replaces it in a group."""

from __future__ import annotations

import pytest
from published_helpers import IMAGE, ScriptedJudge, conversation, judged_by, say, tool

from rewards.published.chain_of_focus import advantages, chain_of_focus, chain_of_focus_base, replaced
from runtime.errors import UserError

RECORD = {"question": "?", "ground_truth": "red"}
THINK, CALL = "<think>a</think>", "<tool_call>{}</tool_call>"


@pytest.mark.parametrize(
    ("zoomed", "base", "expected"),
    [
        ([0, 1, 1, 0, 0], [1.0, 1.0, 0.1, 0.1, 0.0], [1.0, 0.8, 0.5, 0.1, 0.0]),  # a direct one is right
        ([1, 1, 0, 0], [0.9, 0.0, 0.1, 0.0], [1.0, 0.5, 0.1, 0.0]),  # only by zooming
        ([1, 0, 0], [0.1, 0.1, 0.0], [0.5, 0.1, 0.0]),  # none: a zoom still pays a half
        ([0, 1], [None, 1.0], [None, 1.0]),  # the direct one may be right, but nobody judged it: it sets no table
        ([0, 1], [0.5, 0.5], [0.0, 0.5]),  # one half is not right
        ([1], [0.1], [0.5]),
        ([], [], []),
    ],
)
def test_the_table(zoomed, base, expected):
    assert replaced([bool(z) for z in zoomed], base) == expected


def test_a_lone_member():
    assert replaced([True], [0.9], alone_keeps=True) == [0.9] and replaced([True], [0.9]) == [1.0]


def test_advantages_by_hand():
    # mean 0.75, deviations 0.25 and -0.25, sample deviation 0.25 sqrt(2)
    assert advantages([1.0, 0.5]) == pytest.approx([0.70711, -0.70711], abs=1e-4)
    assert advantages([0.9]) == pytest.approx([0.9], abs=1e-4) and advantages([0.5, 0.5]) == [0, 0]


def base_of(*segments, judge=True, **options):
    scripted = ScriptedJudge(judge)
    return (
        chain_of_focus_base([conversation(RECORD, *segments)], judged_by(scripted), **options)[0],
        [c.answer for c in scripted.checks],
    )


@pytest.mark.parametrize(
    ("segments", "judge", "value", "asked"),
    [
        ((say(THINK + "<answer>red</answer>"),), True, 1.0, ["red"]),
        ((say("<answer>red</answer>"),), True, 0.9, ["red"]),  # no thinking
        ((say(THINK + "<answer>blue</answer><answer>red</answer>"),), True, 1.0, ["red"]),  # the last counts
        # the tool's reply opens an answer tag: the release reads the answer from there on: unbalanced
        ((say(THINK + CALL), tool("close with <answer> when ready"), say("<answer>red</answer>")), True, 1.0, ["red"]),
        ((say(THINK + CALL), tool("<answer>red</answer>", IMAGE), say("done")), True, 0.0, []),
        ((say(THINK + "<answer> </answer>"),), True, 0.0, []),
        ((say(THINK + f"<answer>{'a ' * 1000}</answer>"),), False, 0.1, None),
        ((say(THINK + f"<answer>{'a ' * 1001}</answer>"),), False, 0.0, None),
        ((say(THINK + "<answer>red</answer>"),), None, None, ["red"]),
    ],
)
def test_base_by_hand(segments, judge, value, asked):
    got, checks = base_of(*segments, judge=judge)
    assert got == (None if value is None else pytest.approx(value)) and asked in (None, checks)


def test_math_asks_only_where_the_rule_fails():
    rows = [
        conversation({"ground_truth": "3/4", "kind": "math"}, say(THINK + f"<answer>{said}</answer>"))
        for said in ("0.75", "three quarters", "")
    ]
    judge = ScriptedJudge(True)
    assert chain_of_focus_base(rows, judged_by(judge), kind_column="kind") == pytest.approx([1.0, 1.0, 0.0])
    assert [c.answer for c in judge.checks] == ["three quarters"]


def test_the_release_reads_what_the_tool_says():
    segments = (say(THINK + CALL), tool("close with <answer> when ready", None), say("<answer>red</answer>"))
    value, asked = base_of(*segments, variant="release")
    assert value == pytest.approx(0.9) and asked == ["when ready<answer>red"]
    assert base_of(say(THINK), variant="release") == (pytest.approx(0.9), [""])


def group(*members, number=0):
    return [conversation(RECORD, *segments, group=number, member=i) for i, segments in enumerate(members)]


def test_groups_over_trajectories():
    right, wrong = "<answer>red</answer>", "<answer>blue</answer>"
    zoom = say(THINK + CALL), tool("", IMAGE)
    rows = group(
        (say(THINK + right),), (*zoom, say(right)), (*zoom, say(wrong)), (say(THINK + wrong),), (say(wrong),)
    ) + group((*zoom, say(right)), (say(THINK + "<answer>?</answer>"),), number=1)
    judge = ScriptedJudge(lambda check: None if check.answer == "?" else check.answer == "red")
    logged = {}
    values = chain_of_focus(rows, judged_by(judge), logged.__setitem__)
    assert values == pytest.approx([1.0, 0.8, 0.5, 0.1, 0.0, 1.0, None])
    assert logged["zoom_rate"] == pytest.approx(3 / 7)
    # rows of a group need not stand together
    shuffled = [rows[i] for i in (5, 0, 6, 4, 1, 3, 2)]
    assert chain_of_focus(shuffled, judged_by(judge)) == pytest.approx([1.0, 1.0, None, 0.0, 0.8, 0.1, 0.5])


def test_a_call_that_the_tool_quotes_is_no_zoom():
    rows = group((say(THINK), tool(CALL), say("<answer>blue</answer>")), (say(THINK + "<answer>blue</answer>"),))
    assert chain_of_focus(rows, judged_by(ScriptedJudge(False))) == pytest.approx([0.1, 0.1])
    assert chain_of_focus(rows, judged_by(ScriptedJudge(False)), variant="release") == pytest.approx([0.5, 0.1])


def test_bad_options_and_columns_are_named():
    with pytest.raises(UserError, match="no kind of data 'perceptions'; did you mean 'perception'"):
        chain_of_focus([], judged_by(None), data_kind="perceptions")
    with pytest.raises(UserError, match="has 'unknown' in column 'kind'"):
        chain_of_focus_base([conversation({"kind": "unknown", **RECORD})], judged_by(None), kind_column="kind")
