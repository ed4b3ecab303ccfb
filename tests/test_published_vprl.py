"""VPRL's progress reward on a real grid: by hand, by properties, and where the naive reading errs."""

from __future__ import annotations

import numpy as np
import pytest
from grid_world import GridWorld, draw
from hypothesis import given
from hypothesis import strategies as st
from rewards_helpers import image_segment, text, trajectory_of

from record.trajectory import Author
from rewards.contract import RewardContext, RewardError
from rewards.published.vprl import kind_of_step, kinds_of_plan, vprl
from runtime.errors import UserError

# The short way to G is along the top; the wall parts the start from the cell below.
GRID = ["S..", "#.G", "..."]
RECORD = {"grid": GRID}
WORLD = GridWorld()


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ((0, 0), (0, 1), "optimal"),
        ((0, 1), (1, 1), "optimal"),
        ((0, 1), (0, 2), "optimal"),  # two ways, both shortest
        ((0, 1), (0, 0), "other"),
        ((1, 1), (2, 1), "other"),
        ((0, 0), (1, 0), "invalid"),  # into the wall
        ((0, 0), (1, 1), "invalid"),
        ((0, 0), (1, 2), "invalid"),  # nearer to the goal, but no single step: naively +1
        ((0, 0), (0, 0), "invalid"),  # the same image again
        ((0, 0), None, "invalid"),
    ],
)
def test_each_step_by_hand(before, after, kind):
    assert kind_of_step(WORLD, RECORD, before, after) == kind


class Ring:
    """Four places in a ring, the goal at 0; one may also step between 1 and 3, both one step from the goal."""

    def next_states(self, record, state):
        return {0: [1, 3], 1: [0, 2, 3], 2: [1, 3], 3: [0, 2, 1]}[state]

    def distance(self, record, state):
        return {0: 0, 1: 1, 2: 2, 3: 1}[state]


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (2, 1, "optimal"),
        (1, 0, "optimal"),  # 2 to 1, 1 to 0
        (1, 3, "other"),
        (3, 1, "other"),  # 1 to 1: possible, and no step nearer
        (1, 2, "other"),
        (2, 0, "invalid"),
    ],
)
def test_a_step_that_keeps_the_distance_pays_nothing(before, after, kind):
    assert kind_of_step(Ring(), {}, before, after) == kind


def test_nothing_is_judged_after_an_impossible_step():
    assert kinds_of_plan(WORLD, RECORD, [(0, 1), (1, 1), (1, 2)]) == ["optimal"] * 3
    # from where it jumped to, the last step would be a good one
    assert kinds_of_plan(WORLD, RECORD, [(0, 1), (2, 1), (1, 1)]) == ["optimal", "invalid"]
    assert kinds_of_plan(WORLD, RECORD, []) == []


def test_a_goal_that_cannot_be_reached_pays_no_step():
    shut = {"grid": ["S.#", ".#G"]}
    assert kinds_of_plan(WORLD, shut, [(0, 1), (0, 0), (1, 0)]) == ["other"] * 3


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=8))
def test_a_plan_is_optimal_throughout_only_if_it_gets_nearer_each_time(states):
    kinds = kinds_of_plan(WORLD, RECORD, states)
    assert len(kinds) <= len(states) and "invalid" not in kinds[:-1]
    if states and set(kinds) == {"optimal"}:
        assert WORLD.distance(RECORD, states[-1]) == WORLD.distance(RECORD, (0, 0)) - len(states)


def planned(*cells, record=RECORD, images=()):
    drawn = [image_segment("sketch", draw(GRID, *([cell] if cell else []))) for cell in cells]
    return trajectory_of(record, image_segment("prompt", draw(GRID, (0, 0)), Author.USER), *drawn, *images)


def test_over_thoughts():
    context = RewardContext(WORLD)
    other_size = image_segment("sketch", np.zeros((5, 5, 3), np.uint8))
    two_walkers = image_segment("sketch", draw(GRID, (0, 1), (1, 1)))
    rows = [
        planned((0, 1), (1, 1), (1, 2)),
        planned((0, 1), (0, 0), (0, 1)),
        planned((0, 1), None, (1, 1)),
        planned(),
        planned((0, 1), record={}),
        planned((0, 1), images=[other_size]),
        planned(images=[two_walkers]),
        planned(images=[image_segment("observation", draw(GRID, (0, 1)), Author.ENVIRONMENT)]),
    ]
    logged = {}
    assert vprl(rows, context, logged.__setitem__) == [
        {2: 1, 3: 1, 4: 1},
        {2: 1, 3: 0, 4: 1},
        {2: 1, 3: -5},
        -5,
        None,
        {2: 1, 3: -5},
        {2: -5},
        -5,
    ]
    assert logged == pytest.approx({"reached": 1 / 7, "optimal": 7 / 11, "invalid": 3 / 11})
    assert vprl(rows, context, credit="trajectory") == pytest.approx([1, 2 / 3, -2, -5, None, -2, -5, -5])
    assert vprl(rows[:2], context, optimal=2, other=-1) == [{2: 2, 3: 2, 4: 2}, {2: 2, 3: -1, 4: 2}]


def test_words_do_not_matter():
    talked = planned((0, 1))
    talked.segments.insert(2, text("plan", "I jump over the wall"))
    assert vprl([talked], RewardContext(WORLD)) == [{3: 1}]


def test_bad_input_is_named():
    with pytest.raises(RewardError, match="'none' has no function 'first_state'"):
        vprl([planned((0, 1))], RewardContext())
    with pytest.raises(UserError, match="no credit 'all'"):
        vprl([], RewardContext(WORLD), credit="all")
