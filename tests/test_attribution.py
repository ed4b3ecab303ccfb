"""Contributions to a gain: by hand, and that they always add up."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.attribution import LARGEST_TERM, attribute
from rewards.credit import mean_shares, role_shares
from rewards.formula.expression import Expression, ExpressionError
from tests.rewards_helpers import text, trajectory_of


def contributions(formula, before, after, groups=None):
    names = sorted({name for row in (*before, *after) for name in row})
    found = attribute(Expression(formula, names), before, after, groups)
    total = found.rest + sum(found.by_name.values(), np.zeros(len(before)))
    assert total == pytest.approx(found.difference, abs=1e-9)
    return {name: list(values) for name, values in found.by_name.items()}, list(found.rest)


def test_of_a_weighted_sum_it_is_weight_times_change():
    by_name, rest = contributions("0.5 * a - 2 * b + 7", [{"a": 1, "b": 3}], [{"a": 2, "b": 5}])
    assert by_name == {"a": [0.5], "b": [-4.0]} and rest == [0.0]


def test_of_a_product_it_is_the_change_times_the_mean_of_the_other():
    # 1 * 3 -> 2 * 5 gains 7: a's change 1 times (3 + 5) / 2, b's change 2 times (1 + 2) / 2.
    by_name, _ = contributions("a * b", [{"a": 1, "b": 3}], [{"a": 2, "b": 5}])
    assert by_name == {"a": [4.0], "b": [3.0]}


def test_three_parts_by_all_six_orders():
    before, after = {"a": 1, "b": 1, "c": 0}, {"a": 2, "b": 3, "c": 1}
    by_name, _ = contributions("a * b * c", [before], [after])
    # c first or alone decides: orders abc, bac: c adds 6; acb: c adds 2, b 4; cab: c 1, a 1, b 4; bca: c 3, a 3;
    # cba: c 1, b 2, a 3.
    assert by_name["c"] == [pytest.approx((6 + 6 + 2 + 1 + 3 + 1) / 6)]
    assert by_name["b"] == [pytest.approx((0 + 0 + 4 + 4 + 0 + 2) / 6)]
    assert by_name["a"] == [pytest.approx((0 + 0 + 0 + 1 + 3 + 3) / 6)]


def test_a_condition_that_has_no_value_in_between_goes_to_the_rest():
    before, after = {"a": None, "b": None, "c": 1.0}, {"a": 4.0, "b": 1.0, "c": None}
    by_name, rest = contributions("a if judged(b) else c", [before], [after])
    assert by_name == {"a": [0.0], "b": [0.0], "c": [0.0]} and rest == [3.0]
    # A division by zero in between likewise, and only in its row.
    by_name, rest = contributions(
        "1 / (a + b)", [{"a": 1, "b": -2}, {"a": 1, "b": 0}], [{"a": 2, "b": 2}, {"a": 2, "b": 0}]
    )
    assert rest == [pytest.approx(0.25 + 1), 0.0] and by_name["a"] == [0.0, pytest.approx(-0.5)]


def test_a_formula_over_groups_changes_with_all_of_its_group():
    # b is worth what it is above its group's mean: rows 1 and 3 of a group, mean 2 -> 0 and 3, mean 1.5.
    by_name, rest = contributions(
        "a + b - group_mean(b)",
        [{"a": 0, "b": 1}, {"a": 0, "b": 3}],
        [{"a": 1, "b": 0}, {"a": 1, "b": 3}],
        [[0, 1]],
    )
    assert by_name["a"] == [1, 1] and by_name["b"] == [pytest.approx(-0.5), pytest.approx(0.5)] and rest == [0, 0]


FORMULAS = [
    "a * b + 0.3 * c",
    "min(a, b) * (1 + 0.5 * coalesce(d, 0)) - c ** 2",
    "a if b > 0.5 else b * c",
    "clip(a + b * c, -1, 1) + group_mean(a) * b",
    "(a > 0.2 and b > 0.1) + abs(c - a) * 3",
    "coalesce(d, c) * a - -b",
]
NUMBER = st.floats(-2, 2).map(lambda x: round(x, 3))
ROW = st.fixed_dictionaries({"a": NUMBER, "b": NUMBER, "c": NUMBER, "d": NUMBER | st.none()})


@settings(max_examples=40)
@given(st.sampled_from(FORMULAS), st.lists(st.tuples(ROW, ROW), min_size=1, max_size=4))
def test_contributions_add_up_whatever_the_formula(formula, rows):
    before, after = (list(side) for side in zip(*rows, strict=True))
    contributions(formula, before, after, [list(range(len(rows)))])


@settings(max_examples=20)
@given(ROW, ROW)
def test_what_did_not_change_contributes_nothing(before, after):
    by_name, _ = contributions("a * b * (1 + c)", [before], [{**after, "b": before["b"]}])
    assert by_name["b"] == [pytest.approx(0.0, abs=1e-9)]


def test_a_term_of_many_parts_still_adds_up():
    names = [f"p{number}" for number in range(LARGEST_TERM + 2)]
    by_name, rest = contributions(
        " * ".join(names), [dict.fromkeys(names, 1.0)], [{name: 1 + 0.1 * n for n, name in enumerate(names)}]
    )
    assert rest == [pytest.approx(0.0, abs=1e-9)] and by_name["p0"] == [0.0] and by_name["p9"][0] > by_name["p1"][0] > 0


def test_a_formula_without_a_value_is_refused():
    with pytest.raises(ExpressionError, match="has no value of some rows"):
        attribute(Expression("a", ["a"]), [{"a": None}], [{"a": 1.0}])


# ---- by role ------------------------------------------------------------------------------------------------------


def test_the_shares_of_roles_add_up_to_the_parts_value():
    thought = trajectory_of({}, text("sketch", ""), text("inspect", ""), text("redraw", ""), text("inspect", ""))
    thought.segment_rewards = {"images": {1: 1.0, 3: 0.5}, "critique": {2: 0.4, 4: None}}
    thought.info["rewards"] = {"seen": {"segments": {"2": 1.0}}, "plain": {"reason": "none"}}
    assert role_shares(thought) == {
        "images": {"sketch": 0.5, "redraw": 0.25},
        "critique": {"inspect": 0.4},
        "seen": {"inspect": 1.0},
    }
    other = trajectory_of({}, text("sketch", ""))
    other.segment_rewards = {"images": {1: 0.0}}
    assert mean_shares([thought, other])["images"] == {"sketch": 0.25, "redraw": 0.125}
    assert math.fsum(mean_shares([thought])["images"].values()) == 0.75
