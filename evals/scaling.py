"""Test-time scaling: a held-out score against rounds, pictures, sampled tokens and seconds, arm by arm.

`measure_thoughts` turns trajectories into thoughts (scaling_arms.py): each picture scored as if the thought had ended
there, each critique read once. `compare_arms` spends them by every arm, and holds the arms of rounds against the best
of n at equal cost. All arms are over the same prompts, and draw the same resamples of them.

Tokens are exact. Seconds are the wall clock of the engine's whole call, shared out by tokens: what the compute costs
at that batch, and not how long one answer takes to come. For that there is `depth`, the tokens that one answer has to
wait for, one after another.

Letters: P prompts, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from evals.heldout import EvaluationError
from evals.scaling_arms import ARMS, Arm, Picture, Spent, Thought
from formats.base import Format
from formats.grammar import END
from record.trajectory import Author, Modality, Segment, StopReason, Trajectory
from tasks.base import Evaluation

RESAMPLES, LEVEL = 5_000, 0.95
SLACK = 1.1  # by which costs may differ and still be told as equal, where no n comes nearer
COSTS = ("tokens", "pictures", "seconds")


# ---- from trajectories to thoughts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Critic:
    """How the policy's words about its own pictures are read.

    Args:
        roles: of the segments that criticise the last picture before them.
        verdict: a critique's text to the word that stands for its verdict, and whether it approves; None: no verdict.
        piece: an id's text.
    """

    roles: Sequence[str]
    verdict: Callable[[str], tuple[str, bool] | None]
    piece: Callable[[int], str]


def measure_thoughts(
    groups: Sequence[Sequence[Trajectory]], evaluation: Evaluation, fmt: Format, rounds: int, critic: Critic | None
) -> list[list[Thought]]:
    """Trajectories by prompt as thoughts by prompt.

    Args:
        evaluation: its `score` is what pictures are scored by; it is shown copies, each cut after a picture.
        rounds: so many pictures of a thought are scored, the first ones.
        critic: None: nobody reads critiques.
    """
    rows = [trajectory for group in groups for trajectory in group]
    whole = _scores(evaluation, rows)
    drawn = [_pictures(trajectory) for trajectory in rows]
    scored: list[list[float | None]] = [[] for _ in rows]
    for number in range(rounds):
        cut = {
            row: up_to(rows[row], pictures[number], fmt) for row, pictures in enumerate(drawn) if len(pictures) > number
        }
        shorter = [row for row, part in cut.items() if len(part.segments) < len(rows[row].segments)]
        score_of = dict(zip(shorter, _scores(evaluation, [cut[row] for row in shorter]), strict=True))
        for row in cut:
            scored[row].append(score_of.get(row, whole[row]))
    numbers = [number for number, group in enumerate(groups) for _ in group]
    thoughts: list[list[Thought]] = [[] for _ in groups]
    for row, trajectory in enumerate(rows):
        pictures = [
            _picture(trajectory, drawn[row], index, scored[row][index] if index < rounds else None, critic)
            for index in range(len(drawn[row]))
        ]
        thoughts[numbers[row]].append(
            Thought(
                numbers[row],
                trajectory.member,
                tuple(pictures),
                whole[row],
                sum(map(tokens_of, trajectory.segments)),
                str(trajectory.stop),
            )
        )
    return thoughts


def tokens_of(segment: Segment) -> int:
    """What the policy sampled in a segment: ids, forced ones included, and denoising steps."""
    if segment.author is not Author.POLICY:
        return 0
    return len(segment.ids) + (len(segment.flow.time_M) - 1 if segment.flow is not None else 0)


def up_to(trajectory: Trajectory, picture: int, fmt: Format) -> Trajectory:
    """The trajectory as if it had ended with the picture at that segment, with the critique that follows it where the
    format lets a turn end after one, and not after the picture itself."""
    follow = fmt.grammar.follow if hasattr(fmt, "grammar") else {}
    segments, stop = trajectory.segments, picture + 1
    if stop < len(segments) and END not in follow.get(segments[picture].role, (END,)):
        after = segments[stop]
        if after.author is Author.POLICY and after.modality is Modality.TEXT and END in follow.get(after.role, ()):
            stop += 1
    cut = trajectory.stop if stop == len(segments) else StopReason.END
    return _copy(replace(trajectory, segments=segments[:stop], stop=cut))


def _copy(trajectory: Trajectory) -> Trajectory:
    """For an evaluation to leave its rewards in."""
    return replace(trajectory, rewards={}, segment_rewards={}, reward=None, info=dict(trajectory.info))


def _scores(evaluation: Evaluation, trajectories: Sequence[Trajectory]) -> list[float | None]:
    if not trajectories:
        return []
    scores = evaluation([_copy(trajectory) for trajectory in trajectories])[evaluation.score]
    return [None if score is None or not math.isfinite(score) else float(score) for score in scores]


def _pictures(trajectory: Trajectory) -> list[int]:
    """The segments in which the policy drew."""
    return [i for i, s in enumerate(trajectory.segments) if s.author is Author.POLICY and s.image is not None]


def _picture(
    trajectory: Trajectory, drawn: Sequence[int], index: int, score: float | None, critic: Critic | None
) -> Picture:
    segments = trajectory.segments
    start, stop = drawn[index], drawn[index + 1] if index + 1 < len(drawn) else len(segments)
    tokens = sum(map(tokens_of, segments[: start + 1]))
    if critic is None:
        return Picture(score, tokens, tokens)
    for at in range(start + 1, stop):
        segment = segments[at]
        if segment.author is Author.POLICY and segment.modality is Modality.TEXT and segment.role in critic.roles:
            found = critic.verdict(segment.text)
            if found is not None:
                word, fine = found
                return Picture(
                    score, tokens, sum(map(tokens_of, segments[: at + 1])), fine, _sureness(segment, word, critic)
                )
    return Picture(score, tokens, sum(map(tokens_of, segments[:stop])))


def _sureness(segment: Segment, word: str, critic: Critic) -> float:
    """The probability with which the verdict's word was sampled; 1 where it is not one id that was chosen by chance."""
    at = [t for t, id in enumerate(segment.ids.tolist()) if word and critic.piece(id).strip() == word]
    if not at or segment.decisions is None:
        return 1.0
    chosen = np.flatnonzero(segment.decisions.position_N == at[-1])
    logprob = float(segment.decisions.logprob_N[chosen[0]]) if len(chosen) else math.nan
    return math.exp(min(logprob, 0.0)) if math.isfinite(logprob) else 1.0


