"""Ways to spend test-time compute on one prompt: what each would have answered, read off thoughts that were written.

A *thought* is a trajectory as its pictures, in their order: what each scores, what its critique says, and how many
tokens were sampled until then. A thought of R pictures holds those of fewer rounds, so one sampling pass serves every
round limit, and one set of n thoughts every smaller set.

Rounds: one thought goes on for k rounds of drawing and inspecting, and one of its pictures is taken.
Best of n: n thoughts are begun anew, and one of their pictures is taken.

`oracle` takes the picture of the highest score, which nobody knows at test time: an upper bound.

Letters: M members of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import comb

import numpy as np


@dataclass(frozen=True)
class Picture:
    """One picture of a thought."""

    score: float | None  # of the thought as if it had ended here; None: not judged
    tokens: int  # sampled from the beginning up to and with the picture
    read: int  # and with the words in which its verdict is read; where there is none, with all before the next picture
    fine: bool | None = None  # what its critique says; None: no verdict, or nobody read it
    sure: float = 1.0  # probability with which the verdict's word was sampled

    @property
    def p_fine(self) -> float:
        """The policy's own probability of "fine" where it says fine or wrong by one word; 0 without a verdict."""
        return 0.0 if self.fine is None else self.sure if self.fine else 1 - self.sure


@dataclass(frozen=True)
class Thought:
    """One trajectory, measured. Tokens are ids that the policy wrote, forced ones included, and denoising steps."""

    prompt: int  # number of the held-out prompt
    member: int
    pictures: tuple[Picture, ...]
    score: float | None  # of the whole thought: its last picture, or none
    tokens: int  # of the whole thought
    stop: str = "end"


@dataclass(frozen=True)
class Spent:
    """What an arm answers one prompt with, on average over thoughts, and at what cost."""

    score: float | None  # None: nothing that it could take was judged
    tokens: float
    pictures: float
    depth: float  # tokens that are written one after another: what no batch of parallel thoughts can hide


# ---- rounds: (thought, round limit) -> what is answered -----------------------------------------------------------


def at_limit(thought: Thought, rounds: int) -> Spent:
    """The picture of the last round. A thought that ended, or was cut off, before has the score of its whole."""
    if len(thought.pictures) < rounds:
        return Spent(thought.score, thought.tokens, len(thought.pictures), thought.tokens)
    picture = thought.pictures[rounds - 1]
    return Spent(picture.score, picture.tokens, rounds, picture.tokens)


def until_fine(thought: Thought, rounds: int) -> Spent:
    """The first picture that its critique calls fine, else that of the last round, whose critique is not waited for."""
    for number, picture in enumerate(thought.pictures[: rounds - 1], 1):
        if picture.fine:
            return Spent(picture.score, picture.read, number, picture.read)
    return at_limit(thought, rounds)


def last_fine(thought: Thought, rounds: int) -> Spent:
    """All rounds, then the last picture that its critique calls fine; where there is none, that of the last round."""
    fine = [picture for picture in thought.pictures[:rounds] if picture.fine]
    limit = at_limit(thought, rounds)
    tokens = thought.pictures[rounds - 1].read if len(thought.pictures) >= rounds else thought.tokens
    return Spent(fine[-1].score if fine else limit.score, tokens, limit.pictures, tokens)


def best_score(thought: Thought, rounds: int) -> Spent:
    """All rounds, then the picture of the highest score."""
    return _among(thought, rounds, max)


def any_picture(thought: Thought, rounds: int) -> Spent:
    """All rounds, then a picture at random: the mean over them."""
    return _among(thought, rounds, lambda scores: math.fsum(scores) / len(scores))


def _among(thought: Thought, rounds: int, choose: Callable[[list[float]], float]) -> Spent:
    limit = at_limit(thought, rounds)
    scores = [picture.score for picture in thought.pictures[:rounds] if picture.score is not None]
    score = choose(scores) if scores else None if thought.pictures else thought.score
    return Spent(score, limit.tokens, limit.pictures, limit.depth)


# ---- best of n ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """What one of n independent thoughts offers, and what choosing it goes by."""

    score: float | None
    tokens: int
    pictures: int
    fine: bool | None
    p_fine: float


def first_picture(thought: Thought, reads: bool) -> Candidate:
    """The thought broken off after its first picture; `reads`: after the words that criticise it."""
    if not thought.pictures:
        return Candidate(thought.score, thought.tokens, 0, None, 0.0)
    picture = thought.pictures[0]
    return Candidate(picture.score, picture.read if reads else picture.tokens, 1, picture.fine, picture.p_fine)


def whole_thought(thought: Thought, reads: bool = True) -> Candidate:
    """The thought as the policy ended it: its last picture, and what the critique of that says."""
    last = thought.pictures[-1] if thought.pictures else Picture(None, 0, 0)
    return Candidate(thought.score, thought.tokens, len(thought.pictures), last.fine, last.p_fine)


