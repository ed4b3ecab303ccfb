"""Demonstrations as if the policy had sampled them: each trained segment gets the context that it would have sampled
from, and what the policy would have decided becomes decisions. `Policy.score` of these is minus the cross-entropy.

A decision here is one under the law that a policy learns: temperature 1, over the whole vocabulary. An image's end
marker is forced in sampling and therefore no decision; a latent has none, and is learned by the family's own loss.

Letters: T ids of a segment, N its decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from formats.base import Codes, Format, Latent, SeenOnly, whole_history
from formats.questions import questions
from policy.base import Pass, Policy
from policy.context import resolve
from record.trajectory import (
    Author,
    DecisionKind,
    Decisions,
    Modality,
    SamplingParams,
    Segment,
    Trajectory,
)
from runtime.errors import UserError

QUESTIONS: Format = questions()


@dataclass(frozen=True)
class Example:
    """A demonstration to learn from, and the passes that score it."""

    trajectory: Trajectory
    passes: tuple[Pass, ...]


@dataclass(frozen=True)
class Cut:
    """How a set of demonstrations met the length limit."""

    rows: int
    shortened: int  # that lost segments from their end
    dropped: int  # in which nothing learnable was left


def examples(
    trajectories: Sequence[Trajectory],
    fmt: Format,
    policy: Policy,
    max_length: int,
    dropout: float = 0.0,
    seed: int = 0,
    latents: bool = True,
) -> tuple[list[Example], Cut]:
    """What the policy itself would have to decide. Questions (formats/questions.py) have the contexts of their own
    format, all others those of `fmt`. A demonstration that is longer than `max_length` slots loses whole
    segments from its end, so no image is ever cut.

    Args:
        dropout: the share of images that are learned under one of their guidance branches' contexts; which ones is a
            function of the seed.
        latents: whether the family has a loss that learns them.

    Raises:
        UserError: nothing is left to learn from; ids that the vocabulary lacks; a context that the family cannot feed.
    """
    found: list[Example] = []
    shortened = dropped = 0
    for index, trajectory in enumerate(trajectories):
        drops = np.random.default_rng([seed, index]) if dropout else None
        own = QUESTIONS if trajectory.format == QUESTIONS.name else fmt
        forced = teacher_forced(trajectory, own, policy, max_length, dropout, drops)
        shortened += len(forced.segments) < len(trajectory.segments)
        if learnable(forced, latents):
            found.append(_example(forced, policy))
        else:
            dropped += 1
    if not found:
        raise UserError(
            f"sft: no demonstration has a trained segment within {max_length} ids; raise sft.max_length "
            "or look at the demonstrations' segments"
        )
    return found, Cut(len(found), shortened, dropped)


def examples_after_separator(
    trajectories: Sequence[Trajectory], policy: Policy, max_length: int
) -> tuple[list[Example], Cut]:
    """What the release of Thinking with Generated Images (arXiv:2505.22525) learns: every id after the prompt's
    separator, observations, mistakes and the forced end marker of an image too.

    One that is longer than `max_length` is left out whole; 5119 is the release's limit. One with nothing after its
    separator stays, for its padding.

    Raises:
        UserError: the tokenizer has no separator; a demonstration holds none or several, or does not end its prompt
            with it; none is left; ids that the vocabulary lacks.
    """
    separator = policy.vocabulary.sep
    if separator is None:
        raise UserError(
            "sft.labels=release: learns what comes after the prompt's separator, and the tokenizer has none; "
            "take sft.labels=default"
        )
    found: list[Example] = []
    for index, trajectory in enumerate(trajectories):
        if trajectory.num_tokens() > max_length:
            continue
        count = sum(int((segment.ids == separator).sum()) for segment in trajectory.segments)
        asked = [number for number, segment in enumerate(trajectory.segments) if segment.author is Author.USER]
        ends = bool(asked) and trajectory.segments[asked[-1]].ids[-1:].tolist() == [separator]
        if count != 1 or not ends:
            where = "" if count != 1 else ", and not at the prompt's end"
            raise UserError(
                f"demonstration {index} ({trajectory.prompt!r}): its ids hold the separator (id {separator}) {count} "
                f"times{where}; sft.labels=release learns what comes after the only one, which ends the prompt"
            )
        segments = list(trajectory.segments)
        forced = replace(trajectory, segments=segments)
        for number, segment in enumerate(segments):
            if segment.author is Author.USER or not len(segment.ids):
                continue
            context = resolve(policy, forced, [whole_history(number)])[0].context
            kind_T = _kinds(segment, policy)
            kind_T[kind_T < 0] = DecisionKind.WORD
            decisions = _decisions(kind_T, np.arange(len(kind_T)))
            segments[number] = replace(segment, trained=True, contexts=(context,), decisions=decisions)
        example = _example(forced, policy)
        if not example.passes:  # nothing comes after the separator, and its padding is learned all the same
            example = Example(forced, (Pass(forced, (), forced.num_tokens(), frozenset(), 0),))
        found.append(example)
    if not found:
        raise UserError(f"sft: no demonstration is within {max_length} ids; raise sft.max_length")
    return found, Cut(len(found), 0, len(trajectories) - len(found))


def teacher_forced(
    trajectory: Trajectory,
    fmt: Format,
    policy: Policy,
    max_length: int,
    dropout: float = 0.0,
    drops: np.random.Generator | None = None,
) -> Trajectory:
    """A copy with contexts and decisions on its trained segments, without the segments that don't fit.

    Args:
        dropout, drops: the probability that an image's context is one of its guidance branches', and what draws it.

    Raises ContextError for a context that the family cannot feed.
    """
    forced = replace(trajectory, segments=[])
    for number, segment in enumerate(trajectory.segments):
        if segment.author is not Author.POLICY:
            forced.segments.append(segment)
            continue
        full, *branches = fmt.contexts(trajectory, number)
        if branches and drops is not None and drops.random() < dropout:
            full = replace(branches[int(drops.integers(len(branches)))], branch=full.branch)
        resolved = resolve(policy, trajectory, [full])[0]
        if resolved.slots + own_slots(segment, policy) > max_length:
            break
        if not segment.trained:
            forced.segments.append(replace(segment, contexts=(), decisions=None, flow=None))
            continue
        kind_T = _kinds(segment, policy)
        decided_N = np.flatnonzero(kind_T >= 0)
        if not resolved.slots:
            decided_N = decided_N[decided_N > 0]  # nothing stands before the first id, so nothing predicts it
        decisions = _decisions(kind_T[decided_N], decided_N)
        forced.segments.append(replace(segment, contexts=(resolved.context,), decisions=decisions, flow=None))
    return forced


def learnable(trajectory: Trajectory, latents: bool) -> bool:
    """Whether anything in it is learned: by decisions or, with `latents`, as one."""
    return any(
        segment.trained
        and segment.contexts
        and (latents and segment.latent is not None or len(segment.decisions or ()))
        for segment in trajectory.segments
    )


def own_slots(segment: Segment, policy: Policy) -> int:
    """What a segment takes in all forms in which it is seen again."""
    extents = [policy.extent(segment, form) for form in policy.forms(segment)]
    return max(sum(extent.slots for extent in extents if extent is not None), len(segment.ids))


def _example(trajectory: Trajectory, policy: Policy) -> Example:
    largest = max((int(segment.ids.max()) for segment in trajectory.segments if len(segment.ids)), default=0)
    if largest >= policy.vocabulary.size:
        raise UserError(
            f"demonstration '{trajectory.prompt}': holds id {largest}, but the policy's vocabulary has "
            f"{policy.vocabulary.size}; the trajectories were written by another tokenizer"
        )
    return Example(trajectory, tuple(policy.passes([trajectory])))


def _kinds(segment: Segment, policy: Policy) -> np.ndarray:
    """int8 [T]: the DecisionKind of each id, -1 where it is forced."""
    kind_T = np.full(len(segment.ids), DecisionKind.WORD, np.int8)
    imaging = policy.vocabulary.imaging
    if segment.modality is Modality.TEXT or isinstance(imaging, SeenOnly):
        return kind_T
    if isinstance(imaging, Codes):
        kind_T[:] = DecisionKind.CODE
        kind_T[: int(imaging.open is not None)] = DecisionKind.WORD  # the opening marker is a word's choice
    if isinstance(imaging, Codes | Latent) and imaging.close is not None:
        kind_T[-1:] = -1
    return kind_T


def _decisions(kind_N: np.ndarray, position_N: np.ndarray) -> Decisions:
    count = len(kind_N)
    sampling = SamplingParams(np.ones(count, np.float32), np.full(count, -1, np.int32), ())
    # Nobody sampled them, so there is no log-prob of when they were.
    unknown_N = np.full(count, np.nan, np.float32)
    return Decisions(kind_N.astype(np.int8), position_N.astype(np.int32), unknown_N, sampling)
