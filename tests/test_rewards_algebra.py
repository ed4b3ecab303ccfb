"""The algebra over parts: functions over the group and the step, schedules, gates, watched parts, the printed tree."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from pydantic import ValidationError
from rewards_helpers import text, trajectory_of

from rewards.config import RewardsConfig
from rewards.formula import groupwise
from rewards.formula.expression import Expression, ExpressionError
from rewards.formula.schedule import ScheduleConfig
from rewards.manager import RewardManager
from rewards.tree import lines

PARTS = ("a", "b")
GROUPS = [[0, 1, 2], [3, 4]]
ROWS = [{"a": a, "b": b} for a, b in [(1.0, 1.0), (3.0, None), (None, 0.0), (10.0, 0.0), (10.0, 5.0)]]
relaxed = examples(0.6)


def rows(formula, parts=ROWS, groups=GROUPS):
    return Expression(formula, PARTS).rows(parts, groups)


# ---- over the group and the step ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (
            "group_mean(a)",
            [2, 2, 2, 10, 10],
        ),  # the None leaves the mean; the row that has it gets the mean all the same
        ("a - group_mean(a)", [-1, 1, None, 0, 0]),
        ("group_std(a)", [1, 1, 1, 0, 0]),  # divisor n: of 1 and 3, sqrt(((-1)^2 + 1^2) / 2)
        ("group_max(a) - group_min(a)", [2, 2, 2, 0, 0]),
        ("group_count(b)", [2, 2, 2, 2, 2]),
        ("group_any(a > 2)", [1, 1, 1, 1, 1]),
        ("group_all(a > 2)", [0, 0, 0, 1, 1]),
        ("group_share(b > 0)", [0.5, 0.5, 0.5, 0.5, 0.5]),
        ("group_rank(a)", [0, 1, None, 0.5, 0.5]),  # a tie of two: half of the one other
        ("batch_mean(a)", [6] * 5),
        ("batch_rank(a)", [0, 1 / 3, None, 2.5 / 3, 2.5 / 3]),  # 10 and 10: two are lower, the equal one counts half
        ("batch_share(b > 0)", [0.5] * 5),
        ("batch_max(group_mean(a))", [10] * 5),
        ("group_mean(a - group_mean(a))", [0, 0, 0, 0, 0]),
        ("group_mean(a if b > 0 else 0)", [0.5, 0.5, 0.5, 5, 5]),
        ("a if group_share(b > 0) < 0.6 else 0", [1, 3, None, 10, 10]),
        ("coalesce(a, group_mean(a))", [1, 3, 2, 10, 10]),
        ("judged(a) + judged(b)", [2, 1, 1, 2, 2]),
    ],
)
def test_by_hand(formula, expected):
    assert rows(formula) == pytest.approx(expected, nan_ok=False)


def test_where_nobody_is_judged_there_is_no_value_but_a_count():
    nobody = [{"a": None, "b": 1.0}] * 2
    for name in groupwise.NAMES:
        assert rows(f"group_{name}(a)", nobody, [[0, 1]]) == ([0, 0] if name == "count" else [None, None]), name


def test_alone_in_its_group():
    assert rows("group_rank(a)", [{"a": 7.0, "b": 0.0}], [[0]]) == [0.5]
    assert Expression("a - group_mean(a)", PARTS)({"a": 7.0, "b": None}) == 0


NUMBERS = st.one_of(st.none(), st.floats(-100, 100), st.sampled_from([0.0, 1.0]))


@st.composite
def steps(draw):
    """Parts of some trajectories, in groups of any size."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    parts = [{"a": draw(NUMBERS), "b": draw(NUMBERS)} for _ in range(sum(sizes))]
    groups, at = [], 0
    for size in sizes:
        groups.append(list(range(at, at + size)))
        at += size
    return parts, groups


