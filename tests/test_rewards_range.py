"""Rewards beyond what can be added up or trained on: a sentence that names the part, never a traceback."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards.config import RewardsConfig
from rewards.contract import RewardError, TrainerState, call, is_broken
from rewards.formula import groupwise
from rewards.formula.expression import Expression, ExpressionError
from rewards.formula.schedule import ScheduleConfig
from rewards.limits import LARGEST, mean_or_nan
from rewards.manager import RewardManager
from rewards.samples import sample_thoughts
from rl.advantages import compute_advantages
from rl.config import GrpoConfig
from runtime.errors import UserError
from tests.rewards_helpers import text, trajectory_of


def returned(value):
    thoughts = [trajectory_of({}, text("plan", "a"))]
    return call(lambda **_: [value], "h", thoughts, options={}, state=TrainerState(), view="interleaved")[0][0]


@pytest.mark.parametrize(
    "value, told",
    [
        (1e308, r"1e\+308"),
        (-1e308, r"-1e\+308"),
        (1.01e18, r"1.01e\+18"),
        ({0: 1e308}, r"1e\+308"),
        (10**400, r"a number beyond every float \(int\)"),
        (-(10**400), r"a number beyond every float \(int\)"),
        pytest.param(10**5000, r"a number beyond every float \(int\)", id="more digits than Python writes out"),
        (Fraction(10**400), r"a number beyond every float \(Fraction\)"),
    ],
)
def test_a_value_past_what_can_be_trained_on_names_its_part(value, told):
    with pytest.raises(RewardError, match=rf"^reward 'h' returned {told} for a completion; at most 1e\+18 can be"):
        returned(value)


@pytest.mark.parametrize(
    "value",
    [torch.ones(2), np.ones(2), "much", [1.0], object(), "0.5", b"1", "nan", {0: "0.5"}, np.str_("1"), np.array("1")],
)
def test_what_is_no_number_names_its_part(value):
    with pytest.raises(RewardError, match=r"(?s)^reward 'h' returned .*; a value is a number, None, or {segment: "):
        returned(value)


def test_a_long_value_is_shown_in_part():
    with pytest.raises(RewardError, match=r"returned '1{76}\.\.\. for a completion"):
        returned("1" * 1000)


def test_what_can_be_trained_on_is_taken():
    assert returned(1e18) == 1e18 and returned(-(10**18)) == -1e18
    assert is_broken(returned(math.inf)) and is_broken(returned(math.nan))  # retried, then None


@pytest.fixture
def judged(tmp_path):
    """Judge two groups of four by own.py's `h`, which gives what it is told."""
    (tmp_path / "own.py").write_text(
        "def h(completions, value=1.0, metric=None, log_metric=None, **columns):\n"
        "    for m in [] if metric is None else [float(x) for x in metric]:\n"
        "        log_metric('m', m)\n"
        "    return [float(value) * (-1) ** i for i in range(len(completions))]\n"
    )

    def judge(total="h", **options):
        thoughts = sample_thoughts()
        groups = [[t for t in thoughts if t.group == g] for g in (0, 1)]
        part = {"function": f"{tmp_path}/own.py:h", "options": options, "retries": 0}
        with RewardManager(RewardsConfig.model_validate({"parts": {"h": part}, "total": total})) as manager:
            return manager.score(groups, 1), groups

    return judge


def test_a_step_of_huge_rewards_is_a_sentence(judged):
    """fsum raised OverflowError here: "intermediate overflow in fsum"."""
    with pytest.raises(UserError, match=r"reward 'h' returned 1e\+308 for a completion"):
        judged(value="1e308")


@pytest.mark.parametrize(
    "total, words",
    [
        ("h * 1e300", r"rewards.total: 'h \* 1e300' is 1e\+300, beyond the 1e\+18 .* trajectory 0-0 \(h = 1.0\)"),
        ("h * 1e300 * 1e300", r"leaves the finite numbers for trajectory 0-0 \(h = 1.0\)"),
        (
            "h - group_mean(abs(h) * 1.5e308)",
            r"'group_mean\(abs\(h\) \* 1.5e\+?308\)' leaves the finite numbers, over values from 1.5",
        ),
        (
            "group_std(h * 1e200) > 0",
            r"'group_std\(h \* 1e\+?200\)' leaves the finite numbers, over values from -1e\+200",
        ),
        ("batch_std(h * 1.5e308) * 0", "leaves the finite numbers"),
        ("h / (h - h)", r"divides by zero for trajectory 0-0 \(h = 1.0\)"),
    ],
)
def test_a_total_past_its_bounds_is_a_sentence(judged, total, words):
    with pytest.raises(ExpressionError, match=words) as caught:
        judged(total)
    assert "h" in str(caught.value)


@pytest.mark.parametrize("metric", [["1e308", "1e308"], ["inf", "-inf"], ["nan"], ["1e300"]])
def test_what_a_reward_logs_stops_nothing(judged, metric):
    report, groups = judged(metric=metric)
    assert math.isnan(report.metrics["reward/h/m"]) and report.judged == 8
    assert groups[0][0].reward == 1.0


def test_the_largest_rewards_make_finite_advantages(judged):
    report, groups = judged(value="1e18")
    assert report.metrics["reward/mean"] == 0 and report.metrics["reward/std"] == 1e18
    for level in ("group", "batch", "none"):
        ledger = compute_advantages(groups, GrpoConfig(scale_rewards=level))
        assert len(ledger.trained) == 2
        squares = [float((t.advantage_S.astype(np.float32) ** 2).sum()) for g in groups for t in g]
        assert all(math.isfinite(square) for square in squares)


@given(
    st.sampled_from(groupwise.NAMES),
    st.lists(st.none() | st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=6),
)
def test_no_groupwise_function_raises_more_than_its_sentence(name, values):
    formula = Expression(f"group_{name}(x) * 0", ["x"])
    rows = list(range(len(values)))
    try:
        found = formula.rows([{"x": value} for value in values], [rows])
    except ExpressionError as error:
        assert "leaves the finite numbers" in str(error)
    else:
        assert all(value is None or value == 0 for value in found)


def test_schedules_are_bounded():
    for at in ({0: 1e19}, {0: -math.inf}, {2**60: 1}, {10**400: 1.0}):
        with pytest.raises(ValueError):
            ScheduleConfig.model_validate(at)
    steep = ScheduleConfig.model_validate({0: -LARGEST, 2**53: LARGEST})
    assert steep.value(2**52) == 0.0 and steep.value(2**53 + 1) == LARGEST


def test_means_of_what_is_logged():
    assert mean_or_nan([1.0, 3.0]) == 2.0
    assert mean_or_nan([1.0, 3.0], [3, 1]) == 1.5
    assert mean_or_nan([1.0, 3.0], [0, 0]) == 2.0
    for values in ([], [math.inf, 1.0], [1e308, 1e308], [math.nan]):
        assert math.isnan(mean_or_nan(values))
