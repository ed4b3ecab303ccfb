"""evals/scaling_arms.py and evals/scaling.py on hand-made thoughts, each arm's number worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.bootstrap import paired_bootstrap
from evals.heldout import EvaluationError
from evals.scaling import Critic, SamplingPass, compare_arms, measure_thoughts, up_to
from evals.scaling_arms import (
    BY_NAME,
    Candidate,
    Picture,
    Spent,
    Thought,
    any_picture,
    at_limit,
    best_of,
    best_score,
    expected_choice,
    last_fine,
    until_fine,
)
from formats.registry import get_format
from record.trajectory import (
    Author,
    DecisionKind,
    Decisions,
    Modality,
    SamplingParams,
    Segment,
    StopReason,
    Trajectory,
)
from tests.test_heldout import Shades

# wrong at 40 tokens (its critique read at 55), right and called wrong, wrong and called fine, right and called fine
FOUR = Thought(
    0,
    0,
    (
        Picture(0.0, 40, 55, False, 0.9),
        Picture(1.0, 100, 115, False, 0.6),
        Picture(0.0, 160, 175, True, 0.8),
        Picture(1.0, 220, 235, True, 0.7),
    ),
    1.0,
    240,
)
ONE = Thought(0, 1, (Picture(1.0, 30, 45, True, 0.9),), 1.0, 45)  # ended after its first picture
NONE = Thought(0, 2, (), 0.0, 7, "max_tokens")


@pytest.mark.parametrize(
    "arm, rounds, score, tokens, pictures",
    [
        (at_limit, 1, 0.0, 40, 1),
        (at_limit, 2, 1.0, 100, 2),
        (at_limit, 3, 0.0, 160, 3),
        (until_fine, 1, 0.0, 40, 1),  # the only picture: nothing is read
        (until_fine, 3, 0.0, 160, 3),  # two called wrong, the third taken unread
        (until_fine, 4, 0.0, 175, 3),  # the third called fine: its critique was read
        (last_fine, 1, 0.0, 55, 1),  # none approved: that of the last round
        (last_fine, 2, 1.0, 115, 2),
        (last_fine, 3, 0.0, 175, 3),
        (last_fine, 4, 1.0, 235, 4),
        (best_score, 1, 0.0, 40, 1),
        (best_score, 3, 1.0, 160, 3),
        (any_picture, 3, 1 / 3, 160, 3),
        (any_picture, 4, 0.5, 220, 4),
    ],
)
def test_an_arm_of_rounds_takes_its_picture_and_pays_for_what_it_has_read(arm, rounds, score, tokens, pictures):
    assert arm(FOUR, rounds) == Spent(pytest.approx(score), tokens, pictures, tokens)


def test_a_thought_that_ended_before_counts_with_what_it_has():
    for arm in (at_limit, until_fine, last_fine, best_score, any_picture):
        assert arm(ONE, 3).score == 1.0 and arm(ONE, 3).pictures == 1 and arm(ONE, 3).tokens == 45
        assert arm(NONE, 2) == Spent(0.0, 7, 0, 7)


def test_a_picture_that_nobody_judged_is_not_zero():
    thought = Thought(0, 0, (Picture(None, 10, 15, True), Picture(1.0, 30, 35, False)), 1.0, 40)
    assert at_limit(thought, 1).score is None and until_fine(thought, 2).score is None
    assert best_score(thought, 2).score == any_picture(thought, 2).score == 1.0
    assert best_score(thought, 1).score is None


def candidate(score, fine, p_fine, tokens=10):
    return Candidate(score, tokens, 1, fine, p_fine)


def test_best_of_n_is_the_mean_over_every_n_of_them():
    # Three candidates, two at a time: {a, b}, {a, c}, {b, c}.
    a, b, c = candidate(0.0, True, 0.9, 10), candidate(1.0, True, 0.6, 20), candidate(1.0, False, 0.2, 60)
    assert best_of([a, b, c], 1, "critique").score == pytest.approx(2 / 3)
    assert best_of([a, b, c], 2, "critique").score == pytest.approx((0.5 + 0 + 1) / 3)  # a tie, a, b
    assert best_of([a, b, c], 2, "p_fine").score == pytest.approx((0 + 0 + 1) / 3)
    assert best_of([a, b, c], 2, "oracle").score == 1.0
    assert best_of([a, b, c], 2, "random").score == pytest.approx(2 / 3)
    spent = best_of([a, b, c], 2, "random")
    assert spent.tokens == 60 and spent.pictures == 2
    assert spent.depth == pytest.approx((20 + 60 + 60) / 3)  # the longer one of each two is waited for
    assert best_of([a, candidate(None, True, 1.0)], 2, "critique").score == 0.0
    assert best_of([candidate(None, True, 1.0, 30)], 2, "critique") == Spent(None, 60.0, 2.0, 30.0)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1)), min_size=1, max_size=7),
    st.integers(1, 7),
)
def test_the_expected_choice_is_what_every_subset_gives(members, n):
    keys, values = [float(key) for key, _ in members], [value for _, value in members]
    n = min(n, len(members))
    found = []
    for subset in itertools.combinations(range(len(members)), n):
        best = max(keys[i] for i in subset)
        tied = [values[i] for i in subset if keys[i] == best]
        found.append(sum(tied) / len(tied))
    assert expected_choice(keys, values, n) == pytest.approx(sum(found) / len(found))


def test_p_fine_is_the_probability_of_the_verdict_or_its_rest():
    assert Picture(1.0, 1, 1, True, 0.8).p_fine == 0.8
    assert Picture(1.0, 1, 1, False, 0.9).p_fine == pytest.approx(0.1)
    assert Picture(1.0, 1, 1, None).p_fine == 0.0


# ---- from trajectories ----------------------------------------------------------------------------------------------


def words(role: str, text: str, ids, probability: float = 1.0) -> Segment:
    """A segment each of whose ids was sampled with one probability."""
    count = len(ids)
    sampling = SamplingParams(np.ones(count, np.float32), np.full(count, -1, np.int32), ())
    logprob_N = np.full(count, math.log(probability), np.float32)
    kind_N = np.full(count, DecisionKind.WORD, np.int8)
    decisions = Decisions(kind_N, np.arange(count, dtype=np.int32), logprob_N, sampling)
    return Segment(role, Author.POLICY, Modality.TEXT, True, np.array(ids, np.int32), text, decisions)


def drawn(role: str, shade: int) -> Segment:
    image = np.full((2, 2, 3), shade, np.uint8)
    return Segment(role, Author.POLICY, Modality.IMAGE_TOKENS, True, np.zeros(6, np.int32), image=image)


def strokes(shades, verdicts, end=True) -> Trajectory:
    """plan (3 ids), sketch (6), inspect (4, its verdict the third), refine (2), redraw (6), inspect ..."""
    segments = [Segment("prompt", Author.USER, Modality.TEXT, False, np.zeros(9, np.int32), "a circle")]
    segments.append(words("plan", "<ins>a</ins><des>b</des>", [1, 1, 1]))
    for number, (shade, verdict) in enumerate(zip(shades, verdicts, strict=True)):
        if number:
            segments.append(words("refine", "<refine>c</refine>", [1, 1]))
        segments.append(drawn("redraw" if number else "sketch", shade))
        segments.append(
            words("inspect", f"<inspect>{verdict}</inspect>", [1, 2 if verdict == "fine" else 3, 1, 1], 0.8)
        )
    return Trajectory("a circle", {}, "strokes", segments, stop=StopReason.END if end else StopReason.MAX_TOKENS)


CRITIC = Critic(
    ("inspect",),
    lambda text: next(((word, word == "fine") for word in ("fine", "wrong") if word in text), None),
    lambda id: {2: " fine", 3: "wrong"}.get(id, "x"),
)


def test_a_trajectory_is_measured_picture_by_picture():
    thought = strokes([0, 255, 51], ["wrong", "fine", "hm"], end=False)
    ((found,),) = measure_thoughts([[thought]], Shades(), get_format("strokes"), 2, CRITIC)
    assert [p.score for p in found.pictures] == [0.0, 1.0, None] and found.score == pytest.approx(0.2)
    assert [p.tokens for p in found.pictures] == [9, 21, 33]  # 3 + 6; + 4 + 2 + 6; + 4 + 2 + 6. The prompt is free
    assert [p.read for p in found.pictures] == [13, 25, 37] and found.tokens == 37
    assert [p.fine for p in found.pictures] == [False, True, None] and found.stop == "max_tokens"
    assert [p.sure for p in found.pictures] == [pytest.approx(0.8), pytest.approx(0.8), 1.0]
    assert thought.rewards == {}  # the evaluation was shown copies
    ((blind,),) = measure_thoughts([[thought]], Shades(), get_format("strokes"), 2, None)
    assert [p.fine for p in blind.pictures] == [None] * 3 and [p.read for p in blind.pictures] == [9, 21, 33]


def test_a_thought_is_cut_where_its_format_lets_it_end():
    fmt = get_format("strokes")
    thought = strokes([0, 255], ["wrong", "fine"])
    first = up_to(thought, 2, fmt)
    assert [s.role for s in first.segments[1:]] == ["plan", "sketch", "inspect"] and not fmt.violations(first)
    assert len(up_to(strokes([0], ["fine"], end=False), 2, fmt).segments) == 4
    critique = get_format("self_critique")
    roles = ["sketch", "critique", "redraw", "critique", "redraw"]
    segments = [drawn(role, 0) if role != "critique" else words(role, "fine", [1, 2]) for role in roles]
    whole = Trajectory("a circle", {}, "self_critique", segments)
    assert [s.role for s in up_to(whole, 2, critique).segments] == ["sketch", "critique", "redraw"]
    assert not critique.violations(up_to(whole, 2, critique))
    assert [s.role for s in up_to(whole, 0, critique).segments] == ["sketch"]


# ---- all arms together ----------------------------------------------------------------------------------------------


def thought(prompt, member, *pictures):
    made = tuple(Picture(score, 10 * n, 10 * n + 2, fine, 0.9) for n, (score, fine) in enumerate(pictures, 1))
    return Thought(prompt, member, made, made[-1].score, made[-1].read)


OWN = SamplingPass(
    [
        [thought(0, 0, (0.0, False), (1.0, True)), thought(0, 1, (1.0, True))],
        [thought(1, 0, (0.0, True)), thought(1, 1, (1.0, True))],
    ],
    seconds=5.8,
)
FORCED = SamplingPass(
    [
        [thought(0, 0, (0.0, False), (1.0, True))],
        [thought(1, 0, (0.0, True), (0.0, False))],
    ],
    seconds=8.8,
)


def points(found):
    return {(p.arm.name, p.budget): p for p in found.points}


def test_all_arms_of_two_prompts_by_hand():
    found = compare_arms(OWN, FORCED, ["a", "b"], [1, 2], [1, 2], reads=True)
    at = points(found)
    assert {name for name, _ in at} == set(BY_NAME) and found.judged == found.prompts == 2
    score = {key: p.score for key, p in at.items()}
    assert score["own_end", 1] == 0.5  # (0 + 1) / 2 and (0 + 1) / 2
    assert score["own_end", 2] == 0.75  # (1 + 1) / 2 and (0 + 1) / 2
    assert (score["always", 1], score["always", 2]) == (0.0, 0.5)
    assert score["until_fine", 2] == score["last_fine", 2] == 0.5  # the second, and the first
    assert score["best_picture", 2] == 0.5 and score["any_picture", 2] == 0.25
    assert score["sketches/critique", 2] == 0.75  # the approved one; a tie of 0 and 1
    assert score["sketches/oracle", 2] == score["thoughts/oracle", 2] == 1.0
    assert score["sketches/random", 2] == score["sketches/random", 1] == 0.5
    assert score["thoughts/critique", 1] == 0.75
    # Tokens: own thoughts take 22 and 12, 12 and 12 (58 in all, so 0.1 s each); forced ones 22 each (44; 0.2 s).
    assert at["always", 2].tokens == 20 and at["always", 2].seconds == pytest.approx(4.0)
    assert at["until_fine", 2].tokens == 16 and at["last_fine", 2].tokens == 22
    assert at["own_end", 2].tokens == pytest.approx((16 + 12) / 2) and at["own_end", 2].pictures == 1.25
    assert at["thoughts/random", 2].tokens == 29 and at["thoughts/random", 2].seconds == pytest.approx(2.9)
    assert at["thoughts/random", 2].depth == pytest.approx((22 + 12) / 2)
    assert at["sketches/critique", 2].tokens == 24 and at["sketches/oracle", 2].tokens == 20
    assert at["own_end", 2].gain == 0.25
    matched = {(m.arm, m.rounds, m.rival, m.cost): m for m in found.matches}
    own = matched["last_fine", 2, "sketches/critique", "tokens"]  # to 22 tokens two sketches of 12 come nearest
    assert (own.n, own.spent, own.rival_spent, own.limit) == (2, 22.0, 24.0, "") and own.difference == -0.25
    one = matched["until_fine", 2, "sketches/critique", "tokens"]  # 16: one of 12 is nearer than two
    assert (one.n, one.rival_spent, one.limit) == (1, 12.0, "")
    assert one.difference == 0.0
    assert matched["always", 1, "sketches/critique", "tokens"].limit == "dearer"
    assert matched["always", 2, "sketches/critique", "seconds"].limit == "all"
    assert {m.rival for m in found.matches if m.arm == "best_picture"} == {"sketches/oracle", "thoughts/oracle"}


def test_without_a_reader_or_rounds_the_arms_that_need_them_are_left_out():
    found = compare_arms(OWN, None, ["a", "b"], [1], [1], reads=False)
    assert {p.arm.name for p in found.points} == {
        "own_end",
        "sketches/random",
        "sketches/oracle",
        "thoughts/random",
        "thoughts/oracle",
    }
    assert {m.rival for m in found.matches} == {"sketches/random", "thoughts/random"}


def test_prompts_that_some_arm_has_no_score_of_are_left_out_of_all():
    forced = SamplingPass([FORCED.thoughts[0], [thought(1, 0, (0.0, True), (None, False))]], 1.0)
    found = compare_arms(OWN, forced, ["a", "a"], [2], [1], reads=True)
    assert (found.judged, found.prompts) == (1, 2)
    assert points(found)["own_end", 2].score == 1.0  # of the first prompt alone
    unjudged = SamplingPass([[thought(p, 0, (None, False))] for p in (0, 1)], 1.0)
    with pytest.raises(EvaluationError, match="none of 2 held-out prompts has a score under every arm"):
        compare_arms(OWN, unjudged, ["a", "a"], [1], [1], reads=True)


def test_intervals_are_the_paired_bootstraps():
    rng = np.random.default_rng(0)
    tags = ["a"] * 30 + ["b"] * 20
    first, second = rng.random(50), rng.random(50)
    own = SamplingPass([[thought(p, 0, (float(first[p]), None))] for p in range(50)], 1.0)
    forced = SamplingPass([[thought(p, 0, (float(first[p]), None), (float(second[p]), None))] for p in range(50)], 1.0)
    found = points(compare_arms(own, forced, tags, [1, 2], [1], reads=False, resamples=10_000))
    expected = paired_bootstrap(first.tolist(), second.tolist(), tags)
    point = found["always", 2]
    assert point.gain == pytest.approx(expected.difference)
    assert (point.gain_low, point.gain_high) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert found["always", 1].gain == found["always", 1].gain_low == 0.0
