"""Prompts that a policy cannot be asked are found before the first step."""

from __future__ import annotations

import pytest

from formats.registry import get_format
from runtime.errors import UserError
from tasks.config import TaskConfig
from tasks.lengths import fitting
from tests.vocabularies import WordVocabulary

FMT = get_format("strokes")


class Marked(WordVocabulary):
    """Refuses text that holds an image's marker, as Chameleon's does."""

    def encode(self, text):
        if "<racm3:break>" in text:
            raise UserError("the text holds the marker <racm3:break>")
        return super().encode(text)


VOCABULARY = Marked()
RECORDS = [{"prompt": "red"}, {"prompt": "red " * 8}, {"prompt": "red <racm3:break>"}, {"prompt": "blue red"}]
MORE = len(FMT.prompt_ids("red", VOCABULARY)) - 1  # ids of a prompt beside its words


def fit(records=RECORDS, max_length=1000, **config):
    return fitting(records, FMT, VOCABULARY, max_length, TaskConfig(**config), "train")


def test_a_prompt_must_leave_room_for_an_answer():
    records = [{"prompt": "red red"}]
    assert fit(records, max_length=2 + MORE + 1) is records
    with pytest.raises(UserError, match=rf"1 of 1 prompts \(train\) .*has {2 + MORE} ids, and at most {1 + MORE} fit"):
        fit(records, max_length=2 + MORE)


def test_the_first_that_does_not_fit_is_named_and_all_are_counted():
    with pytest.raises(UserError, match=r"2 of 4 prompts .* 'red red .*\.\.\.|2 of 4 prompts .* 'red red") as error:
        fit(max_prompt_length=4 + MORE)
    assert "task.overlong_prompts: drop" in str(error.value)


def test_they_are_dropped_and_counted_where_the_recipe_says_so(caplog):
    assert [r["prompt"] for r in fit(max_prompt_length=4 + MORE, overlong_prompts="drop")] == ["red", "blue red"]
    assert "2 of 4 prompts (train) cannot be asked" in caplog.text and "left out" in caplog.text


def test_a_marker_in_a_prompt_is_found_too():
    with pytest.raises(UserError, match="1 of 1 prompts .* cannot be encoded .*marker.*; reword them$"):
        fit(RECORDS[2:3])


def test_the_sentence_ends_with_what_mends_them():
    """A prompt of 8 words over a limit of 4, and one with a marker, which no shortening mends."""
    limit = 4 + MORE
    for chosen, words in [((0, 1), "shorten them"), ((0, 2), "reword them"), ((0, 1, 2), "shorten or reword them")]:
        with pytest.raises(UserError, match=f"; {words}, or leave them out with task.overlong_prompts: drop$"):
            fit([RECORDS[n] for n in chosen], max_prompt_length=limit)


def test_where_none_is_left_dropping_is_no_help():
    with pytest.raises(UserError, match="shorten them$"):
        fit(RECORDS[1:2], max_prompt_length=2, overlong_prompts="drop")
