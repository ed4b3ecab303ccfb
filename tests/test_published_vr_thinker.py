"""VR-Thinker's gain over rounds and exploration: by hand, by properties, over groups of thoughts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewards_helpers import image_segment, text, trajectory_of

from record.trajectory import Author
from rewards.contract import RewardError
from rewards.published.vr_thinker import accuracy, exploration, gain, judgement, vr_thinker, well_formed
from runtime.errors import UserError

FRAMES = np.zeros((4, 4, 3), np.uint8)
GOLD = {"OA": 2, "TA": 2, "MQ": 0}


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ({"OA": 2, "TA": 2, "MQ": 0}, 1),
        ({"OA": 2, "TA": 1, "MQ": 1}, 0.5),
        ({"OA": 1, "TA": 2, "MQ": 0}, 0.5),
        ({"OA": 2, "TA": 2}, 0.75),  # a dimension that is not judged is wrong, not left out
        ({}, 0),
        ({"OA": 2, "TA": 2, "MQ": 0, "CF": 3}, 1),
    ],
)
def test_accuracy_by_hand(said, value):
    assert accuracy(said, GOLD) == value


def test_accuracy_without_dimensions_is_the_overall_judgement():
    assert accuracy({"OA": 1}, {"OA": 1}) == 1 and accuracy({"OA": 1}, {"OA": 2, "CF": 1}) == 0
    assert accuracy({"OA": 2}, GOLD, alpha=1) == 1


@pytest.mark.parametrize(
    ("rounds", "value"),
    [
        ([0.25, 0.75], 0.1),
        ([0.75, 0.25], -0.1),
        ([0.5], 0),
        ([], 0),
        # paying every rise and forgiving every fall would give 0.3: to err first and mend it would pay
        ([0.5, 0, 1, 0, 0.5], 0),
        ([0.5, None, 1], 0.1),
        ([None, 1], 0),
        ([0.5, None], -0.1),
    ],
)
def test_gain_by_hand(rounds, value):
    assert gain(rounds) == pytest.approx(value)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_only_the_first_and_the_last_judgement_matter(rounds):
    assert gain(rounds, k=1) == pytest.approx(rounds[-1] - rounds[0])


@pytest.mark.parametrize(
    ("looked", "values"),
    [
        ([True] + [False] * 7, [0.075] + [0] * 7),  # 0.2 - 1/8
        ([True, True, False, False], [0] * 4),
        ([False] * 4, [0] * 4),  # 0.2 for nobody, and none for not looking
        ([], []),
    ],
)
def test_exploration_by_hand(looked, values):
    assert exploration(looked) == pytest.approx(values)


@given(st.lists(st.booleans(), max_size=16), st.floats(0, 1))
def test_exploration_pays_only_those_that_looked_and_only_below_the_share(looked, omega):
    values = exploration(looked, omega)
    assert all(0 <= value <= omega and (one or value == 0) for one, value in zip(looked, values, strict=True))
    if looked and sum(looked) / len(looked) >= omega:
        assert not any(values)


def said(overall, alignment, quality):
    return f"TA = {alignment}, MQ = {quality}, OA = {overall}, CF = 2"


def look(judged, tag="recommend answer"):
    return (
        f"<snapshot>a boy</snapshot><think>unsure</think><{tag}>{judged}</{tag}>"
        '<tool_call>{"name": "select_frames"}</tool_call>'
    )


def end(judged):
    return f"<snapshot>a boy</snapshot>\n<think>sure</think>\n<answer> {judged} </answer>"


def test_reading_and_form():
    assert judgement(end(said(2, 1, 0)), True) == {"TA": 1, "MQ": 0, "OA": 2, "CF": 2}
    assert judgement(look(said(1, 1, 1)), False)["OA"] == 1
    assert judgement(look(said(1, 1, 1)), True) is None and judgement("OA = 1", True) is None
    assert well_formed([look(said(1, 1, 1)), end(said(2, 1, 0))], GOLD)
    assert well_formed([look(said(1, 1, 1), "Recommend Answer"), end(said(2, 1, 0))], GOLD)
    assert not well_formed([end(said(2, 1, 0)).replace("snapshot", "note")], GOLD)
    assert not well_formed([end("OA = 2, TA = 1")], GOLD)  # MQ is not judged
    assert not well_formed([end(said(3, 1, 0))], GOLD) and not well_formed([], GOLD)
    assert not well_formed([look(said(1, 1, 1))], GOLD)  # it ends without an answer


def judged(*turns, gold=GOLD, group=0, seen=True):
    segments = []
    for turn in turns:
        segments += [
            text("answer", turn),
            image_segment("observation", FRAMES, Author.ENVIRONMENT)
            if seen
            else text("observation", "Error: no such frame", Author.ENVIRONMENT),
        ]
    return trajectory_of({"ground_truth": gold} if gold else {}, *segments[:-1], group=group)


def test_over_a_group():
    rows = [
        judged(look(said(2, 1, 1)), end(said(2, 2, 0))),  # 0.5 then 1
        *[judged(end(said(2, 2, 0))) for _ in range(6)],
        judged(end("OA = 2"), gold=None),
    ]
    # form 1 + accuracy 1 + gain 0.2 * 0.5 + exploration 0.5 * (0.2 - 1/8)
    assert vr_thinker(rows) == [pytest.approx(2.1375), *[2] * 6, None]
    apart = [*rows[:1], *[judged(end(said(2, 2, 0)), group=1) for _ in range(7)]]
    assert vr_thinker(apart)[0] == pytest.approx(2.1)  # alone in its group, all of the group looked


def test_a_call_that_failed_is_no_look_and_a_cut_off_thought_is_wrong():
    failed = judged(look(said(2, 1, 1)), end(said(2, 2, 0)), seen=False)
    rest = [judged(end(said(2, 2, 0))) for _ in range(7)]
    assert vr_thinker([failed, *rest])[0] == pytest.approx(2.1)
    cut = judged(look(said(2, 2, 0)), "<snapshot>a boy")
    assert vr_thinker([cut, *rest])[0] == pytest.approx(-0.2 + 0.5 * 0.075)  # it was right, and did not say so


@pytest.mark.parametrize("gold", ["2", {"TA": 1}, {"OA": 5}])
def test_a_reference_that_is_no_judgement_is_named(gold):
    with pytest.raises(RewardError, match="it must be"):
        vr_thinker([judged(end(said(2, 2, 0)), gold=gold)])


def test_options_are_checked_before_anything_is_scored():
    with pytest.raises(UserError, match="omega is 2"):
        vr_thinker([], omega=2)
    with pytest.raises(UserError, match="eta -1"):
        vr_thinker([], eta=-1)
