"""Which option of a multiple-choice question a text names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from rewards.functions.comparisons import choice
from rewards.functions.options import LETTERS, choice_letter, option_text

# {} is the letter, {x} another one. Every letter is read in the same way, A too.
NAMES_IT = [
    "{}", "{}.", "{})", "({})", "[{}]", "{}!", "**{}**", "`{}`", '"{}"', "${}$", "\\({}\\)",
    "{}. red", "{}) red", "({}) red", "{}: red", "{} - red", "**{}. red**", "({}) a dog", "{}. a dog",
    "Option {}", "option {}.", "Option {}: red", "Choice {}", "My choice is {}",
    "The answer is {}", "The answer is {}.", "the answer is ({})", "Answer: {}", "Answer:{}", "answer={}", "Answer {}",
    "**Answer:** {}", "Answer: **{}**", "Final answer: {}", "The correct option is {}.", "The answer is option {}",
    "The answer is {}: the red one", "The answer is {} because it is red", "Answer: ({}) a dog",
    "{} is correct", "{} is right.", "{} is the answer", "{} is the correct answer", "I think {} is right",
    "I choose {}.", "It must be {}", "I'd go with {}",
    "It is {}, not {x}", "Not {x}; {}", "not {x} but {}", "{} rather than {x}", "{} instead of {x}",
    "{x} is wrong, {} is right", "{x} is incorrect. The answer is {}", "{x} isn't it; {}", "It can't be {x}, so {}",
    "I rule out {x}. The answer is {}", "The answer is {} (not {x})", "({x}) is wrong. ({})",
    "The answer is {} because {x} is wrong", "{}. Point {x} is too far left", "Options: (A) red (B) blue. Answer: {}",
]  # fmt: skip
NAMES_NONE = [
    "{} or {x}", "{} and {x}", "{}, {x}", "{}/{x}", "{} & {x}", "{};{x}", "({}) or ({x})", "({}) and ({x})",
    "{}. red, or {x}. blue", "either {} or {x}", "both {} and {x}", "neither {} nor {x}", "Option {} and option {x}",
    "options {} and {x}", "The answer is {} or {x}", "Answer: {}, {x}", "The answers are {} and {x}",
    "The answer is {}. Wait, the answer is {x}", "{} or {x} is correct", "{}: red\n{x}: blue", "{} because of {x}",
    "not {}", "Not {}.", "{} is wrong", "({}) is wrong", "The answer is not {}", "It isn't {}", "{} cannot be right",
    "The answer is neither {} nor {x}", "{} is not wrong", "none of {}, {x}",
    "", "red", "Beautiful", "{}{x}", "I", "i", "a dog", "A dog is on the left", "The answer is a dog", "{}'s",
]  # fmt: skip


@pytest.mark.parametrize("letter", ["A", "B", "D"])
@pytest.mark.parametrize("text", NAMES_IT)
def test_a_text_names_an_option(text, letter):
    other = "C" if letter != "C" else "D"
    assert choice_letter(text.format(letter, x=other)) == letter


@pytest.mark.parametrize("letter", ["A", "B", "D"])
@pytest.mark.parametrize("text", NAMES_NONE)
def test_a_text_names_none_or_several(text, letter):
    assert choice_letter(text.format(letter, x="C")) is None
    assert choice(text.format(letter, x="C"), letter) == 0


@pytest.mark.parametrize("letter", ["a", "b", "h"])
@pytest.mark.parametrize(
    "text",
    ["{}", "{}.", "({})", "{}) red", "{}. red", "option {}", "the answer is {}", "answer: ({})", "{} is correct"],
)
def test_small_letters(text, letter):
    assert choice_letter(text.format(letter)) == letter.upper()


@pytest.mark.parametrize("text", ["\uff22", "\u24b7", "\u24d1", "B\u200b", "B\uff0c red"])
def test_other_forms_of_a_letter(text):
    assert choice_letter(text) == "B"


def test_letters_beyond_the_options_are_none():
    assert choice_letter("K") is None and choice_letter("D", letters="ABC") is None
    assert choice_letter("Vitamin K", letters=LETTERS) is None


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("red", "B. red", 1),
        ("Red.", "(B) red", 1),
        ("B", "B. red", 1),
        ("B. red", "B. red", 1),
        ("b) red", "B", 1),
        ("C. red", "B. red", 0),  # the letter says another one
        ("blue", "B. red", 0),
        ("A dog", "A. dog", 1),  # the article, and the words of the option
        ("A dog", "A", 0),
        ("", "B. red", 0),
        ("two dogs", "Two dogs", 1),  # a reference without a letter
    ],
)
def test_an_option_by_its_text(answer, gold, right):
    assert choice(answer, gold) == right


def test_option_text():
    assert option_text("B. red") == option_text("(b) red") == option_text("B - red") == "red"
    assert option_text("A dog") == "A dog" and option_text("B") == "B"


@examples(0.5)
@given(st.text(alphabet="ABab() .,:ornotis'*-", max_size=30))
def test_any_text_names_one_letter_or_none(text):
    assert choice_letter(text) in (None, *LETTERS)
    named = choice_letter(text)
    assert sum(choice(text, letter) for letter in LETTERS) == (named is not None)
