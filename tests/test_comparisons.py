"""Answers compared as words and as numbers: what typesetting adds costs nothing, and what changes an answer counts."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from published_helpers import conversation, say

from rewards.functions.answers import COMPARISONS, answer, math_agrees
from rewards.functions.comparisons import anls, exact, normalised, number, relaxed, squad_normalised, token_f1
from rewards.functions.text import plain


@pytest.mark.parametrize(
    ("kind", "said", "gold", "right"),
    [
        ("choice", "<answer>A or B</answer>", "B", 0),
        ("choice", "<answer>A is correct</answer>", "A", 1),
        ("exact", "<answer>-5</answer>", "5", 0),
        ("exact", "<answer>3.5</answer>", "35", 0),
        ("f1", "<answer>-5</answer>", "5", 0),
        ("math", "<answer>**73**</answer>", "73", 1),
        ("numeric", "**Final Answer:** 73", "73", 1),
        ("math", "<answer>11 5/6</answer>", "71/6", 1),
        ("exact", "<answer>cafe\u0301</answer>", "caf\u00e9", 1),
    ],
)
def test_the_reward_pays_what_is_right(kind, said, gold, right):
    assert answer([conversation({"ground_truth": gold}, say(said))], kind=kind) == [right]


# What stands around a right answer, or another way to type it: every kind that can compare it must pay.
@pytest.mark.parametrize("kind", sorted(COMPARISONS))
@pytest.mark.parametrize(
    "dressed",
    [
        "**73**", "*73*", "__73__", "`73`", "**73", "73**", "# 73", "$73$", "\\(73\\)", "\\text{73}", "\\boxed{73}",
        "\\mathbf{73}", " 73\u00a0", "7\u200b3", "\uff17\uff13",
    ],
)  # fmt: skip
def test_typesetting_costs_nothing_under_any_kind(kind, dressed):
    gold = "B" if kind == "choice" else "73"
    said = dressed.replace("73", "B").replace("7\u200b3", "\u200bB").replace("\uff17\uff13", "\uff22")
    thought = conversation({"ground_truth": gold}, say(f"<answer>{said if kind == 'choice' else dressed}</answer>"))
    assert answer([thought], kind=kind) == [1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\u22125", "-5"),  # the minus sign, and the dash that stands for it
        ("\u20135", "-5"),
        ("+5", "5"),
        ("1,234", "1234"),
        ("1\u202f234", "1234"),
        ("1'234", "1234"),
        ("5%", "5"),
        ("$-5", "-$5"),
        (".5", "0.5"),
        ("5.", "5"),
        ("(-5)", "-5"),
        ("10\u201312", "10 - 12"),
        ("5 + 3", "5+3"),
        ("\u00bd", "1/2"),
        ("1\u00bd", "1 1/2"),
        ("10\u00b2", "10^2"),
        ("CO\u2082", "CO2"),
        ("\u201cred\u201d", "red"),
        ("don\u2019t", "don't"),
        ("well-known", "wellknown"),  # as SQuAD has it: a hyphen between letters is punctuation
        ("U.S.A.", "USA"),
        ("- 5", "-5"),
        ("- 5 cm", "-5 cm"),
        ("x = - 5", "x = -5"),
        ("- a dog", "A dog"),  # a bullet
        ("Rome - I think", "Rome, I think"),  # a dash
        ("-(5)", "-5"),
        ("+x", "x"),
        ("1e+5", "1e5"),
        ("1E\u22125", "1e-5"),
        ("X-ray", "xray"),
        ("F-16", "F16"),
        ("(C++).", "c++"),
        ("`C++`", "C++"),
        ("C\\#", "C#"),
        ("the cat", "A cat."),
        ("U\u0308ber", "\u00fcber"),
        ("a", "A"),
    ],
)
def test_the_same_words(one, other):
    assert exact(one, other) == exact(other, one) == 1
    assert token_f1(one, other) == 1 or normalised(one) == ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("-5", "5"),
        ("-5 degrees", "5 degrees"),
        ("x = -5", "x = 5"),
        ("3.5", "35"),
        ("3.5.2", "352"),
        ("3/4", "34"),
        ("3/4", "3 4"),
        ("10-12", "1012"),
        ("10:30", "1030"),
        ("2024-05-01", "20240501"),
        ("1,5", "15"),  # no group of thousands
        ("5+3", "53"),
        ("<5", "5"),
        ("10\u00b2", "102"),
        ("1\u00bd", "11/2"),
        ("2**3", "23"),  # no bold type
        ("1e-5", "1e5"),
        ("1.5E-5", "1.5E5"),
        ("2e-3 m", "2e3 m"),
        ("- 5", "5"),
        ("x = - 5", "x = 5"),
        ("-x", "x"),
        ("- x", "x"),
        ("-a", "a"),
        ("$-x_1$", "x_1"),
        ("x = -y", "x = y"),
        ("e^{-x}", "e^{x}"),
        ("-(5)", "5"),
        ("-\\pi", "\\pi"),
        ("-\\frac{1}{2}", "\\frac{1}{2}"),
        ("-\u221e", "\u221e"),
        ("C++", "C"),
        ("C#", "C"),
        ("C++", "C#"),
        ("C++17", "C17"),
        ("A+", "A"),
        ("O+", "O-"),
        ("O-", "O"),
        ("Disney+", "Disney"),
        ("50+", "50"),
    ],
)
def test_other_words(one, other):
    assert exact(one, other) == exact(other, one) == 0
    assert token_f1(one, other) < 1 and relaxed(one, other) == relaxed(other, one) == 0


def test_the_released_normal_form_is_kept_for_the_releases():
    assert squad_normalised("The -3.5, a dog!") == "35 dog"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("\u22123", -3),
        ("-$3", -3),
        ("$-3", -3),
        ("3 \u20ac", 3),
        ("1 234.5", 1234.5),
        ("1{,}234", 1234),
        ("1\\,234", 1234),
        ("3/4", 0.75),
        ("\u00bd", 0.5),
        ("11 5/6", 71 / 6),
        ("-1 1/2", -1.5),
        ("- 5", -5),
        ("1e-5", 1e-5),
        ("\\frac{3}{4}", 0.75),
        ("1\\frac{1}{2}", 1.5),
        ("3\\times10^{5}", 3e5),
        ("3 \u00d7 10\u2075", 3e5),
        ("73\\%", 73),
        ("1/0", None),
        ("5 7/3", None),  # an improper fraction makes no mixed number
        ("5 dogs", None),
        ("10:30", None),
        ("1,23", None),
    ],
)
def test_number(text, value):
    assert number(text) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        ("-5", "5", 0),
        ("41%", "0.41", 1),
        ("0.41", "41%", 1),
        ("41", "41%", 1),
        ("41%", "4100", 0),
        ("41%", "0.0041", 0),
        ("41%", "41%", 1),
        ("0.41%", "41%", 0),
        ("1.000", "1000", 0),
        ("5 dogs", "5 Dogs.", 1),  # no number: words
    ],
)
def test_relaxed(said, gold, right):
    assert relaxed(said, gold) == right


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        ("11\\frac{5}{6}", "71/6", True),
        ("1\u00bd", "3/2", True),
        ("-1 1/2", "-3/2", True),
        ("-1 1/2", "-1/2", False),  # the sign is of the whole
        ("(1 1/2, 2)", "(3/2, 2)", True),
        ("3 1/2 cm", "7/2", True),
        ("71/6", "11 5/6", True),
        ("\u22125", "-5", True),
        ("-5", "5", False),
        ("1e-5", "1e5", False),
        ("-x", "x", False),
        ("C++", "C", False),
        ("Disney+", "Disney", False),
        ("1 000", "1000", True),
        ("1\\,000", "1000", True),
        ("5\\%", "0.05", True),
        ("\uff15", "5", True),
        ("2*3*4", "24", True),
        ("2**3", "8", True),
        ("x\u00b2", "x^2", True),
        ("73.", "73", True),
        ("\\boxed{**73**}", "73", True),
        ("**\\boxed{73}**", "73", True),
        ("**rats**", "star", False),
        ("cafe\u0301", "caf\u00e9", True),
    ],
)
def test_math(said, gold, right):
    assert math_agrees(said, gold) is right


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("**bold** and *slanted*, `code`", "bold and slanted, code"),
        ("***both***", "both"),
        ("a * b * c", "a * b * c"),
        ("a*b*c", "a*b*c"),
        ("(2)*3*(4)", "(2)*3*(4)"),
        ("snake_case_name", "snake_case_name"),
        ("2**3**4", "2**3**4"),
        ("* item", "item"),
        ("- item", "- item"),
        ("> 5", "> 5"),
        ("x\u2081\u00b2", "x1^2"),
        ("\u2460", "1"),
        ("", ""),
    ],
)
def test_plain(text, bare):
    assert plain(text) == bare


@examples(0.5)
@given(st.text(max_size=20))
def test_the_form_in_which_letters_are_composed_is_nothing(text):
    composed, taken_apart = unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)
    for compare in (exact, token_f1, anls):
        assert compare(composed, taken_apart) == compare(taken_apart, composed) == 1


@given(
    st.decimals(-10_000, 10_000, places=2, allow_nan=False).map(lambda d: format(d.normalize(), "f")),
    st.decimals(-10_000, 10_000, places=2, allow_nan=False).map(lambda d: format(d.normalize(), "f")),
)
def test_numbers_are_the_same_words_exactly_where_they_are_the_same_numbers(one, other):
    assert exact(one, other) == (float(one) == float(other)) == exact(f"it is {one}.", f"It is {other}")
    assert token_f1(one, other) == exact(one, other)
    assert exact(one, f"{float(one):,.10g}") == 1 and number(one) == float(one)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("x+5", "x - 5", 0),
        ("x + 5", "x+5", 1),
        ("5+x", "5-x", 0),
        ("2x - y", "2x + y", 0),
        ("n(n+1)/2", "n(n-1)/2", 0),
        ("(a+b)*(a-b)", "(a-b)*(a-b)", 0),
        ("x=5", "x = 5", 1),
        ("a<b", "a>b", 0),
        ("F-16", "F16", 1),
        ("N/A", "na", 1),
        ("T-shirt", "tshirt", 1),
        ("x^2", "x\u00b2", 1),
        ("a - b", "a-b", 1),
    ],
)
def test_what_joins_two_terms_is_part_of_an_answer(one, other, same):
    assert exact(one, other) == exact(other, one) == same
    assert exact(f"It is {one}.", f"it is {other}") == same
