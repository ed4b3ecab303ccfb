"""OpenThinkIMG's reward: by hand, over thoughts, and where the naive reading errs."""

from __future__ import annotations

import json

import pytest
from rewards_helpers import text, trajectory_of

from record.trajectory import Author
from rewards.published.openthinkimg import (
    accuracy_release,
    answer_in,
    format_release,
    object_in,
    openthinkimg,
    well_formed,
)
from runtime.errors import UserError


def turn(*actions, thought="look"):
    return json.dumps({"thought": thought, "actions": [{"name": n, "arguments": a} for n, a in actions]})


OCR, END = ("OCR", {"image": "img_1"}), ("Terminate", {"ans": "Lisbon"})


@pytest.mark.parametrize(
    ("last", "gold", "ours", "release"),
    [
        (turn(END), "Lisbon", 1, 1),
        (turn(END), "<answer> Lisbon </answer>", 1, 1),
        (turn(END), "Oslo", 0, 0),
        (turn(("Terminate", {"ans": "lisbon"})), "Lisbon", 1, 0),  # the release compares letter by letter
        (turn(("Terminate", {"ans": "0.5"})), "1/2", 1, 1),
        ("Lisbon", "Lisbon", 1, 1),
        (turn(OCR, END), "Lisbon", 1, 0),  # the release reads the first action only
        (turn(("OCR", {"ans": "Lisbon"})), "Lisbon", 0, 1),  # whatever that action is
        (turn(OCR, thought="I count 7."), "7", 0, 1),  # and takes a number in the thought for the answer
        (turn(("Terminate", {"ans": 7})), "7", 1, 1),
        (turn(("Terminate", {"answer": "Lisbon"})), "Lisbon", 0, 0),
        (turn(), "Lisbon", 0, 0),
        (turn(END)[:-3], "Lisbon", 0, 0),
        ("", "Lisbon", 0, 0),
        (f"First: {turn(END)} and done.", "Lisbon", 1, 1),
        (turn(END, thought="{a {b {c {d {e}}}}}"), "Lisbon", 1, 1),
    ],
)
def test_accuracy_by_hand(last, gold, ours, release):
    row = trajectory_of({"ground_truth": gold}, text("answer", last))
    assert openthinkimg([row]) == [ours]
    assert accuracy_release([turn(OCR), last], gold) == release
    if last:
        assert openthinkimg([row], variant="release") == [release]


@pytest.mark.parametrize(
    ("last", "ours", "release"),
    [
        (turn(END), True, 1),
        ('{"thoughts": "x"}', True, 1),
        ('{"actions": []}', True, 1),
        ('{"other": 1}', False, 0),
        ("plain", False, 0),
        ("{'thought': 'x'}", False, 0),
        ("{broken} " + turn(END), True, 0),
        (turn(END, thought="{a {b {c {d {e}}}}}"), True, 0),  # brackets in a thought are no deeper object
    ],
)
def test_form_by_hand(last, ours, release):
    assert well_formed(last) is ours and format_release([last]) == release


def test_form_is_a_share_of_turns_and_the_release_stops_without_a_list():
    assert format_release([turn(OCR), "plain", turn(END)]) == pytest.approx(2 / 3)
    assert format_release(None, "done\nTerminate\n") == 1 and format_release(None, "done") == 0
    with pytest.raises(TypeError):
        accuracy_release(None, "Lisbon")


def test_reading():
    assert object_in('a { b {"c": {"d": 1}} {"e": 2}') == {"c": {"d": 1}}
    assert object_in("{" * 2000) is None
    assert answer_in('{"actions": "Terminate"}') is None
    assert answer_in('{"actions": [3, {"name": "Terminate"}]}') is None
    assert answer_in("  Lisbon ") == "Lisbon" and answer_in("") is None
    assert answer_in('{"thought": "cut off') is None  # what was to be an object is no answer


def test_over_thoughts():
    observed = text("observation", 'OBSERVATION: {"thought": "x", "actions": []} Lisbon', Author.ENVIRONMENT)
    rows = [
        trajectory_of({"ground_truth": "Lisbon"}, text("tool_call", turn(OCR)), observed, text("answer", turn(END))),
        trajectory_of({"ground_truth": "Lisbon"}, text("tool_call", "no object"), observed, text("answer", turn(END))),
        trajectory_of({"ground_truth": ["Porto", "Lisbon"]}, text("answer", turn(END) + "<|im_end|>")),
        trajectory_of({"ground_truth": "Lisbon"}, text("tool_call", turn(OCR)), observed),
        trajectory_of({}, text("answer", turn(END))),
        trajectory_of({"ground_truth": "Lisbon"}),
    ]
    assert openthinkimg(rows) == [1, 1, 1, 0, None, 0]
    # the mean over the policy's turns alone: the observation's object counts for nothing
    assert openthinkimg(rows, format=1.0) == [2, 1.5, 2, 1, None, 0]


def test_bad_input_is_named():
    with pytest.raises(UserError, match="no variant 'paper'"):
        openthinkimg([], variant="paper")
    with pytest.raises(UserError, match="none may be negative"):
        openthinkimg([], format=-1)
