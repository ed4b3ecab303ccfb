"""Pixel Reasoner by hand: the three shapings, the rules for answers, and groups of trajectories."""

from __future__ import annotations

import pytest
from published_helpers import IMAGE, conversation, say, tool

from rewards.contract import RewardError
from rewards.published.pixel_reasoner import (
    Sample,
    Shaping,
    accuracy,
    accuracy_official,
    accuracy_verl_tool,
    pixel_reasoner,
    rate_of,
    shape_official,
    shaped,
    shaped_official,
)
from runtime.errors import UserError

CALL = "<tool_call>{}</tool_call>"


@pytest.mark.parametrize(
    ("correct", "operations", "rate", "total"),
    [
        (1, 1, 0.1, 1.1),  # 0.5 (0.3 - 0.1)
        (0, 1, 0.0, 0.15),
        (1, 0, 0.0, 1.0),
        (1, 1, 0.3, 1.0),
        (1, 1, 0.9, 1.0),
        (1, 3, 0.5, 0.9),  # two too many
        (0, 3, 0.1, 0.0),  # 0.1 of curiosity, 0.1 of price
    ],
)
def test_the_papers_shaping(correct, operations, rate, total):
    assert shaped(correct, operations, rate)["total"] == pytest.approx(total)


def test_other_constants():
    assert shaped(1, 4, 0.2, Shaping(rate=0.5, free=2, alpha=1, beta=0.1)) == pytest.approx(
        {"total": 1.1, "accuracy": 1, "curiosity": 0.3, "penalty": -0.2}
    )


def test_the_official_shaping():
    # 0.25 (0.3 - 0.125) / (2 * 0.125) = 0.175 for an image, 0.25 (0.175) / (1.5 * 0.125) = 0.23333 for a video
    assert shaped_official(Sample(1, 1), 0.125, False)["total"] == pytest.approx(1.175)
    assert shaped_official(Sample(1, 1, is_video=True), 0.125, False)["total"] == pytest.approx(1.23333, abs=1e-4)
    assert shaped_official(Sample(1, 4), 0.5, False)["total"] == pytest.approx(0.85)
    assert shaped_official(Sample(1, 1), 0.5, True)["total"] == 0  # voided by a failed last call
    assert shaped_official(Sample(-1, 0), 0.0, True)["total"] == -1


def test_the_officials_groups_are_read_by_the_first_ones_flags():
    first = [Sample(1, 1, last_call_failed=True), Sample(0, 0)]
    second = [Sample(1, 0), Sample(1, 1, last_call_failed=True)]
    groups = shape_official([first, second])
    assert [row["total"] for row in groups[0].samples] == [0, 0]
    # its own flag would void the second; the first group's voids the first, which called nothing
    assert [row["total"] for row in groups[1].samples] == [0, 1]
    assert groups[0].uniform and not groups[1].uniform
    assert (groups[0].difficulty_label, groups[1].difficulty_label) == (2, 4)
    assert not groups[0].solved_without_tool and groups[1].solved_without_tool


def test_the_rate_is_over_what_was_judged():
    assert rate_of([1, 0, 0, 3]) == 0.5 and rate_of([1, None, 0]) == 0.5 and rate_of([]) == 0 and rate_of([None]) == 0


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("so \\boxed{3/4}", "0.75", 1),
        ("\\boxed{1} no \\boxed{2}", "2", 1),
        ("\\boxed{Amber}", "amber", 1),
        ("\\boxed{(B)}", "B", 1),
        ("\\boxed{29}", "\\boxed{29}", 1),
        ("the value is 83", "83", 0),
        ("\\boxed{}", "83", 0),
        ("\\boxed{Oslo and Lisbon}", "Lisbon, Oslo", 1),
        ("\\boxed{Oslo}", "Lisbon, Oslo", 0),
        ("\\boxed{1782}", "1, 2", 0),  # its digits are there, its parts are not
        ("\\boxed{2, 1}", "1, 2", 1),
        ("\\boxed{(1, 2)}", "(1,2)", 1),
        ("\\boxed{(2, 1)}", "(1,2)", 0),
        ("\\boxed{1,000}", "1000", 1),
        ("\\boxed{rats}", "star", 0),
        ("\\boxed{\\text{red}}", "red", 1),
        ("\\boxed{\\text{New York}}", "New York", 1),
        ("\\boxed{\\text{5 cm}}", "5", 1),
        ("\\boxed{\\text{red}, \\text{blue}}", "blue, red", 1),
        ("\\boxed{\\text{red and blue}}", "blue, red", 1),
        ("\\boxed{\\text{red}, \\text{blue}}", "red", 0),
        ("\\boxed{\\text{b}}", "\\text{B}", 1),
        ("\\boxed{3\\text{ cm}, 4\\text{ cm}}", "3, 4", 1),
        ("\\boxed{12\\text{ dogs}}", "12", 1),
    ],
)
def test_the_papers_accuracy(text, gold, right):
    assert accuracy(text, [gold]) == right


