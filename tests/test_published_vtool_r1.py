"""VTool-R1 by hand: where each form finds the final answer, the judge's verdict, and the similarity without a judge."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from published_helpers import IMAGE, ScriptedJudge, conversation, judged_by, say, tool

from rewards.published.vtool_r1 import (
    answer_repaired,
    answer_v1,
    answer_v2,
    nearness,
    similarity,
    similarity_release,
    vtool_r1,
    vtool_r1_similarity,
)
from runtime.errors import UserError


@pytest.mark.parametrize(
    ("text", "v1", "v2", "repaired"),
    [
        ("FINAL ANSWER: teal. TERMINATE", "teal", "teal.", "teal"),
        ("FINAL ANSWER: 8.7. TERMINATE", "8.7", "8.7.", "8.7"),
        ("FINAL ANSWER:\nteal. TERMINATE", "teal", "teal.", "teal"),
        ("FINAL ANSWER: a||b", "a||b", "a", "a||b"),
        # other lines follow without a full stop: the first release finds nothing, the second takes them in
        ("FINAL ANSWER: red\nTHOUGHT 1: so it is\nTERMINATE", None, "red\nTHOUGHT 1: so it is", "red"),
        # the model corrects itself: the releases keep its first word
        ("FINAL ANSWER: red. No. FINAL ANSWER: blue. TERMINATE", "red", "red. No. FINAL ANSWER: blue.", "blue"),
        ("ANSWER: blue. TERMINATE", None, "blue. TERMINATE", "blue"),
        ("It is blue.", None, "It is blue.", None),
        ("FINAL ANSWER: . TERMINATE", "", ".", None),
        ("", None, "", None),
    ],
)
def test_where_the_answer_is_found(text, v1, v2, repaired):
    assert answer_v1(text) == v1 and answer_v2(text) == v2 and answer_repaired([text]) == repaired


def test_the_last_turn_with_an_answer_counts():
    assert answer_repaired(["FINAL ANSWER: red", "FINAL ANSWER: blue", "bye"]) == "blue" and answer_repaired([]) is None


def paid(*segments, verdict=True, gold="blue", **options):
    judge = ScriptedJudge(verdict)
    value = vtool_r1([conversation({"ground_truth": gold}, *segments)], judged_by(judge), **options)[0]
    return value, [check.answer for check in judge.checks]


# The observation names an answer, which is the environment's.
OBSERVED = (say("ACTION 0: focus()"), tool("OBSERVATION: FINAL ANSWER: blue TERMINATE", None), tool("", IMAGE))


@pytest.mark.parametrize(
    ("segments", "options", "value", "asked"),
    [
        ((say("FINAL ANSWER: blue. TERMINATE"),), {}, 1, ["blue"]),
        ((say("FINAL ANSWER: red. TERMINATE"),), {"verdict": False}, 0, ["red"]),
        ((*OBSERVED, say("FINAL ANSWER: red. TERMINATE")), {}, 1, ["red"]),
        ((*OBSERVED, say("FINAL ANSWER: red. TERMINATE")), {"variant": "release_v2"}, 1, ["blue"]),
        ((*OBSERVED, say("I give up")), {}, 0, []),
        ((*OBSERVED, say("I give up")), {"variant": "release_v2"}, 1, ["blue"]),
        ((say("It is blue"),), {}, 0, []),
        ((say("It is blue"),), {"variant": "release_v1"}, 0, []),
        ((say("It is blue"),), {"variant": "release_v2"}, 1, ["It is blue"]),
        ((say("FINAL ANSWER: blue"),), {"verdict": None}, None, ["blue"]),
        ((say("FINAL ANSWER: blue"),), {"verdict": None, "variant": "release_v2"}, 0, ["blue"]),
        ((say("FINAL ANSWER: blue"),), {"gold": None}, None, []),
    ],
)
def test_by_hand(segments, options, value, asked):
    assert paid(*segments, **options) == (value, asked)


@pytest.mark.parametrize(
    ("a", "b", "near"),
    [
        ("5", "5", 1),
        ("131.5", "263", 0.5),
        ("9", "10", 0.9),
        ("0", "3", 0),
        ("0", "0.0", 1),
        ("red", "red", 1),
        ("red", "Red", 0),
        ("5", "red", 0),
        ("-5", "5", -1),
        ("nan", "nan", 1),
    ],
)
def test_nearness(a, b, near):
    assert nearness(a, b) == pytest.approx(near)


@pytest.mark.parametrize(
    ("answer", "gold", "release", "repaired"),
    [
        ("204||612", "204|||612", 1, 1),
        ("612||204", "204|||612", 1, 1),
        ("Oslo", "Lisbon|||Oslo", 0.5, 0.5),
        ("131.5", "263", 0.5, 0.5),
        ("5||5||5", "5", 3, 1 / 3),  # repeating what is right pays three times over
        ("9||9", "10|||9", 1, 0.95),  # both parts of the answer match the 9; one to one, one of them has the 10
        ("-5", "5", -1, 0),
        (None, "5", 0, 0),
    ],
)
def test_similarity_by_hand(answer, gold, release, repaired):
    assert similarity_release(answer, gold) == pytest.approx(release)
    assert similarity(answer, gold) == pytest.approx(repaired)


@examples(0.4)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=4), st.lists(st.integers(-9, 9), min_size=1, max_size=4))
def test_the_repaired_similarity_is_a_share(mine, theirs):
    value = similarity("||".join(map(str, mine)), "|||".join(map(str, theirs)))
    assert 0 <= value <= 1 and (value == 1) == (sorted(mine) == sorted(theirs))


def test_the_similarity_over_trajectories():
    rows = [
        conversation({"ground_truth": gold}, *segments)
        for gold, *segments in (
            ("10", say("FINAL ANSWER: 9.")),
            (["1", "2"], say("FINAL ANSWER: 2||1")),
            ("10", *OBSERVED),
            (None, say("x")),
        )
    ]
    extra = {}
    assert vtool_r1_similarity(rows, None, None, extra.__setitem__) == pytest.approx([0.9, 1, 0, None])
    assert extra["answer"] == ["9", "2||1", None, None]


def test_bad_options_are_named():
    with pytest.raises(UserError, match="vtool_r1: no variant 'release'; did you mean 'release_v"):
        vtool_r1([], judged_by(None), variant="release")
    with pytest.raises(UserError, match="vtool_r1_similarity: no variant 'release_v2'"):
        vtool_r1_similarity([], variant="release_v2")