def python(parts, groups):
    """Every groupwise function, written down directly."""
    result = {f"{over}_{name}": [None] * len(parts) for over in groupwise.OVER for name in groupwise.NAMES}
    for over, members in (("group", groups), ("batch", [range(len(parts))])):
        for group in members:
            x = [parts[row]["a"] for row in group if parts[row]["a"] is not None]
            values = {"count": len(x)}
            if x:
                values |= {
                    "mean": statistics.fmean(x),
                    "std": statistics.pstdev(x),
                    "min": min(x),
                    "max": max(x),
                    "any": float(any(x)),
                    "all": float(all(x)),
                    "share": sum(v != 0 for v in x) / len(x),
                }
            for row in group:
                for name, value in values.items():
                    result[f"{over}_{name}"][row] = value
                mine = parts[row]["a"]
                if mine is not None:
                    order = sorted(x)
                    first, last = order.index(mine), len(order) - 1 - order[::-1].index(mine)
                    result[f"{over}_rank"][row] = (first + last) / 2 / (len(x) - 1) if len(x) > 1 else 0.5
    return result


@relaxed
@given(steps())
def test_every_function_agrees_with_python(step):
    parts, groups = step
    for function, expected in python(parts, groups).items():
        assert rows(f"{function}(a)", parts, groups) == pytest.approx(expected, abs=1e-9), function


@relaxed
@given(steps(), st.sampled_from(groupwise.FUNCTIONS))
def test_an_unjudged_row_moves_nobody_elses_value(step, function):
    parts, groups = step
    without = [row for group in groups for row in group if parts[row]["a"] is not None]
    place = {row: at for at, row in enumerate(without)}
    kept = [[place[row] for row in group if row in place] for group in groups]
    whole = rows(f"{function}(a)", parts, groups)
    assert [whole[row] for row in without] == rows(f"{function}(a)", [parts[row] for row in without], kept)


STRICT = (
    "a + b",
    "a * b - a",
    "min(a, b)",
    "max(a, b, 0)",
    "clip(a, b - 200, b + 200)",
    "abs(a) < abs(b)",
    "a == b or a > 3",
    "not (a and b)",
    "a if b > 0 else -a",
)


@relaxed
@given(NUMBERS, NUMBERS, st.sampled_from(STRICT), st.floats(-5, 5))
def test_none_spreads_until_coalesce_turns_it_into_a_number(a, b, formula, default):
    value = Expression(formula, PARTS)({"a": a, "b": b})
    assert (value is None) == (a is None or b is None)
    instead = Expression(f"coalesce({formula}, {default})", PARTS)({"a": a, "b": b})
    assert instead == (default if value is None else value)
    assert Expression(f"judged({formula})", PARTS)({"a": a, "b": b}) == (value is not None)
    if value is not None:  # what is left over is plain Python
        names = {"a": a, "b": b, "clip": lambda x, low, high: min(max(x, low), high)}
        assert value == float(eval(formula, {"min": min, "max": max, "abs": abs}, names))


@relaxed
@given(steps())
def test_a_formula_with_all_of_it_agrees_with_python(step):
    parts, groups = step
    known = python(parts, groups)
    formula = "(a - group_mean(a)) / (group_std(a) + 1) + (coalesce(b, 2) if group_share(a) >= 0.5 else batch_max(a))"
    expected = []
    for row, part in enumerate(parts):
        mean, std, share, most = (known[f][row] for f in ("group_mean", "group_std", "group_share", "batch_max"))
        if part["a"] is None or share is None:
            expected.append(None)
            continue
        tail = (2 if part["b"] is None else part["b"]) if share >= 0.5 else most
        expected.append((part["a"] - mean) / (std + 1) + tail)
    assert rows(formula, parts, groups) == pytest.approx(expected, abs=1e-6)