BY: dict[str, Callable[[Candidate], float]] = {
    "critique": lambda c: float(c.fine is True),
    "p_fine": lambda c: c.p_fine,
    "oracle": lambda c: -math.inf if c.score is None else c.score,
    "random": lambda c: 0.0,
}


def best_of(candidates: Sequence[Candidate], n: int, by: str) -> Spent:
    """The candidate of the highest key among n, on average over every n of them; ties are broken at random.

    Candidates without a score are left out; where fewer than n are left, all of them are taken.
    """
    judged = [c for c in candidates if c.score is not None]
    if not judged:
        mean = float(np.mean([c.tokens for c in candidates]))
        return Spent(None, n * mean, n * float(np.mean([c.pictures for c in candidates])), mean)
    tokens_M = [float(c.tokens) for c in judged]
    key = BY[by]
    return Spent(
        expected_choice([key(c) for c in judged], [float(c.score or 0.0) for c in judged], n),
        n * float(np.mean(tokens_M)),
        n * float(np.mean([c.pictures for c in judged])),
        expected_choice(tokens_M, tokens_M, n),
    )


def expected_choice(key_M: Sequence[float], value_M: Sequence[float], n: int) -> float:
    """The mean, over every subset of n of M members, of the value of its member of the highest key.

    Exact: members of one key that is not the subset's highest are never taken, and among equals each is as likely. With
    C(m) subsets of n out of m, h members above a key and t of it, C(M - h) - C(M - h - t) of the subsets have their
    highest key there. With keys that are the values this is pass@k's estimator (Chen et al., arXiv:2107.03374).
    """
    n = min(n, len(key_M))
    by_key: dict[float, list[float]] = {}
    for key, value in zip(key_M, value_M, strict=True):
        by_key.setdefault(key, []).append(value)
    left, total = len(key_M), 0.0
    for key in sorted(by_key, reverse=True):
        values = by_key[key]
        subsets = comb(left, n) - comb(left - len(values), n)
        total += subsets / comb(len(key_M), n) * (math.fsum(values) / len(values))
        left -= len(values)
    return total


# ---- the arms -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to spend compute.

    Attributes:
        name: in scaling.json, in tables and plots.
        over: "rounds" or "samples": what its budget counts.
        chosen: "critique", "p_fine", "oracle", "random", or "nobody": the last picture is taken.
        forced: its thoughts may not end before the last round.
    """

    name: str
    label: str
    over: str
    chosen: str
    forced: bool
    spend: Callable[[Sequence[Thought], int], Spent] = field(repr=False)

    @property
    def reads(self) -> bool:
        """Whether it needs the policy's critiques read."""
        return self.chosen in ("critique", "p_fine")


def _rounds(name: str, label: str, chosen: str, forced: bool, of: Callable[[Thought, int], Spent]) -> Arm:
    return Arm(name, label, "rounds", chosen, forced, lambda thoughts, k: mean_spent([of(t, k) for t in thoughts]))


def _samples(name: str, label: str, chosen: str, of: Callable[[Thought, bool], Candidate]) -> Arm:
    reads = chosen in ("critique", "p_fine")
    return Arm(
        name,
        label,
        "samples",
        chosen,
        False,
        lambda thoughts, n: best_of([of(t, reads) for t in thoughts], n, chosen),
    )


ARMS = (
    _rounds("own_end", "ends where the policy ends", "nobody", False, at_limit),
    _rounds("always", "always on to the limit", "nobody", True, at_limit),
    _rounds("until_fine", "until its critique says fine", "critique", True, until_fine),
    _rounds("last_fine", "its last approved picture", "critique", True, last_fine),
    _rounds("any_picture", "a picture at random", "random", True, any_picture),
    _rounds("best_picture", "the best picture (oracle)", "oracle", True, best_score),
    _samples("sketches/critique", "first sketches, one it calls fine", "critique", first_picture),
    _samples("sketches/p_fine", "first sketches, by P(fine)", "p_fine", first_picture),
    _samples("sketches/random", "first sketches, at random", "random", first_picture),
    _samples("sketches/oracle", "first sketches, the best (oracle)", "oracle", first_picture),
    _samples("thoughts/critique", "whole thoughts, one it calls fine", "critique", whole_thought),
    _samples("thoughts/p_fine", "whole thoughts, by P(fine)", "p_fine", whole_thought),
    _samples("thoughts/random", "whole thoughts, at random", "random", whole_thought),
    _samples("thoughts/oracle", "whole thoughts, the best (oracle)", "oracle", whole_thought),
)
BY_NAME = {arm.name: arm for arm in ARMS}


def mean_spent(found: Sequence[Spent]) -> Spent:
    """Of one prompt's thoughts; scores over those that were judged."""
    scores = [spent.score for spent in found if spent.score is not None]
    return Spent(
        math.fsum(scores) / len(scores) if scores else None,
        float(np.mean([spent.tokens for spent in found])),
        float(np.mean([spent.pictures for spent in found])),
        float(np.mean([spent.depth for spent in found])),
    )