# ---- from thoughts to scores by cost --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingPass:
    """Thoughts that one call of the engine wrote, by prompt."""

    thoughts: Sequence[Sequence[Thought]]
    seconds: float  # of the whole call

    @property
    def tokens(self) -> int:
        return sum(thought.tokens for group in self.thoughts for thought in group)

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / self.tokens if self.tokens else 0.0

    def as_json(self, rounds: int | None) -> dict[str, Any]:
        """`rounds`: the limit that its thoughts were held to; None: to none."""
        rows = [thought for group in self.thoughts for thought in group]
        found = {
            "thoughts": len(rows),
            "tokens": self.tokens,
            "pictures": sum(len(thought.pictures) for thought in rows),
            "seconds": self.seconds,
            "cut_off": sum(StopReason(thought.stop).cut_off for thought in rows) / len(rows),
        }
        return found if rounds is None else found | {"short": sum(len(t.pictures) < rounds for t in rows) / len(rows)}


@dataclass(frozen=True)
class Point:
    """One arm at one budget: means over the tags, as the score of an evaluation is."""

    arm: Arm
    budget: int
    score: float
    low: float  # percentile interval over prompts
    high: float
    tokens: float
    pictures: float
    seconds: float
    depth: float
    gain: float  # on one first picture
    gain_low: float
    gain_high: float

    def as_json(self) -> dict[str, Any]:
        values = {k: v for k, v in vars(self).items() if k != "arm"}
        arm = {"arm": self.arm.name, "label": self.arm.label, "over": self.arm.over, "chosen": self.arm.chosen}
        return arm | values


@dataclass(frozen=True)
class Match:
    """An arm of rounds, and the best of as many n as come nearest to what it costs."""

    arm: str
    rounds: int
    rival: str
    cost: str  # by which they are matched
    n: int
    spent: float  # by the arm
    rival_spent: float
    difference: float  # the arm's score less the rival's
    low: float
    high: float
    limit: str  # "": matched; "dearer": one sample costs more already; "all": more samples than there are would do

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Scaling:
    """What was measured."""

    points: Sequence[Point]
    matches: Sequence[Match]
    judged: int  # prompts that every arm has a score of: all numbers are over these
    prompts: int
    notes: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class _Column:
    """An arm at a budget, by prompt."""

    score_P: np.ndarray  # NaN: not judged
    cost: dict[str, np.ndarray]  # by measure, [P]


