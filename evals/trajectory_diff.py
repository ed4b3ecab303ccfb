"""Two policies on the same prompts under the same noise: where their thoughts part, and what comes of it.

Sampling noise is a function of (seed, group, member, decision), so two thoughts are the same until the first decision
that the policies take differently. Up to there both have the same context, which makes the log-probs of that one
decision under both of them a fair comparison; what follows is of two different thoughts.

Letters: N decisions of a trajectory, in their order.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from evals.heldout import PromptScore
from formats.base import Codes, Vocabulary
from policy.base import Policy
from record.trajectory import Author, DecisionKind, Segment, Trajectory

Kind = Literal["word", "code", "flow", "environment"]


@dataclass(frozen=True)
class Choice:
    """What one of the two policies chose at the first decision that differs."""

    segment: int
    number: int  # of the decision within the segment
    id: int | None  # None: a denoising step, or the environment's
    shown: str  # for a person to read
    logprob_a: float | None = None  # None: nobody scored it, as of greedy decisions
    logprob_b: float | None = None


@dataclass(frozen=True)
class FirstDifference:
    """The first place at which two thoughts differ."""

    role: str  # of the segment, in the first thought
    kind: Kind
    position: int  # of the id in the segment, or the denoising step; of the environment's words 0
    decision: int  # how many decisions both have in common before it
    a: Choice
    b: Choice


@dataclass(frozen=True)
class ThoughtPair:
    """One prompt answered by both."""

    prompt: PromptScore  # with A's scores
    other: PromptScore  # with B's
    measure: str  # the score's name
    a: Trajectory
    b: Trajectory
    first: FirstDifference | None  # None: decision by decision the same

    @property
    def scores(self) -> tuple[float | None, float | None]:
        return self.prompt.measures.get(self.measure), self.other.measures.get(self.measure)

    @property
    def gain(self) -> float:
        """B's score less A's; 0 where one of them has none."""
        a, b = self.scores
        return 0.0 if a is None or b is None else b - a


@dataclass(frozen=True)
class RoleSummary:
    """Of the pairs that part in one role."""

    role: str
    pairs: int
    median_decision: float  # how many decisions they have in common
    gained: int
    lost: int


@dataclass(frozen=True)
class DiffSummary:
    pairs: int
    equal: int
    gained: int
    lost: int
    roles: Sequence[RoleSummary]  # the most frequent first

    @property
    def share_equal(self) -> float:
        return self.equal / self.pairs if self.pairs else math.nan


def first_difference(a: Trajectory, b: Trajectory, vocabulary: Vocabulary) -> FirstDifference | None:
    """Where two thoughts on one prompt part; None: nowhere. Log-probs of the choices are the recorded ones."""
    steps_a, steps_b = _decisions(a), _decisions(b)
    shared = 0
    while shared < min(len(steps_a), len(steps_b)) and _same(a, steps_a[shared], b, steps_b[shared]):
        shared += 1
    parted = shared < max(len(steps_a), len(steps_b))
    at_a = steps_a[shared] if shared < len(steps_a) else (len(a.segments) - 1, -1)
    at_b = steps_b[shared] if shared < len(steps_b) else (len(b.segments) - 1, -1)
    # What the environment said before that may differ though every decision is the same: a tool that is not repeatable.
    last = min(at_a[0], at_b[0]) if parted else min(len(a.segments), len(b.segments)) - 1
    for index in range(last + 1):
        one, other = a.segments[index], b.segments[index]
        if Author.POLICY not in (one.author, other.author) and not _same_content(one, other):
            before = sum(segment < index for segment, _ in steps_a)
            choices = (Choice(index, 0, None, segment.text or "an image") for segment in (one, other))
            return FirstDifference(one.role, "environment", 0, before, *choices)
    if not parted:
        return None
    segment, number = at_a if there_is(at_a) else at_b
    of = a if there_is(at_a) else b
    decisions = of.segments[segment].decisions
    assert decisions is not None
    kind = DecisionKind(int(decisions.kind_N[number]))
    return FirstDifference(
        of.segments[segment].role,
        "flow" if kind == DecisionKind.FLOW else "code" if kind == DecisionKind.CODE else "word",
        int(decisions.position_N[number]),
        shared,
        _choice(a, at_a, vocabulary, "a"),
        _choice(b, at_b, vocabulary, "b"),
    )


def there_is(at: tuple[int, int]) -> bool:
    """Whether there is a decision at a place: the thought had not ended."""
    return at[1] >= 0


def _decisions(trajectory: Trajectory) -> list[tuple[int, int]]:
    """(segment, number) of every decision that the policy took."""
    return [
        (index, number)
        for index, segment in enumerate(trajectory.segments)
        if segment.author is Author.POLICY and segment.decisions is not None
        for number in range(len(segment.decisions))
    ]


def _same(a: Trajectory, at_a: tuple[int, int], b: Trajectory, at_b: tuple[int, int]) -> bool:
    one, other = a.segments[at_a[0]], b.segments[at_b[0]]
    assert one.decisions is not None and other.decisions is not None
    if (one.flow is None) != (other.flow is None):
        return False
    if one.flow is not None and other.flow is not None:
        same = np.array_equal(one.flow.x_next_N[at_a[1]], other.flow.x_next_N[at_b[1]])
        return at_a == at_b and bool(same)
    return _id(one, at_a[1]) == _id(other, at_b[1])


def _id(segment: Segment, number: int) -> int:
    assert segment.decisions is not None
    return int(segment.ids[segment.decisions.position_N[number]])


def _same_content(one: Segment, other: Segment) -> bool:
    if not np.array_equal(one.ids, other.ids) or one.text != other.text:
        return False
    return all(
        np.array_equal(a, b) if a is not None and b is not None else a is b
        for a, b in zip(_media(one), _media(other), strict=True)
    )


def _media(segment: Segment) -> tuple[np.ndarray | None, np.ndarray | None]:
    return segment.image, None if segment.frames is None else segment.frames.frames_F


def _choice(trajectory: Trajectory, at: tuple[int, int], vocabulary: Vocabulary, whose: Literal["a", "b"]) -> Choice:
    segment, number = at
    if not there_is(at):
        return Choice(segment, number, None, f"ends ({str(trajectory.stop).replace('_', ' ')})")
    this = trajectory.segments[segment]
    assert this.decisions is not None
    recorded = float(this.decisions.logprob_N[number])
    known = None if math.isnan(recorded) else recorded
    id = None if this.flow is not None else _id(this, number)
    shown = f"denoising step {this.decisions.position_N[number]}" if id is None else shown_id(vocabulary, id)
    if whose == "a":
        return Choice(segment, number, id, shown, logprob_a=known)
    return Choice(segment, number, id, shown, logprob_b=known)


def shown_id(vocabulary: Vocabulary, id: int) -> str:
    """An id as a person reads it: a word, the number of a visual code, or what a marker does."""
    imaging = vocabulary.imaging
    if isinstance(imaging, Codes):
        code = np.flatnonzero(imaging.ids == id)
        if len(code):
            return f"code {int(code[0])}"
    if id == vocabulary.eos:
        return "ends the turn"
    if id == getattr(imaging, "open", None):
        return "begins an image"
    text = vocabulary.piece(id)
    return f"'{text.strip() or text}'" if text else f"id {id}"


def scored_by(
    policy: Policy, pairs: Sequence[ThoughtPair], whose: Literal["a", "b"], budget: int | None = None
) -> list[ThoughtPair]:
    """The pairs with the log-prob that `policy` gives to what the other one chose.

    Args:
        whose: which of the two `policy` is.
        budget: slots of one forward, as grpo.tokens_per_micro_batch.
    """
    return [_scored(policy, pair, whose, budget) for pair in pairs]


def _scored(policy: Policy, pair: ThoughtPair, whose: Literal["a", "b"], budget: int | None) -> ThoughtPair:
    first = pair.first
    if first is None or first.kind == "environment":
        return pair
    trajectory, choice = (pair.b, first.b) if whose == "a" else (pair.a, first.a)
    logprob = _logprob(policy, trajectory, choice, budget)
    if whose == "a":
        return replace(pair, first=replace(first, b=replace(choice, logprob_a=logprob)))
    return replace(pair, first=replace(first, a=replace(choice, logprob_b=logprob)))


def _logprob(policy: Policy, trajectory: Trajectory, choice: Choice, budget: int | None) -> float | None:
    """What a policy gives to one decision that another took, under the sampling parameters of that one."""
    if choice.number < 0:
        return None
    decisions = trajectory.segments[choice.segment].decisions
    assert decisions is not None
    greedy_N = decisions.sampling.greedy_N
    if greedy_N[choice.number]:
        return None
    segments = [replace(s, trained=index == choice.segment) for index, s in enumerate(trajectory.segments)]
    with torch.no_grad():
        scored = policy.score(policy.passes([replace(trajectory, segments=segments)], budget))
    return float(scored.logprob_N[int((~greedy_N[: choice.number]).sum())])


def summarise(pairs: Sequence[ThoughtPair]) -> DiffSummary:
    """The pairs in numbers. Gained are prompts that B answers with a higher score than A."""
    roles: dict[str, list[ThoughtPair]] = {}
    for pair in pairs:
        if pair.first is not None:
            roles.setdefault(pair.first.role, []).append(pair)
    return DiffSummary(
        len(pairs),
        sum(pair.first is None for pair in pairs),
        sum(pair.gain > 0 for pair in pairs),
        sum(pair.gain < 0 for pair in pairs),
        [
            RoleSummary(
                role,
                len(parted),
                float(statistics.median(pair.first.decision for pair in parted if pair.first is not None)),
                sum(pair.gain > 0 for pair in parted),
                sum(pair.gain < 0 for pair in parted),
            )
            for role, parted in sorted(roles.items(), key=lambda item: (-len(item[1]), item[0]))
        ],
    )
