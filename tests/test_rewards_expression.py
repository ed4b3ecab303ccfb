"""The recipe's formula: values by hand, None, and every way to write it wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.formula.expression import Expression, ExpressionError

PARTS = ("result", "consistency", "format")


def value(text, **parts):
    return Expression(text, PARTS)({name: parts.get(name) for name in PARTS})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("result * (1 + 0.5 * consistency) + 0.5 * format", 1 * (1 + 0.5 * -0.5) + 0.5 * 0.25),
        ("result if format > 0.2 else 0", 1.0),
        ("result if 0.3 < format <= 1 else -1", -1.0),
        ("min(result, consistency, format)", -0.5),
        ("max(result, consistency) - abs(consistency)", 0.5),
        ("clip(3 * format, 0, 0.5)", 0.5),
        ("(format > 0.2 and not consistency > 0) * 2", 2.0),
        ("-result ** 2 % 3", 2.0),
        ("coalesce(consistency, 7)", -0.5),
    ],
)
def test_values_by_hand(text, expected):
    assert value(text, result=1.0, consistency=-0.5, format=0.25) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    [
        "result + consistency",
        "consistency * 0",
        "min(result, consistency)",
        "clip(consistency, 0, 1)",
        "-consistency",
        "result if consistency > 0 else 0",
        "consistency < 1",
        "0 < result < consistency",
        "result > 2 and consistency > 0",
        "result > 0 or consistency > 0",
        "not consistency",
        "coalesce(consistency, consistency)",
    ],
)
def test_none_stays_none(text):
    assert value(text, result=1.0, format=1.0) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("format > 0 and result / format > 0.1", 0.0),  # format is 0: the division is not done
        ("format == 0 or result / format > 0.1", 1.0),
        ("result > 0 and format > 0 and result / format", 0.0),
        ("result < 0 or format or 9 ** 9 ** 9 or result", 1.0),
        ("2 if format > 0 and result / format > 0.1 else 3", 3.0),
    ],
)
def test_and_and_or_stop_at_what_decides(text, expected):
    parts = {"result": 1.0, "format": 0.0 if "9 **" not in text else 1.0}
    assert value(text, **parts) == expected


def test_none_behind_what_decides_is_still_none():
    assert value("format > 0 and consistency / format > 0.1", format=0.0) is None
    assert value("format == 0 or result / format > consistency", result=1.0, format=0.0) is None
    assert value("result > 0 and consistency and result / format", result=1.0, format=0.0) is None
    assert value("format > 0 and coalesce(consistency, result) / format", result=1.0, format=0.0) == 0


def test_what_does_decide_is_worked_out():
    for text in ("format == 0 and result / format > 0.1", "format > 0 or result / format > 0.1"):
        with pytest.raises(ExpressionError, match="divides by zero"):
            value(text, result=1.0, format=0.0)


@pytest.mark.parametrize(
    "text",
    [
        "-" * 5000 + "result",
        "(" * 5000 + "result" + ")" * 5000,
        "-" * 101 + "result",
        " + ".join(["result"] * 5000),
        "not " * 5000 + "result",
        "abs(" * 150 + "result" + ")" * 150,
    ],
)
def test_a_formula_that_is_too_deep_is_said_in_a_sentence(text):
    with pytest.raises(ExpressionError, match="^rewards.total: .*(100 terms inside each other|is no formula)") as said:
        Expression(text, PARTS)
    assert "\n" not in str(said.value)


def test_a_formula_may_be_as_deep_as_is_said():
    assert value("-" * 99 + "result", result=1.0) == -1
    assert value("abs(" * 99 + "result" + ")" * 99, result=-1.0) == 1
    assert value(" + ".join(["result"] * 100), result=1.0) == 100
    assert value("group_mean(" + "-" * 98 + "result)", result=1.0) == 1


def test_coalesce_alone_turns_none_into_a_number():
    assert value("result * (1 + coalesce(consistency, 0))", result=0.5) == 0.5
    assert value("result if format > 0 else consistency", result=0.5, format=1.0) == 0.5


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(-5, 5))
def test_agrees_with_python(a, b, c):
    text = "result * (1 + 0.5 * consistency) - min(format, result) / 3 + (result if format > consistency else -format)"
    expected = a * (1 + 0.5 * b) - min(c, a) / 3 + (a if c > b else -c)
    assert value(text, result=a, consistency=b, format=c) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reslt + 1", "rewards.total: no reward part 'reslt'; did you mean 'result'"),
        ("results(1)", "no function 'results'"),
        ("result +", "is no formula"),
        ("", "is no formula"),
        ("a = 1", "is no formula"),
        ("result.real", "'result.real' is not allowed"),
        ("[result][0]", "is not allowed"),
        ("(lambda: 1)()", "no function"),
        ("__import__('os').system('true')", "no function"),
        ("'text' * 3", "'text' is no number"),
        ("result // 2", "FloorDiv is not allowed"),
        ("result in format", "operator In is not allowed"),
        ("clip(result, 1)", "clip takes 3"),
        ("min(result)", "min takes at least 2"),
        ("coalesce(x=result)", "coalesce takes 2"),
    ],
)
def test_a_wrong_formula_is_named_at_once(text, message):
    with pytest.raises(ExpressionError, match=message.replace("(", r"\(").replace("[", r"\[")):
        Expression(text, PARTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("result / format", r"'result / format' divides by zero for trajectory 3-1 \(format = 0.0, result = 1.0\)"),
        ("result % format", "divides by zero"),
        ("10 ** (10 ** 3)", "leaves the finite numbers"),
        ("9 ** 9 ** 9", "leaves the finite numbers"),
        ("(0 - result) ** 0.5", "leaves the finite numbers"),
        ("1e308 * 10", "leaves the finite numbers"),
    ],
)
def test_what_has_no_value_is_named_with_its_row(text, message):
    with pytest.raises(ExpressionError, match=message):
        Expression(text, PARTS)({"result": 1.0, "consistency": 1.0, "format": 0.0}, "3-1")
