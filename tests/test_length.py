"""Repetition and length: by hand, by properties, and over thoughts with images and tags."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewards_helpers import image_segment, text, trajectory_of

from record.trajectory import Author
from rewards.functions.length import (
    group_length,
    length_penalty,
    overlong_penalty,
    repeated_share,
    repetition_penalty,
    soft_overlong,
)
from runtime.errors import UserError

IMAGE = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("stretches", "n", "share"),
    [
        (["a b c d"], 2, 0),
        (["a b a b"], 2, 1 / 3),  # ab ba ab
        (["a a a a"], 2, 2 / 3),
        (["a b", "a b"], 2, 1 / 2),
        (["a b", "b a"], 2, 0),  # joined, "b b" would be a third pair
        (["a"], 2, 0),
        ([], 3, 0),
    ],
)
def test_repeated_share_by_hand(stretches, n, share):
    assert repeated_share([s.split() for s in stretches], n) == pytest.approx(share)


@given(st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=5), st.integers(1, 4))
def test_repeated_share_is_a_share_and_writing_all_again_never_lowers_it(stretches, n):
    share = repeated_share(stretches, n)
    assert 0 <= share < 1
    assert repeated_share(stretches * 2, n) >= share


@pytest.mark.parametrize(("length", "value"), [(0, 0), (60, 0), (61, -0.025), (80, -0.5), (100, -1), (101, -1)])
def test_soft_overlong_by_hand(length, value):
    # free up to 100 - 40 = 60, then down by 1/40 a token
    assert soft_overlong(length, 100, 40) == pytest.approx(value)


@given(st.integers(0, 500), st.integers(1, 200), st.integers(0, 200))
def test_soft_overlong_falls_with_length_and_stays_within_its_bounds(length, cache, free):
    shorter, longer = (soft_overlong(n, free + cache, cache) for n in (length, length + 1))
    assert -1 <= longer <= shorter <= 0


@pytest.mark.parametrize(
    ("lengths", "values"),
    [
        ([10, 20, 30], [0.5, 0, -0.5]),
        ([10, 10], [0, 0]),
        ([7], [0]),
        ([], []),
        ([10, None, 20], [0.5, None, -0.5]),  # as 0 the unknown one would be the shortest
        ([None, None], [None, None]),
    ],
)
def test_group_length_by_hand(lengths, values):
    assert group_length(lengths) == values


def test_a_format_that_repeats_its_tags_is_not_repetitive():
    rounds = [
        s
        for n in range(4)
        for s in (text("plan", f"<ins> draw </ins><des> step {n} </des>"), image_segment("sketch", IMAGE))
    ]
    # the tags of one round stand in the next as well: counted as words they would be most of the repetition
    assert repetition_penalty([trajectory_of({}, *rounds)], n=1) == [pytest.approx(-(1 - 6 / 12))]
    assert repetition_penalty([trajectory_of({}, *rounds)], n=2) == [pytest.approx(0)]
    assert repetition_penalty([trajectory_of({}, *rounds)], n=2, tags=True)[0] < -0.4


def test_repetition_over_thoughts():
    observed = text("observation", "look look look look look", Author.ENVIRONMENT)
    assert repetition_penalty(
        [trajectory_of({}, observed), trajectory_of({}), trajectory_of({}, text("think", "Red red RED red"))],
        penalty=0.5,
    ) == [0, 0, -0.25]
    ids = trajectory_of({}, text("think", "a b a b a b", ids=[1, 2, 1, 2, 1, 2]))
    assert repetition_penalty([ids, trajectory_of({}, text("think", "a b a b"))], n=2, unit="tokens") == [
        pytest.approx(-3 / 5),
        None,
    ]


def test_images_and_observations_have_no_length():
    written = trajectory_of(
        {},
        text("think", "a b c", ids=range(70)),
        image_segment("sketch", IMAGE, ids=range(500)),
        text("observation", "x", Author.ENVIRONMENT, ids=range(500)),
        text("answer", "d", ids=range(10)),
    )
    unknown = trajectory_of({}, text("think", "no ids were recorded"))
    assert overlong_penalty([written, unknown], max_length=100, cache=40) == [-0.5, None]
    assert overlong_penalty([unknown], max_length=4, cache=2, unit="words") == [-1]
    assert overlong_penalty([unknown], max_length=25, cache=10, unit="characters") == [pytest.approx(-0.5)]


def test_length_is_compared_within_a_group():
    group = [
        trajectory_of({}, text("think", "x", ids=range(n)), group=g, member=m)
        for g, m, n in [(0, 0, 10), (1, 0, 1000), (0, 1, 30), (1, 1, 2000), (0, 2, 20)]
    ]
    logged = {}
    assert length_penalty(group, log_metric=logged.__setitem__) == [0.5, 0.5, -0.5, -0.5, 0]
    assert logged == {"length": 612}


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (repetition_penalty, {"n": 0}, "n is 0"),
        (repetition_penalty, {"penalty": -1}, "penalty is -1"),
        (repetition_penalty, {"unit": "characters"}, "no unit 'characters'"),
        (overlong_penalty, {"cache": 0}, "cache is 0"),
        (overlong_penalty, {"max_length": 10, "cache": 20}, "cache is 20"),
        (overlong_penalty, {"unit": "lines"}, "no unit 'lines'"),
        (length_penalty, {"unit": "lines"}, "no unit 'lines'"),
    ],
)
def test_options_are_checked_before_anything_is_scored(function, options, message):
    with pytest.raises(UserError, match=message):
        function([], **options)