@relaxed
@given(steps(), st.randoms())
def test_the_order_of_the_groups_changes_nothing(step, random):
    parts, groups = step
    shuffled = random.sample(groups, len(groups))
    formula = "group_rank(a) + batch_share(a > 0) if judged(b) else group_std(b)"
    assert rows(formula, parts, shuffled) == rows(formula, parts, groups)


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("group_median(a)", "no function 'group_median'; did you mean 'group_mean'"),
        ("group_mean(a, b)", "group_mean takes 1 plain argument"),
        ("group_mean", "no reward part 'group_mean'"),
        ("1 / group_std(a)", r"divides by zero for trajectory 0-3 \(.*group_std\(a\) = 0.0"),
    ],
)
def test_a_wrong_formula_is_named(formula, message):
    with pytest.raises(ExpressionError, match=message):
        Expression(formula, PARTS).rows(ROWS, GROUPS, [f"0-{row}" for row in range(5)])


# ---- schedules ----------------------------------------------------------------------------------------------------


def test_a_linear_schedule_by_hand():
    schedule = ScheduleConfig.model_validate({100: 0.2, 0: 1.0})
    assert [schedule.value(step) for step in (0, 50, 100, 1000)] == pytest.approx([1, 0.6, 0.2, 0.2])
    assert ScheduleConfig(at={10: 2.0, 20: 4.0}).value(0) == 2  # before the first step


def test_a_schedule_by_steps():
    schedule = ScheduleConfig(kind="steps", at={0: 0.0, 50: 1.0})
    assert [schedule.value(step) for step in (0, 49, 50, 51)] == [0, 0, 1, 1]


@relaxed
@given(st.dictionaries(st.integers(0, 50), st.floats(-10, 10), min_size=1, max_size=5), st.integers(0, 60))
def test_a_schedule_stays_between_its_values(at, step):
    for kind in ("linear", "steps"):
        value = ScheduleConfig(at=at, kind=kind).value(step)
        assert min(at.values()) - 1e-9 <= value <= max(at.values()) + 1e-9
        if step in at:
            assert value == pytest.approx(at[step])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"w": {}}, "Field required"),
        ({"w": {"at": {}}}, "at least 1 item"),
        ({"w": {-1: 2}}, "comes before the run"),
        ({"w": {"at": {0: 1}, "kind": "cosine"}}, "linear"),
        ({"w": {0: math.nan}}, "finite"),
        ({"a": {0: 1}}, "a part has this name already"),
        ({"min": {0: 1}}, "must be a plain word"),
    ],
)
def test_a_wrong_schedule_is_refused(section, message):
    with pytest.raises(ValidationError, match=message):
        RewardsConfig.model_validate({"parts": {"a": {"function": "format"}}, "schedules": section})


# ---- in a judgement -----------------------------------------------------------------------------------------------

