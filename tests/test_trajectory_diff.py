"""Where two thoughts part: by hand on written segments, and by the log-probs of two real policies."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evals.bootstrap import compare_scores
from evals.heldout import PromptScore
from evals.trajectory_diff import ThoughtPair, first_difference, scored_by, shown_id, summarise
from policy.base import score_trajectories
from record.trajectory import (
    Author,
    DecisionKind,
    Decisions,
    FlowSteps,
    Modality,
    SamplingParams,
    Segment,
    StopReason,
    Trajectory,
)
from tests.bigram import BOI, BigramPolicy
from tests.vocabularies import WordVocabulary
from underdrawing.report.diff import DiffPage, render

VOCABULARY = WordVocabulary(["<plan>"])
RED, BLUE, CIRCLE = (VOCABULARY.encode(word)[0] for word in ("red", "blue", "circle"))
CODE = [int(id) for id in VOCABULARY.code_ids]


def written(role: str, ids: list[int], logprob: float = -1.0, forced: int = 0, temperature: float = 1.0) -> Segment:
    """A segment whose ids were all sampled, but for the last `forced` ones."""
    count = len(ids) - forced
    kind = [DecisionKind.CODE if id in CODE else DecisionKind.WORD for id in ids[:count]]
    logprob_N = np.full(count, logprob if temperature else np.nan, np.float32)
    sampling = SamplingParams(np.full(count, temperature, np.float32), np.full(count, -1, np.int32), ())
    decisions = Decisions(np.array(kind, np.int8), np.arange(count, dtype=np.int32), logprob_N, sampling)
    modality = Modality.IMAGE_TOKENS if CODE[0] in ids or role == "sketch" else Modality.TEXT
    return Segment(role, Author.POLICY, modality, True, np.array(ids, np.int32), VOCABULARY.decode(ids), decisions)


def thought(*segments: Segment, stop: StopReason = StopReason.END) -> Trajectory:
    prompt = Segment("prompt", Author.USER, Modality.TEXT, False, np.array([RED], np.int32), "red")
    return Trajectory("red", {}, "strokes", [prompt, *segments], stop=stop)


def observed(text: str) -> Segment:
    return Segment("observation", Author.ENVIRONMENT, Modality.TEXT, False, np.array([RED], np.int32), text)


def test_the_first_decision_that_differs_by_hand():
    plan = [RED, CIRCLE]
    a = thought(written("plan", plan), written("sketch", [VOCABULARY.boi, CODE[0], CODE[1], VOCABULARY.eoi], -2.0, 1))
    b = thought(written("plan", plan), written("sketch", [VOCABULARY.boi, CODE[0], CODE[4], VOCABULARY.eoi], -3.0, 1))
    found = first_difference(a, b, VOCABULARY)
    assert found is not None
    assert (found.role, found.kind, found.position, found.decision) == ("sketch", "code", 2, 4)
    assert (found.a.segment, found.a.number, found.a.id, found.a.shown) == (2, 2, CODE[1], "code 1")
    assert (found.a.logprob_a, found.a.logprob_b) == (-2.0, None)
    assert (found.b.shown, found.b.logprob_a, found.b.logprob_b) == ("code 4", None, -3.0)
    assert first_difference(a, a, VOCABULARY) is None


def test_a_segment_that_became_another_is_told_by_its_first_id():
    """The ids decide what a segment becomes: one policy draws where the other goes on writing."""
    a = thought(written("plan", [RED, CIRCLE]))
    b = thought(written("plan", [RED]), written("sketch", [VOCABULARY.boi, CODE[0]]))
    found = first_difference(a, b, VOCABULARY)
    assert found is not None and (found.role, found.position, found.decision) == ("plan", 1, 1)
    assert (found.a.segment, found.b.segment) == (1, 2)
    assert (found.a.shown, found.b.shown) == ("'circle'", "begins an image")


def test_a_thought_that_ends_earlier():
    a = thought(written("plan", [RED]), stop=StopReason.MAX_TOKENS)
    b = thought(written("plan", [RED, BLUE]))
    found = first_difference(a, b, VOCABULARY)
    assert found is not None and (found.decision, found.role, found.position) == (1, "plan", 1)
    assert (found.a.shown, found.a.id) == ("ends (max tokens)", None) and found.b.shown == "'blue'"
    assert scored_by(BigramPolicy(), [pair_of(a, b, found)], "b")[0].first.a.logprob_b is None


def test_what_the_environment_said_is_told_before_what_followed_from_it():
    a = thought(written("plan", [RED]), observed("3"), written("plan", [BLUE]))
    b = thought(written("plan", [RED]), observed("4"), written("plan", [CIRCLE]))
    found = first_difference(a, b, VOCABULARY)
    assert found is not None and (found.kind, found.role, found.decision) == ("environment", "observation", 1)
    assert (found.a.shown, found.b.shown) == ("3", "4")
    same = thought(written("plan", [RED]), observed("4"), written("plan", [BLUE]))
    assert first_difference(a, same, VOCABULARY).kind == "environment"  # though no decision differs


def test_denoising_steps_part_where_their_latents_do():
    def denoised(second: float) -> Trajectory:
        x_P = np.array([[0.0], [1.0], [second]], np.float32)
        flow = FlowSteps({}, np.array([1, 0.5, 0], np.float32), np.array([0, 1], np.int32), x_P)
        sampling = SamplingParams(np.ones(2, np.float32), np.full(2, -1, np.int32), ())
        made = Decisions(
            np.full(2, DecisionKind.FLOW, np.int8), np.arange(2, dtype=np.int32), np.full(2, -4, np.float32), sampling
        )
        image = Segment("sketch", Author.POLICY, Modality.IMAGE_LATENT, True, decisions=made, flow=flow)
        return thought(image)

    found = first_difference(denoised(2.0), denoised(2.5), VOCABULARY)
    assert found is not None and (found.kind, found.position, found.decision) == ("flow", 1, 1)
    assert (found.a.id, found.a.shown, found.a.logprob_a) == (None, "denoising step 1", -4.0)
    assert first_difference(denoised(2.0), denoised(2.0), VOCABULARY) is None


def test_greedy_decisions_have_no_log_prob():
    a, b = (thought(written("plan", [id], temperature=0.0)) for id in (RED, BLUE))
    found = first_difference(a, b, VOCABULARY)
    assert found is not None and found.a.logprob_a is None and found.b.logprob_b is None
    assert scored_by(BigramPolicy(), [pair_of(a, b, found)], "a")[0].first.b.logprob_a is None


def test_ids_as_a_person_reads_them():
    assert [shown_id(VOCABULARY, id) for id in (RED, CODE[3], VOCABULARY.eos, VOCABULARY.boi, VOCABULARY.eoi)] == [
        "'red'",
        "code 3",
        "ends the turn",
        "begins an image",
        f"id {VOCABULARY.eoi}",
    ]


@given(st.lists(st.sampled_from([RED, BLUE, CIRCLE]), min_size=1, max_size=6), st.data())
def test_any_pair_parts_at_its_first_unequal_id(ids, data):
    other = data.draw(st.lists(st.sampled_from([RED, BLUE, CIRCLE]), min_size=1, max_size=6))
    cut = data.draw(st.integers(0, len(ids)))  # the same ids in two segments are the same thought
    parts = [written("plan", part) for part in (ids[:cut], ids[cut:]) if part]
    found = first_difference(thought(*parts), thought(written("plan", other)), VOCABULARY)
    expected = next((n for n, pair in enumerate(zip(ids, other, strict=False)) if pair[0] != pair[1]), None)
    if expected is None and len(ids) != len(other):
        expected = min(len(ids), len(other))
    assert (None if found is None else found.decision) == expected


# ---- two policies ----


def pair_of(a: Trajectory, b: Trajectory, first, before: float | None = 0.0, after: float | None = 0.0) -> ThoughtPair:
    one, other = (PromptScore(a.prompt, "", {"score": value}) for value in (before, after))
    return ThoughtPair(one, other, "score", a, b, first)


def test_both_choices_have_both_policies_log_probs():
    """The bigram policy's log-probs are in reach: each choice in its own thought, scored by both."""

    class Ids(WordVocabulary):
        def piece(self, id: int) -> str:
            return f"w{id}"

    policies = BigramPolicy(0), BigramPolicy(1)
    checked = 0
    for member in range(6):
        a, b = (policy.sample("prompt 1", {}, 0, member, 3) for policy in policies)
        first = first_difference(a, b, Ids())
        if first is None:
            continue
        pair = scored_by(policies[0], scored_by(policies[1], [pair_of(a, b, first)], "b"), "a")[0].first
        for trajectory, choice in ((a, pair.a), (b, pair.b)):
            before = sum(len(s.decisions) for s in trajectory.segments[: choice.segment] if s.decisions is not None)
            for policy, found in zip(policies, (choice.logprob_a, choice.logprob_b), strict=True):
                with torch.no_grad():
                    scored = score_trajectories(policy, [trajectory])
                assert found == pytest.approx(float(scored.logprob_N[before + choice.number]), abs=1e-5)
        # Up to there both have the same context: of two ids each policy prefers its own more than the other does.
        assert pair.a.logprob_a - pair.b.logprob_a > pair.a.logprob_b - pair.b.logprob_b or first.decision == 0
        checked += 1
    assert checked >= 3 and BOI == 2


