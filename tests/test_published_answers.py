"""The readings of rewards/functions/comparisons.py and options.py in the published rewards that compare answers: the
repaired (or paper's) form has them; the release's keeps its own."""

from __future__ import annotations

import pytest
from published_helpers import ScriptedJudge, conversation, judged_by, say

from rewards.published.chain_of_focus import chain_of_focus_base
from rewards.published.deepeyes import deepeyes
from rewards.published.openthinkimg import openthinkimg
from rewards.published.pixel_reasoner import pixel_reasoner
from rewards.published.thyme import thyme
from rewards.published.vista import vista
from rewards.published.visual_arft import visual_arft
from rewards.published.vital import vital

# What the policy says, the reference, and whether it is right.
MATHS = [
    ("**73**", "73", True),
    ("11 5/6", "71/6", True),
    ("\u22125", "-5", True),
    ("-5", "5", False),
    ("3.5", "35", False),
]
WORDS = [("**red**", "red", True), ("cafe\u0301", "caf\u00e9", True), ("-5", "5", False), ("3.5", "35", False)]
OPTIONS = [("A is correct", "A", True), ("B. red", "B", True), ("A or B", "B", False), ("not B", "B", False)]


def paid(reward, words, gold, judge=None, **options):
    """The reward of one thought that says so, under a judge that is not to be asked unless it is given."""
    asked = ScriptedJudge(judge)
    value = reward([conversation({"question": "?", "ground_truth": gold}, say(words))], judged_by(asked), **options)[0]
    return value, len(asked.checks)


@pytest.mark.parametrize(("said", "gold", "right"), MATHS)
def test_a_rule_before_the_judge(said, gold, right):
    """DeepEyes, Chain-of-Focus and Thyme ask a judge only where the rule does not find the answer right."""
    box, tag = f"<think>a</think>\\boxed{{{said}}}", f"<think>a</think>\n<answer>{said}</answer>"
    assert paid(deepeyes, box, gold, False, kind="math") == (pytest.approx(1.2 if right else 0.0), 0 if right else 1)
    base = paid(chain_of_focus_base, tag, gold, False, data_kind="math")
    assert base == (pytest.approx(1.0 if right else 0.1), 0 if right else 1)
    checked = ScriptedJudge(False, '{"Consistency": 1}')
    value = thyme([conversation({"ground_truth": gold}, say(tag))], judged_by(checked))[0]
    assert (value, len(checked.checks)) == ((2.0, 0) if right else (0.5, 1))


@pytest.mark.parametrize(("said", "gold", "right"), OPTIONS)
def test_options(said, gold, right):
    form = f"<think>a</think><answer>{said}</answer>"
    assert paid(vital, form, gold)[0] == right + 1  # and 1 for the form
    assert paid(pixel_reasoner, f"\\boxed{{{said}}}", gold)[0] == right
    assert paid(pixel_reasoner, f"\\boxed{{{said}}}", f"({gold})")[0] == right
    checked = ScriptedJudge(False, '{"Consistency": 1}')
    tag = f"<think>a</think>\n<answer>{said}</answer>"
    assert thyme([conversation({"ground_truth": gold}, say(tag))], judged_by(checked)) == [2.0 if right else 0.5]


@pytest.mark.parametrize(("said", "gold", "right"), MATHS)
def test_a_rule_alone(said, gold, right):
    assert paid(pixel_reasoner, f"\\boxed{{{said}}}", gold)[0] == right
    assert (
        paid(openthinkimg, f'{{"actions": [{{"name": "Terminate", "arguments": {{"ans": "{said}"}}}}]}}', gold)[0]
        == right
    )


@pytest.mark.parametrize(("said", "gold", "right"), WORDS)
def test_words(said, gold, right):
    step = f"<think>a</think><answer>{said}</answer>"
    assert visual_arft([conversation({"ground_truth": f"<answer>{gold}</answer>"}, say(step))]) == [right + 1]
    row = conversation(
        {"ground_truth": gold, "answer_without_tools": "?", "answers_with_tools": {"0": said}},
        say("<answer>0</answer>"),
    )
    assert vista([row], judged_by(None)) == [right]
    listed = conversation(
        {"ground_truth": f"[{gold}, x]", "answer_without_tools": "?", "answers_with_tools": {"0": f"x, {said}"}},
        say("<answer>0</answer>"),
    )
    assert vista([listed], judged_by(None)) == [right]


def test_the_releases_keep_their_own_reading():
    step = "<think>a</think><answer>-5</answer>"
    row = conversation({"ground_truth": "<answer>5</answer>"}, say(step))
    assert visual_arft([row], variant="release") == [2]  # SQuAD's form drops the sign
    tag = "<think>a</think>\n<answer>3/4</answer>"
    checked = ScriptedJudge(False, '{"Consistency": 1}')
    value = thyme([conversation({"ground_truth": "0.75"}, say(tag))], judged_by(checked), variant="release")[0]
    assert value == 2.0 and not checked.checks