CODE = """
def lengths(completions): return [float(len(c[0]["content"])) if c[0]["content"] else None for c in completions]
def ones(completions): return [1.0] * len(completions)
def credits(trajectories): return [{1: 2.0, 0: 4.0} for _ in trajectories]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "parts.py"
    path.write_text(CODE)
    return lambda name, **more: {"function": f"{path}:{name}", "isolate": False, **more}


def group(*words, number=0):
    return [trajectory_of({}, text("answer", w), group=number, member=m) for m, w in enumerate(words)]


def judged(section, *groups, step=1):
    with RewardManager(RewardsConfig.model_validate(section)) as manager:
        report = manager.score(groups, step)
    return [[t.reward for t in members] for members in groups], report


def test_the_formula_sees_the_groups_and_the_step(file):
    section = {
        "parts": {"n": file("lengths")},
        "schedules": {"w": {0: 1.0, 10: 0.0}},
        "total": "w * (n - group_mean(n)) + batch_max(n)",
    }
    rewards, report = judged(section, group("aa", "aaaa", ""), group("aaaaaa", "aa", number=1), step=5)
    assert rewards == [[0.5 * -1 + 6, 0.5 * 1 + 6, None], [0.5 * 2 + 6, 0.5 * -2 + 6]]
    assert report.metrics["reward/schedule/w"] == 0.5


def test_a_weight_can_follow_a_schedule(file):
    section = {"parts": {"n": file("lengths", weight="w"), "o": file("ones")}, "schedules": {"w": {1: 2.0, 3: 0.5}}}
    config = RewardsConfig.model_validate(section)
    assert config.formula() == "w * n + o"
    with RewardManager(config) as manager:
        for step, expected in ((1, 7), (2, 4.75), (3, 2.5)):
            rows = group("aaa")
            manager.score([rows], step)
            assert rows[0].reward == pytest.approx(expected)


def test_a_gate_pays_the_rest_only_behind_it(file):
    section = {"parts": {"n": file("lengths"), "o": file("ones")}, "total": "o if coalesce(n, 0) > 2 else 0"}
    assert judged(section, group("aaa", "a", ""))[0] == [[1, 0, 0]]
    section["total"] = "o if n > 2 else 0"  # without coalesce a gate that was not judged leaves the row unjudged
    assert judged(section, group("aaa", "a", ""))[0] == [[1, 0, None]]


def test_a_watched_part_is_logged_and_never_paid(file):
    section = {"parts": {"n": file("lengths", log_only=True), "o": file("ones")}}
    assert RewardsConfig.model_validate(section).formula() == "o"
    rows = group("aaa", "")
    rewards, report = judged(section, rows)
    assert rewards == [[1, 1]] and [t.rewards for t in rows] == [{"n": 3, "o": 1}, {"n": None, "o": 1}]
    assert report.metrics["reward/n"] == 3 and report.metrics["reward/n/none"] == 0.5
    with pytest.raises(ExpressionError, match="rewards.total: 'n' is log-only"):
        RewardsConfig.model_validate({**section, "total": "o + n"})
    with pytest.raises(ExpressionError, match="'n' is log-only"):
        RewardsConfig.model_validate({**section, "total": "o + group_mean(n)"})


def test_what_a_watched_part_says_of_segments_moves_no_advantage(file):
    paid, watched = group("a"), group("a")
    judged({"parts": {"c": file("credits")}}, paid)
    judged({"parts": {"c": file("credits", log_only=True), "o": file("ones")}}, watched)
    assert paid[0].segment_rewards == {"c": {1: 2.0, 0: 4.0}}
    assert watched[0].segment_rewards == {} and watched[0].rewards["c"] == 3.0
    assert watched[0].info["rewards"] == {"c": {"segments": {"1": 2.0, "0": 4.0}}}


# ---- the tree -----------------------------------------------------------------------------------------------------


def test_the_tree_says_what_each_part_is_and_how_they_are_combined(file):
    config = RewardsConfig.model_validate(
        {
            "parts": {
                "result": {"function": "geneval", "options": {"mode": "graded"}},
                "form": {"function": "format", "log_only": True},
                "mine": {
                    "function": "trl.rewards.think_format_reward",
                    "scope": "row",
                    "timeout_s": 20,
                    "workers": {"kind": "ray", "count": 2, "num_gpus": 0.25, "batch_size": 8},
                },
            },
            "schedules": {"w": {0: 1.0, 100: 0.2}},
            "total": "w * result if group_std(result) > 0 else clip(mine, -1, 1)",
        }
    )
    printed = "\n".join(lines(config))
    for said in (
        "result [weighted] = geneval(mode='graded')",
        "form [log-only] = format()",
        "GenEval, arXiv:2310.11513",
        "in the driver",
        "in 2 Ray actors of 1 CPU and 0.25 GPU, 8 at a time; 20 s a call, then 1 more",
        "w [schedule] = 1 at step 0 -> 0.2 at step 100",
        "group_std: over the group, the standard deviation, divisor n",
        "w (schedule)",
        "clip",
    ):
        assert said in printed, said
    tree = [line.lstrip(" │├└─") for line in lines(config)]
    assert tree[tree.index("if") :] == [
        "if",
        ">",
        "group_std: over the group, the standard deviation, divisor n",
        "result",
        "0",
        "then",
        "*",
        "w (schedule)",
        "result",
        "else",
        "clip",
        "mine",
        "-1",
        "1",
    ]
