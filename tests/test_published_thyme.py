"""Thyme by hand, over trajectories whose sandbox answers inside the thinking."""

from __future__ import annotations

import pytest
from published_helpers import IMAGE, ScriptedJudge, conversation, judged_by, say, tool

from rewards.published.judge_helpers import flag_in
from rewards.published.thyme import Reading, by_rule, read, score, score_release, thyme
from runtime.errors import UserError

RECORD = {"question": "How many kites?", "ground_truth": "red"}
FORM = "<think>so it is red</think>\n<answer>red</answer>"
YES, NO = '{"Consistency": 1}', 'Sure: {"Consistency": 0}'


def paid(*segments, judge=True, reply=YES, record=RECORD, **options):
    scripted = ScriptedJudge(judge, reply)
    value = thyme([conversation(record, *segments)], judged_by(scripted), **options)[0]
    return value, len(scripted.checks), len(scripted.questions)


def test_the_two_formulas():
    good, bad = Reading("x", "", True), Reading("x", "", False)
    # paper: 1 (1 + 0.5) + 0.5; consistency multiplies, so it is worth nothing beside a wrong result
    assert score(good, True, True)["total"] == 2.0 and score(good, True, False)["total"] == 1.5
    assert score(bad, True, True)["total"] == 1.5 and score(good, False, True)["total"] == 0.5
    assert score(good, False, True, wrong=-1)["total"] == -0.5
    # release: a sum, with wrong at -1 and nothing at 0
    assert score_release(good, True, True)["total"] == 2.0 and score_release(good, False, True)["total"] == -0.5
    assert score_release(good, None, True)["total"] == 0.5
    assert score_release(Reading("", "", False), False, True)["total"] == 0


@pytest.mark.parametrize(
    ("segments", "judge", "reply", "value", "checks", "questions"),
    [
        ((say(FORM),), False, YES, 2.0, 0, 1),  # right by rule; the judge is asked about consistency alone
        ((say(FORM),), False, NO, 1.5, 0, 1),
        ((say(FORM.replace("<answer>red", "<answer>blue")),), False, YES, 0.5, 1, 0),  # wrong: only the format pays
        ((say(FORM.replace("<answer>red", "<answer>crimson")),), True, YES, 2.0, 1, 1),
        (
            (say("<think>a</think><answer>red</answer>"),),
            True,
            YES,
            1.5,
            0,
            1,
        ),  # no white space between: not well-formed
        ((say(FORM + "\n"),), True, YES, 1.5, 0, 1),
        # a missing answer is a wrong one, whatever the format
        ((say("<think>a</think>\n<answer> </answer>"),), True, YES, 0.5, 0, 0),
        ((say("<think>a</think> red"),), True, YES, 0.0, 0, 0),
        # the sandbox's output is nobody's answer, and spoils no format
        (
            (
                say("<think>a<code>1</code>"),
                tool("<sandbox_output><answer>red</answer></sandbox_output>"),
                say("</think>\nIt is blue."),
            ),
            True,
            YES,
            0.0,
            0,
            0,
        ),
        (
            (
                say("<think>a<code>1</code>"),
                tool("<sandbox_output><think></sandbox_output>", IMAGE),
                say("</think>\n<answer>red</answer>"),
            ),
            True,
            YES,
            2.0,
            0,
            1,
        ),
        # not judged: None where it counts, and only there
        ((say(FORM.replace("<answer>red", "<answer>crimson")),), None, YES, None, 1, 0),
        ((say(FORM),), True, None, None, 0, 1),
        ((say(FORM),), True, "no score", None, 0, 1),
        ((say(FORM.replace("<answer>red", "<answer>blue")),), False, None, 0.5, 1, 0),
    ],
)
def test_by_hand(segments, judge, reply, value, checks, questions):
    assert paid(*segments, judge=judge, reply=reply) == (value, checks, questions)


def test_the_release_pays_nothing_better_than_a_wrong_answer():
    wrong, none = say(FORM.replace("<answer>red", "<answer>blue")), say("<think>so</think>\n<answer></answer>")
    assert paid(wrong, judge=False, variant="release")[0] == -0.5 < paid(none, variant="release")[0] == 0.5
    assert paid(wrong, judge=False)[0] == paid(none)[0] == 0.5
    assert paid(wrong, judge=None, variant="release")[0] == 0.5


def test_the_release_reads_the_sandbox():
    segments = (
        say("<think>a<code>1</code>"),
        tool("<sandbox_output><answer>red</answer></sandbox_output>"),
        say("</think>\nIt is blue."),
    )
    assert paid(*segments, variant="release")[0] == 1.5 and paid(*segments)[0] == 0


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("The answer is C", "C", True),
        ("Red", "red", True),
        ("50%", "50", True),
        ("1,000", "1000", True),
        ("so x is 7", "7", True),
        ("3/4", "0.75", True),
        ("12 cm", "12", True),
        ("12", "21", False),
        ("A", "C", False),
        ("", "7", False),
    ],
)
def test_the_releases_rules(answer, gold, right):
    assert by_rule(answer, gold) is right


def test_reading():
    reading = read("<think>a <image></think>\n<answer>1</answer><answer>2</answer>")
    assert reading == Reading("1", "a ", False)
    assert read("Well. " + FORM).well_formed  # words before the thinking do no harm
    assert read(FORM.replace("</think>\n", "</think>\n\n")).well_formed is False


@pytest.mark.parametrize(
    ("reply", "flag"),
    [
        ('{"Consistency": 1}', True),
        ('```\n{"Consistency": 0}\n```', False),
        ("yes", None),
        (None, None),
        ("{1", None),
        ('{"Score": 1}', None),
        ('{"Consistency": 7}', None),
        ('{"Consistency": "x"}', None),
        ("[1]", None),
    ],
)
def test_flags_in_replies(reply, flag):
    assert flag_in(reply, "Consistency") is flag


def test_the_judge_sees_the_end_of_the_thinking():
    judge = ScriptedJudge(True, YES)
    thought = conversation(RECORD, say("<think>" + "a" * 600 + "b" * 100 + "</think>\n<answer>red</answer>"))
    thyme([thought], judged_by(judge))
    asked = judge.questions[0].messages[-1]["content"]
    assert "a" * 400 + "b" * 100 in asked and "a" * 401 not in asked


def test_no_reference_and_bad_options():
    assert paid(say(FORM), record={}) == (None, 0, 0)
    with pytest.raises(UserError, match="thyme: no variant 'papr'; did you mean 'paper'"):
        thyme([], judged_by(None), variant="papr")