def compare_arms(
    natural: SamplingPass,
    forced: SamplingPass | None,
    tags: Sequence[str],
    rounds: Sequence[int],
    samples: Sequence[int],
    reads: bool,
    seed: int = 0,
    resamples: int = RESAMPLES,
    notes: Sequence[str] = (),
) -> Scaling:
    """Every arm at every budget, with percentile intervals over prompts, drawn with replacement within each tag.

    Args:
        natural: thoughts that end where the policy ends them, at least max(samples) a prompt.
        forced: thoughts that go on to the largest number of rounds; None: no arm needs them.
        tags: of the prompts.
        reads: whether critiques were read.

    Raises:
        EvaluationError: no prompt has a score under every arm.
    """
    columns: dict[tuple[str, int], _Column] = {}
    arms = [arm for arm in ARMS if (reads or not arm.reads) and (forced is not None or not arm.forced)]
    members = min(len(group) for group in natural.thoughts)
    for arm in arms:
        written = forced if arm.forced and forced is not None else natural
        for budget in rounds if arm.over == "rounds" else range(1, members + 1):
            spent = [arm.spend(thoughts, budget) for thoughts in written.thoughts]
            columns[arm.name, budget] = _column(spent, written.seconds_per_token)
    judged_P = np.all([np.isfinite(column.score_P) for column in columns.values()], axis=0)
    if not judged_P.any():
        raise EvaluationError(f"none of {len(tags)} held-out prompts has a score under every arm of the scaling")
    kept_tags = [tag for tag, judged in zip(tags, judged_P, strict=True) if judged]
    alone = sum(kept_tags.count(tag) == 1 for tag in set(kept_tags))
    if alone:
        notes = [*notes, f"{alone} kind(s) of prompt have one prompt each, whose spread no interval holds"]
    mean = _Means(judged_P, kept_tags, seed, resamples)
    base_P = columns["sketches/random", 1].score_P
    points = []
    for arm in arms:
        for budget in rounds if arm.over == "rounds" else samples:
            column = columns[arm.name, budget]
            gain, gain_low, gain_high = mean.interval(column.score_P - base_P)
            score, low, high = mean.interval(column.score_P)
            cost = {name: mean(values_P) for name, values_P in column.cost.items()}
            points.append(
                Point(arm, budget, score, low, high, **cost, gain=gain, gain_low=gain_low, gain_high=gain_high)
            )
    matches = [
        _match(columns, mean, arm.name, budget, rival, cost, members)
        for arm in arms
        if arm.over == "rounds"
        for budget in rounds
        for rival in rivals(arm, reads)
        for cost in COSTS
    ]
    return Scaling(points, matches, int(judged_P.sum()), len(tags), tuple(notes))


def rivals(arm: Arm, reads: bool) -> list[str]:
    """What an arm of rounds is held against: the best of n that knows as much as the arm does."""
    chosen = {
        "critique": ["critique", "p_fine"],
        "nobody": ["critique", "p_fine"] if reads else ["random"],
        "oracle": ["oracle"],
        "random": ["random"],
    }[arm.chosen]
    return [f"{what}/{by}" for what in ("sketches", "thoughts") for by in chosen]


def _column(spent: Sequence[Spent], seconds_per_token: float) -> _Column:
    tokens_P = np.array([s.tokens for s in spent])
    return _Column(
        np.array([math.nan if s.score is None else s.score for s in spent]),
        {
            "tokens": tokens_P,
            "pictures": np.array([s.pictures for s in spent]),
            "seconds": tokens_P * seconds_per_token,
            "depth": np.array([s.depth for s in spent]),
        },
    )


def _match(
    columns: dict[tuple[str, int], _Column],
    mean: _Means,
    arm: str,
    budget: int,
    rival: str,
    cost: str,
    members: int,
) -> Match:
    own = columns[arm, budget]
    spent = mean(own.cost[cost])
    of_n = [mean(columns[rival, n].cost[cost]) for n in range(1, members + 1)]
    n = 1 + int(np.argmin(np.abs(np.array(of_n) - spent)))
    limit = "dearer" if of_n[0] > spent * SLACK else "all" if of_n[-1] * SLACK < spent else ""
    difference, low, high = mean.interval(own.score_P - columns[rival, n].score_P)
    return Match(arm, budget, rival, cost, n, spent, of_n[n - 1], difference, low, high, limit)


class _Means:
    """The mean of the tags' means of a column, and its interval over resampled prompts: the same ones for all columns.

    Percentile intervals (Efron, 1979), as evals/bootstrap.py has them.
    """

    def __init__(self, judged_P: np.ndarray, tags: Sequence[str], seed: int, resamples: int) -> None:
        self.judged_P = judged_P
        names, tag_P = np.unique(np.asarray(tags), return_inverse=True)
        rng = np.random.default_rng(seed)
        self.weight_P = np.zeros(len(tags))
        self.weight_RP = np.zeros((resamples, len(tags)))
        for number in range(len(names)):
            at = np.flatnonzero(tag_P == number)
            share = 1 / (len(names) * len(at))
            self.weight_P[at] = share
            self.weight_RP[:, at] = share * rng.multinomial(len(at), np.full(len(at), 1 / len(at)), resamples)

    def __call__(self, value_P: np.ndarray) -> float:
        return float(self.weight_P @ value_P[self.judged_P])

    def interval(self, value_P: np.ndarray) -> tuple[float, float, float]:
        """(mean, low, high)"""
        low, high = np.quantile(self.weight_RP @ value_P[self.judged_P], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        # Rounded: what is the same but for the order of its sums is no difference.
        mean, low, high = (round(float(end), 9) + 0.0 for end in (self(value_P), low, high))
        return mean, low, high
