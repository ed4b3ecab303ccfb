"""Answer comparisons by hand, the place of an answer in a thought, tag texts, and what counts as a tool call."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from published_helpers import IMAGE, conversation, say, tool

from rewards.contract import RewardError
from rewards.functions.answers import answer, answer_of, best, math_agrees
from rewards.functions.comparisons import anls, choice, edit_distance, exact, normalised, number, relaxed, token_f1
from rewards.functions.options import choice_letter
from rewards.functions.text import balanced, blocks, boxed, last_opened, policy_turns, transcript, unwrapped
from rewards.functions.tool_use import ToolCall, returned_images, tool_calls
from runtime.errors import UserError

# ---- comparisons ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "gold", "right"),
    [
        ("3/4", "0.75", True),
        ("\\frac{3}{4}", "3/4", True),
        ("\\boxed{3/4}", "$0.75$", True),
        ("1,000", "1000", True),
        ("41%", "41", True),
        ("x = 5", "5", True),
        ("6", "5", False),
        ("(1, 2)", "(2, 1)", False),
        ("rats", "star", False),  # math-verify alone takes both for the product a*r*s*t
        ("Rats", "rats", True),
        ("red", "7", False),
        ("", "7", False),
        ("\\frac{3", "3/4", False),
        ("\\text{red}", "red", True),
        ("red", "\\text{red}", True),
        ("\\boxed{\\mathrm{Red}}", "red", True),
        ("\\text{New \\textbf{York}}", "New York", True),
        ("\\text{rats}", "star", False),
        ("\\text{red}", "blue", False),
        ("\\text{5 cm}", "5", True),
        ("5\\ \\text{cm}^2", "5", True),
        ("12\\text{ dogs}", "12", True),  # a unit is dropped
        ("\\text{3/4}", "0.75", True),
        ("\\mathbf{x}+\\mathbf{y}", "y+x", True),
    ],
)
def test_math(given_, gold, right):
    assert math_agrees(given_, gold) is right


def test_math_verify_takes_words_for_products():
    """Why words are compared as words: without that an anagram is right."""
    from math_verify import parse, verify

    assert verify(parse("\\boxed{star}"), parse("\\boxed{rats}"))


def test_math_refuses_to_run_without_a_time_limit():
    raised = []

    def run():
        try:
            math_agrees("3/4", "0.75")
        except RewardError as error:
            raised.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert raised and "main thread" in raised[0] and "isolate" in raised[0]


def test_math_that_takes_too_long_is_not_judged(monkeypatch):
    import math_verify
    from math_verify.errors import TimeoutException

    def hang(*args, **kwargs):
        raise TimeoutException("too long")

    monkeypatch.setattr(math_verify, "verify", hang)
    assert math_agrees("2", "3") is None
    assert best(math_agrees, "2", ["3", "4"]) is None
    thought = conversation({"ground_truth": "3"}, say("\\boxed{2}"))
    assert answer([thought], kind="math") == [None]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(c)", "C"),
        ("D) the dog", "D"),
        ("The answer is C.", "C"),
        ("Answer: (A)", "A"),
        ("I think B is right", "B"),
        ("**B**", "B"),
        ("option d", "D"),
        ("A dog is on the left", None),  # the article is no option
        ("B or C", None),
        ("C because of A", None),
        ("red", None),
        ("", None),
        ("Beautiful", None),
        ("I", None),
    ],
)
def test_choice_letter(text, letter):
    assert choice_letter(text) == letter


def test_choice():
    assert choice("(b) a dog", "B") == 1 and choice("C", "B") == 0 and choice("A dog", "A") == 0
    assert choice("two dogs", "Two dogs") == 1  # a reference without a letter


def test_exact_and_f1_by_hand():
    assert normalised("The  Cat, a dog!") == "cat dog"
    assert exact("the cat.", "Cat") == 1 and exact("cats", "cat") == 0
    assert exact("a", "A") == 1 and exact("a", "the") == 0  # nothing but articles
    # 2 of 3 words shared with 2 of 2: P = 2/3, R = 1, F1 = 4/5
    assert token_f1("a big red cat", "red cat") == pytest.approx(0.8)
    # "dog dog" shares one "dog": P = 1/2, R = 1
    assert token_f1("dog dog", "dog") == pytest.approx(2 / 3)
    assert token_f1("", "") == 1 and token_f1("", "dog") == 0


def test_anls_by_hand():
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3
    assert anls("helo", "Hello") == pytest.approx(0.8)  # one of five
    assert anls("abcd", "abxy") == 0  # two of four is a half, which is nothing
    assert anls("abcd", "abcy") == 0.75 and anls("", "") == 1


@pytest.mark.parametrize(
    ("kind", "said", "gold"),
    [
        ("math", "\\text{red}", "red"),
        ("math", "\\text{left}", "left"),
        ("math", "\\mathrm{5 cm}", "5"),
        ("exact", "\\text{New York}", "New York"),
        ("exact", "5\\text{ cm}", "5 cm"),
        ("exact", "red", "\\mbox{red}"),
        ("choice", "\\textbf{b}", "B"),
        ("choice", "\\text{red}", "red"),
        ("f1", "\\text{a red cat}", "red cat"),
        ("anls", "\\textit{hello}", "hello"),
        ("numeric", "\\text{102}", "100"),
        ("numeric", "\\text{red}", "red"),
    ],
)
def test_latex_around_words_costs_nothing(kind, said, gold):
    thoughts = [conversation({"ground_truth": gold}, say(f"so \\boxed{{{said}}}"))]
    assert answer(thoughts, kind=kind) == answer(thoughts, kind=kind, place="boxed") == [1]


def test_numbers_and_relaxed_match():
    assert number("1,234.5") == 1234.5 and number("$-3") == -3 and number("45%") == 45 and number(".5") == 0.5
    assert number("12 dogs") is None and number("1,23") is None and number("1e400") is None and number("") is None
    assert relaxed("105", "100") == 1 and relaxed("95", "100") == 1 and relaxed("105.1", "100") == 0
    assert relaxed("-100", "100") == 0 and relaxed("0.04", "0") == 0 and relaxed("0.0", "0") == 1
    assert relaxed("-96", "-100") == 1 and relaxed("Red", "red") == 1 and relaxed("red", "100") == 0


@examples(0.4)
@given(st.text(max_size=12), st.text(max_size=12))
def test_what_holds_of_any_two_texts(a, b):
    assert edit_distance(a, b) == edit_distance(b, a) <= max(len(a), len(b))
    assert (edit_distance(a, b) == 0) == (a == b)
    for score in (exact, token_f1, anls, relaxed, choice):
        assert 0 <= score(a, b) <= 1
    assert exact(a, a) == 1 and anls(a, a) == 1 and token_f1(a, b) == pytest.approx(token_f1(b, a))


def test_the_best_of_several_references():
    assert best(token_f1, "red cat", ["dog", "red cat", "cat"]) == 1
    assert best(lambda a, g: {"x": None, "y": 1.0}[g], "a", ["x", "y"]) == 1
    assert best(lambda a, g: {"x": None, "y": 0.0}[g], "a", ["x", "y"]) is None


# ---- the place of an answer -----------------------------------------------------------------------------------------


def test_where_the_answer_stands():
    assert answer_of(conversation({}, say("<answer> 3 </answer> no, <answer>4</answer><|im_end|>"))) == "4"
    assert answer_of(conversation({}, say("so \\boxed{\\frac{1}{2}}."))) == "\\frac{1}{2}"
    assert answer_of(conversation({}, say("I count."), say("7", role="answer"))) == "7"
    assert answer_of(conversation({}, say("Thus the answer is 7.\nDone"))) == "7"
    assert answer_of(conversation({}, say("seven"))) == "seven"
    assert answer_of(conversation({}, say("<answer>\\boxed{7}</answer>"))) == "7"
    assert answer_of(conversation({})) is None
    assert answer_of(conversation({}, say("<tool_call>{}</tool_call>"))) is None
    assert answer_of(conversation({}, say("seven")), "tag") is None


def test_an_answer_in_an_observation_is_nobodys():
    thought = conversation(
        {"ground_truth": "7"},
        say("<tool_call>{}</tool_call>"),
        tool("<answer>7</answer>", IMAGE),
        tool("the answer is 7"),
        say("I do not know"),
    )
    assert answer_of(thought) == "I do not know"
    assert answer([thought], kind="math", place="tag") == [0]


def test_the_reward():
    thoughts = [
        conversation({"ground_truth": gold}, say(f"<answer>{said}</answer>"))
        for said, gold in (("B. red", "B"), ("C", ["A", "C"]), ("D", "A"), ("A", None))
    ]
    thoughts += [conversation({"ground_truth": "A"}), conversation({"label": "A"}, say("A"))]
    logged, extra = {}, {}
    assert answer(thoughts, None, logged.__setitem__, extra.__setitem__, kind="choice") == [1, 1, 0, None, 0, None]
    assert logged == {"unanswered": pytest.approx(1 / 6)} and extra["answer"][4] is None
    assert answer(thoughts, gold="label", kind="choice") == [None] * 5 + [1]
    assert answer([conversation({"ground_truth": "100"}, say("108"))], kind="numeric", tolerance=0.1) == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mathe"}, "answer: no kind 'mathe'; did you mean 'math'"),
        ({"place": "tags"}, "no place 'tags'"),
        ({"tolerance": -1}, "tolerance is -1"),
        ({"threshold": 2}, "threshold 2"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        answer([], **options)


# ---- texts ----------------------------------------------------------------------------------------------------------


def test_blocks_and_boxes():
    assert blocks("<a>1</a> <a> 2\n</a> <a>3", "a") == ["1", "2"]
    assert blocks("<a>1 <a>2</a></a>", "a") == ["1 <a>2"]
    assert last_opened("<a>1</a><a>2", "a") == "2" and last_opened("1</a>", "a") is None
    assert balanced("", "a") and not balanced("", "a", needed=True) and not balanced("<a></a></a>", "a")
    assert boxed("\\boxed{\\frac{3}{4}} and \\boxed{}, \\boxed{1") == ["\\frac{3}{4}", ""]
    assert boxed("\\boxed{\\{1\\}}") == ["\\{1\\}"]
    assert unwrapped("\\text {red}, \\textbf{\\mathrm{a} b}") == "red, a b"
    assert unwrapped("\\frac{1}{2} \\texture{x} \\text{open") == "\\frac{1}{2} \\texture{x} \\text{open"


def test_turns_leave_out_what_others_wrote():
    drawn = say("", role="sketch")
    drawn.image = np.zeros((2, 2, 3), np.uint8)
    thought = conversation({}, say("one "), drawn, say("more"), tool("seen", IMAGE), say("two"))
    assert policy_turns(thought) == ["one more", "two"]
    assert transcript(thought, "<image>") == "one <image>moreseentwo"
    assert transcript(conversation({})) == ""


# ---- tool calls -----------------------------------------------------------------------------------------------------

CALL = "<tool_call>{}</tool_call>"


@pytest.mark.parametrize(
    ("segments", "calls"),
    [
        ((say("hello"),), []),
        ((say(CALL), tool("crop", IMAGE)), [ToolCall(1, True, True)]),
        ((say("{}", role="tool_call"), tool("Error: no such tool")), [ToolCall(1, False, False)]),
        (
            (
                say(CALL),
                tool("<|im_end|>\n<|im_start|>user\n"),
                tool("<tool_response>Execution error: small</tool_response>"),
            ),
            [ToolCall(1, False, False)],
        ),
        (
            (say(CALL), tool("42"), say("<code>1/0</code>"), tool("Traceback (most recent call last)")),
            [ToolCall(1, True, False), ToolCall(3, False, False)],
        ),
        (
            (say(CALL + CALL), tool("one", IMAGE), tool("error: two")),
            [ToolCall(1, True, True), ToolCall(1, False, False)],
        ),
        ((say(CALL),), [ToolCall(1, False, False)]),  # cut off before it was answered
        ((say("<tool_call>{}"), tool("x")), []),  # never closed: no call
        ((tool("crop", IMAGE), say("I write of a " + "tool_call")), []),  # an image that nobody called for
        ((say("I saw an error"), tool(CALL)), []),  # what the environment writes is no call
    ],
)
def test_tool_calls(segments, calls):
    assert tool_calls(conversation({}, *segments)) == calls


def test_returned_images_are_the_environments():
    drawn = say("", role="sketch")
    drawn.image = IMAGE
    assert returned_images(conversation({}, tool("", IMAGE), drawn, say(CALL), tool("", IMAGE))) == 1