def test_the_releases_accuracy():
    assert accuracy("\\boxed{5}", ["4", "5"]) == accuracy_verl_tool("\\boxed{5}", ["4", "5"]) == 1
    assert accuracy_verl_tool("\\boxed{rats}", "star") == 1  # products of letters
    assert accuracy_verl_tool("no box 7", "7") == 1  # any number of the text will do
    assert accuracy_official("\\boxed{1782}", "\\boxed{1, 2}") == 1
    assert accuracy_official("\\boxed{}", "5") == -1
    assert accuracy_official("\\boxed{41}", ["41%"]) == 1
    with pytest.raises(ValueError):
        accuracy_official("5", "5")


def rows(*members, group=0):
    return [
        conversation({"ground_truth": gold}, *segments, group=group, member=i)
        for i, (gold, *segments) in enumerate(members)
    ]


def looked(times, said, image=IMAGE):
    return [part for _ in range(times) for part in (say(CALL), tool("", image))] + [say(f"\\boxed{{{said}}}")]


def test_a_group_by_hand():
    # judged: 4, of which 1 looked: rate 0.25, curiosity 0.5 * 0.05
    group = rows(
        ("7", *looked(2, "7")),
        ("7", say("\\boxed{7}")),
        ("7", say("\\boxed{8}")),
        ("7", say("seven?")),
        (None, *looked(1, "7")),
    )
    logged = {}
    assert pixel_reasoner(group, None, logged.__setitem__) == pytest.approx([0.975, 1, 0, 0, None])
    assert logged["curiosity"] == pytest.approx(0.025 / 4) and logged["penalty"] == pytest.approx(-0.05 / 4)


def test_calls_that_failed_earn_no_curiosity():
    failed = say(CALL), tool("Execution error: too small"), say("\\boxed{7}")
    group = rows(("7", *failed), *[("7", say("\\boxed{7}"))] * 4)
    assert pixel_reasoner(group) == [1] * 5
    assert pixel_reasoner(group, failed_call_voids=True) == [0, 1, 1, 1, 1]


def test_the_rate_is_over_operations_that_worked():
    """Of ten thoughts one looked; a second one tried and failed, an eleventh has no reference."""
    group = rows(
        ("7", *looked(1, "7")),
        ("7", say(CALL), tool("Execution error: too small"), say("\\boxed{7}")),
        *[("7", say("\\boxed{7}"))] * 8,
        (None, *looked(1, "7")),
    )
    logged = {}
    # rate 1/10, so 0.5 * (0.3 - 0.1) for the one that looked; with the failed call it would be 0.5 * (0.3 - 0.2)
    assert pixel_reasoner(group, None, logged.__setitem__) == pytest.approx([1.1, *[1] * 9, None])
    assert logged["rate"] == pytest.approx(0.1)
    # the official release counts the failed call: 0.25 (0.3 - 0.2) / (2 * 0.2) for both
    official = pixel_reasoner(group, None, logged.__setitem__, variant="release_official")
    assert official[0] == pytest.approx(1.0625) and official[1] == pytest.approx(0.0625)  # voided by its failure
    assert logged["rate"] == pytest.approx(0.2)


def test_what_the_tool_writes_is_no_answer_and_no_call():
    group = rows(("7", say(CALL), tool("\\boxed{7} " + CALL), say("hm")), *[("7", say("hm"))] * 9)
    # one of ten looked, once: 0.5 * 0.2, and no answer
    assert pixel_reasoner(group) == pytest.approx([0.1] + [0] * 9)
    assert pixel_reasoner(group[:1], variant="release_verl_tool") == [1]


def test_the_rate_over_groups_or_over_the_batch():
    a, b = rows(("7", *looked(1, "7")), ("7", say("\\boxed{7}"))), rows(*[("7", say("\\boxed{7}"))] * 8, group=1)
    mixed = [a[0], *b, a[1]]
    assert pixel_reasoner(mixed) == [1] * 10  # half of its group looked
    assert pixel_reasoner(mixed, rate_over="batch") == pytest.approx([1.1] + [1] * 9)  # a tenth of the batch did


def test_the_official_release_over_trajectories():
    group = rows(("7", *looked(1, "7")), *[("7", say("\\boxed{7}"))] * 7)
    assert pixel_reasoner(group, variant="release_official")[0] == pytest.approx(1.175)
    for row in group:
        row.record["is_video"] = True
    assert pixel_reasoner(group, variant="release_official")[0] == pytest.approx(1.23333, abs=1e-4)
    with pytest.raises(RewardError, match="trajectory 0-0 has no boxed answer"):
        pixel_reasoner(rows(("7", say("seven"))), variant="release_official")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "release"}, "no variant 'release'; did you mean"),
        ({"rate_over": "step"}, "no rate_over 'step'"),
        ({"rate": 30}, "rate is 30"),
        ({"free": -1}, "free -1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        pixel_reasoner([], **options)