def test_the_summary_by_hand():
    def pair(role: str, shared: int, before: float | None, after: float | None) -> ThoughtPair:
        a = thought(written(role, [RED] * shared + [BLUE]))
        b = thought(written(role, [RED] * shared + [CIRCLE]))
        return pair_of(a, b, first_difference(a, b, VOCABULARY), before, after)

    same = pair_of(thought(written("plan", [RED])), thought(written("plan", [RED])), None, 1.0, 1.0)
    pairs = [
        pair("plan", 1, 0.0, 1.0),
        pair("plan", 2, 1.0, 0.5),
        pair("plan", 5, 0.5, 0.5),
        pair("inspect", 4, 0.0, 1.0),
        pair("inspect", 5, None, 1.0),  # not judged under A: neither gained nor lost
        same,
    ]
    found = summarise(pairs)
    assert (found.pairs, found.equal, found.gained, found.lost) == (6, 1, 2, 1)
    assert found.share_equal == pytest.approx(1 / 6)
    assert [(r.role, r.pairs, r.median_decision, r.gained, r.lost) for r in found.roles] == [
        ("plan", 3, 2.0, 1, 1),
        ("inspect", 2, 4.5, 1, 0),
    ]
    assert math.isnan(summarise([]).share_equal)


def test_the_page_shows_the_lost_ones_first_and_says_where_they_part():
    a = thought(written("plan", [RED, BLUE], -0.25))
    b = thought(written("plan", [RED, CIRCLE], -0.5))
    lost, gained = (replace(each, prompt=name) for each, name in ((a, "a lost one"), (a, "a gained one")))
    first = first_difference(a, b, VOCABULARY)
    pairs = [pair_of(gained, b, first, 0.0, 1.0), pair_of(lost, b, first, 1.0, 0.5), pair_of(a, a, None, 1.0, 1.0)]
    score = compare_scores([p.prompt for p in pairs], [p.other for p in pairs], "score").score
    page = render(DiffPage("shapes", "run, step 1", "run, step <2>", pairs, summarise(pairs), score, "score"))
    assert page.index("a lost one") < page.index("a gained one")
    assert "lost -0.50" in page and "gained +1.00" in page and "word at position 1" in page
    assert "after 1 decision in common" in page and "-0.250" in page and "step &lt;2&gt;" in page
    assert page.count(" marked") >= 4  # a frame of each film, and the style
    nothing = [pair_of(a, a, None, 1.0, 1.0)]
    score = compare_scores([p.prompt for p in nothing], [p.other for p in nothing], "score").score
    page = render(DiffPage("shapes", "A", "B", nothing, summarise(nothing), score, "score"))
    assert "All 1 answers are the same, decision by decision" in page and 'class="film"' not in page
