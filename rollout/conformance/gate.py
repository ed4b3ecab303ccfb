"""Whether a writer is fit to be trained on: asked before the first step, by a few trajectories and two rehearsals.

The writer takes the trainer's weights, writes, and is compared with the trainer's own scoring of what it wrote: as it
is, with other images in the contexts, and once more after both have been given moved weights. Each check stands for a
fault that runs elsewhere have had for weeks without an error:

    record     media or prompt ids lost on the way (prime-rl#2786, trl#6718); a sampler's trace cut (UniRL#397)
    weights    a publication that reaches nothing that samples (verl-omni#552, verl#7495)
    images     an image that the writer's later turns do not see (slime#1847)
    forks      members that go on from another prefix than the one that was asked for
    log-probs  sampling parameters or a context on one side only (trl#6789)

Letters: N scored decisions of the trajectories, W writers of a pool.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from formats.base import Format
from policy.base import Policy
from record.trajectory import DecisionKind, Trajectory
from rollout.conformance.forks import States, check_prefixes, fork_requests, written_segments
from rollout.conformance.images import scored_segments, swap_images
from rollout.conformance.record import ConformanceError, check_record, check_segments
from rollout.pool.contract import Rollouts
from rollout.pool.local import LocalRollouts
from rollout.requests import RolloutRequest
from rollout.weights.receive import REHEARSAL, REHEARSAL_MOVED
from rollout.weights.wire import pack
from rollout.writer import Writer

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of log-probs in float32
SAMPLING_TOLERANCE = 0.1  # of their mean difference, where the writer is not exact
LEAST_CHANGE = 1e-3  # nats: the mean change of log-probs from which one is told from rounding
FIRST_MOVE, MOVES = 0.02, 8  # how far weights are moved at first, and how often it is doubled


@dataclass(frozen=True)
class Sides:
    """Trainer and writers, as the gate asks them. Where several processes train, all of them call each one."""

    generate: Callable[[Sequence[RolloutRequest]], list[Trajectory]]
    probe: Callable[[Sequence[Trajectory]], list[np.ndarray]]  # float32 [N] of each writer
    score: Callable[[Sequence[Trajectory]], np.ndarray]  # float32 [N], the trainer's
    publish: Callable[[int], None]  # the trainer's weights, as this version
    trained: Sequence[nn.Parameter]


@dataclass(frozen=True)
class Conformance:
    """What was found of a writer that passed."""

    gap: float  # between its log-probs and the trainer's: the largest, or the mean where it is not exact
    decisions: int
    moved: float  # mean change of its log-probs when the weights were moved
    swapped: float | None  # mean change when images were swapped; None: no decision saw one


def check_writer(
    writer: Writer,
    policy: Policy,
    requests: Sequence[RolloutRequest],
    fmt: Format | None = None,
    tolerance: float = TOLERANCE,
    sampling_tolerance: float = SAMPLING_TOLERANCE,
    forks: bool = False,
) -> Conformance:
    """Whether a writer of your own can be trained with `policy`, whose weights it has afterwards (as version 0).

    Args:
        requests: a few prompts, with at least one image among what is shown and drawn.
        fmt: the format that it writes in; None: prompts are not compared.
        tolerance: of the largest difference of log-probs, for a writer that calls itself exact.
        sampling_tolerance: of the mean difference, for one that does not.
        forks: ask it to go on from prefixes of what it wrote, too.

    Raises:
        ConformanceError: it names the fault, and what would be right.
        WeightSyncError: it does not take the weights.
    """
    rollouts = LocalRollouts(writer)

    def score(trajectories: Sequence[Trajectory]) -> np.ndarray:
        with torch.no_grad():
            return policy.score(policy.passes(trajectories)).logprob_N.float().cpu().numpy().copy()

    def publish(version: int) -> None:
        rollouts.sync_weights(pack(policy.model.state_dict(), version))

    sides = Sides(
        lambda asked: written(rollouts, asked),
        rollouts.probe,
        score,
        publish,
        [p for p in policy.model.parameters() if p.requires_grad],
    )
    states = written_segments if forks else None
    found = conform(sides, policy, requests, fmt, rollouts.exact, tolerance, sampling_tolerance, states)
    publish(0)
    return found


def written(rollouts: Rollouts, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
    """Every trajectory of the requests. Raises ConformanceError where a group did not come back."""
    result = rollouts.generate(requests)
    if result.failed:
        raise ConformanceError(f"the writer could not write a first trajectory: {result.failed[0].detail}")
    return [trajectory for group in result.groups for trajectory in group]


def conform(
    sides: Sides,
    policy: Policy,
    requests: Sequence[RolloutRequest],
    fmt: Format | None,
    exact: bool,
    tolerance: float,
    sampling_tolerance: float,
    states: States | None = None,
) -> Conformance:
    """The gate. The writers are left with moved weights: publish the true ones next. See `check_writer`.

    Args:
        states: where what they write is forked; None: it is not.

    Nothing is learned from what they write, so tools that are not `repeatable` are not called for it.
    """
    sides.publish(REHEARSAL)
    trajectories = sides.generate([replace(request, rehearsal=True) for request in requests])
    check_record(trajectories, requests, policy, fmt, REHEARSAL)
    children = _forked(sides, policy, trajectories, states) if states is not None else []
    places = scored_segments(trajectories)
    if not len(places):
        logger.warning(
            "the writer's first trajectories hold no sampled decision, so that nothing of it could be checked"
        )
        return Conformance(0.0, 0, 0.0, None)
    trainer_N, writer_WN = sides.score(trajectories), sides.probe(trajectories)
    for number, writer_N in enumerate(writer_WN):
        if writer_N.shape != trainer_N.shape:
            raise ConformanceError(
                f"writer {number} scored {len(writer_N)} decisions of the trajectories, the trainer {len(trainer_N)}"
            )

    swapped, seen_N = swap_images(trajectories, policy)
    trainer_swapped_N, writer_swapped_WN = sides.score(swapped), sides.probe(swapped)
    noise = max(_mean(writer_N - trainer_N) for writer_N in writer_WN)
    with _moved(sides, trajectories, trainer_N, min(max(LEAST_CHANGE, 10 * noise), 1.0)) as moved_N:
        sides.publish(REHEARSAL_MOVED)
        writer_moved_WN = sides.probe(trajectories)

    # The most telling fault first: weights that do not arrive at all, or an image unseen, put all else off, too.
    trainer_change_N = moved_N - trainer_N
    change_WN = [after_N - before_N for before_N, after_N in zip(writer_WN, writer_moved_WN, strict=True)]
    change = _check_weights_arrive(trainer_change_N, change_WN)
    sight = None
    if seen_N.any():
        sight = _check_images(
            (trainer_swapped_N - trainer_N)[seen_N],
            [(after_N - before_N)[seen_N] for before_N, after_N in zip(writer_WN, writer_swapped_WN, strict=True)],
        )
    else:
        logger.warning(
            "no decision of the writer's first trajectories saw an image: whether images condition is not known"
        )
    limit = tolerance if exact else sampling_tolerance
    gap = 0.0
    for what, said in (("scores them", writer_WN), ("recorded them when it sampled", [_recorded(trajectories)])):
        for said_N in said:
            gap = max(gap, _check_gap(what, said_N, trainer_N, trajectories, places, exact, limit))
    _check_weights_whole(trainer_change_N, change_WN)
    if len(placed := scored_segments(children)):
        said_N = sides.score(children)
        gap = max(
            gap, _check_gap("recorded them in forks", _recorded(children), said_N, children, placed, exact, limit)
        )
    logger.info(
        "the writer conforms: log-probs of %d decisions within %.2g, moved by %.2g with the weights%s",
        len(places),
        gap,
        change,
        "" if sight is None else f", by {sight:.2g} with the images",
    )
    return Conformance(gap, len(places), change, sight)


def _forked(sides: Sides, policy: Policy, trajectories: Sequence[Trajectory], states: States) -> list[Trajectory]:
    """What the writers write from prefixes of what they wrote. Raises ConformanceError where it is not from those."""
    asked = fork_requests(trajectories, states)
    children = sides.generate(asked) if asked else []
    check_prefixes(children, asked)
    for child in children:
        check_segments(child, policy, REHEARSAL)
    return children


def check_sharing(
    sides: Sides,
    name: str,
    trajectories: Sequence[Trajectory],
    exact: bool,
    tolerance: float,
    sampling_tolerance: float,
) -> float:
    """Whether a writer that says so samples with the trainer's own weights: it scores a few trajectories as the trainer
    does, and so it does while these are others. Returns the gap; nothing is published.

    Raises:
        ConformanceError: it names the writer, and what would be right.
    """
    places = scored_segments(trajectories)
    if not len(places):
        return 0.0
    trainer_N, (writer_N, *_) = sides.score(trajectories), sides.probe(trajectories)
    if writer_N.shape != trainer_N.shape:
        raise ConformanceError(
            f"{name} scored {len(writer_N)} decisions of the trajectories, the trainer {len(trainer_N)}"
        )
    least = min(max(LEAST_CHANGE, 10 * _mean(writer_N - trainer_N)), 1.0)
    with _moved(sides, trajectories, trainer_N, least) as moved_N:
        (writer_moved_N, *_) = sides.probe(trajectories)
    wanted, off = _mean(moved_N - trainer_N), _mean((writer_moved_N - writer_N) - (moved_N - trainer_N))
    if wanted >= LEAST_CHANGE and not off <= wanted / 4:
        raise ConformanceError(
            f"{name} says that it samples with the trainer's own weights (shares), and it does not: moving them "
            f"changed the trainer's log-probs by {wanted:.3g} on average, and the writer's otherwise, {off:.3g} off. "
            "Nothing is published to a writer that shares: let `shares` be true only of the very policy that is trained"
        )
    limit = tolerance if exact else sampling_tolerance
    return _check_gap("scores them", writer_N, trainer_N, trajectories, places, exact, limit)


@contextmanager
def _moved(
    sides: Sides, trajectories: Sequence[Trajectory], trainer_N: np.ndarray, least: float
) -> Iterator[np.ndarray]:
    """Within it the trainer's weights are others, far enough that its log-probs (which it yields) tell; then they are
    as before, to the bit."""
    kept = [parameter.detach().clone() for parameter in sides.trained]
    size = FIRST_MOVE
    try:
        for _ in range(MOVES):
            with torch.no_grad():
                for parameter, before in zip(sides.trained, kept, strict=True):
                    # A shift moves what is zero (a fresh adapter), a scale what shifts alike (a head). No noise is
                    # drawn, so that every process moves alike.
                    parameter.copy_(before).mul_(1 + size).add_(0.05 * size)
            moved_N = sides.score(trajectories)
            if _mean(moved_N - trainer_N) >= least:
                break
            size *= 2
        yield moved_N
    finally:
        with torch.no_grad():
            for parameter, before in zip(sides.trained, kept, strict=True):
                parameter.copy_(before)


def _check_weights_arrive(trainer_N: np.ndarray, writer_WN: Sequence[np.ndarray]) -> float:
    """Moved weights change the writer's log-probs, too. Returns the smallest mean change."""
    wanted, changes = _mean(trainer_N), [_mean(change_N) for change_N in writer_WN]
    if wanted < LEAST_CHANGE:
        logger.warning(
            "moved weights change the trainer's own log-probs by %.2g on average: not told from rounding",
            wanted,
        )
    for number, change in enumerate(changes):
        if wanted >= LEAST_CHANGE and not change >= wanted / 4:
            raise ConformanceError(
                f"weights do not reach writer {number}: they were moved and published, which changed the trainer's "
                f"log-probs by {wanted:.3g} on average and the writer's by {change:.3g}. Look for adapters that are "
                "bound to no module, or for weights that are taken into a copy that does not sample"
            )
    return min(changes)


def _check_weights_whole(trainer_N: np.ndarray, writer_WN: Sequence[np.ndarray]) -> None:
    """They change the writer's log-probs as they change the trainer's."""
    wanted = _mean(trainer_N)
    for number, change_N in enumerate(writer_WN):
        off = _mean(change_N - trainer_N)
        if wanted >= LEAST_CHANGE and not off <= wanted / 4:
            raise ConformanceError(
                f"weights reach writer {number} in part: moved ones changed the trainer's log-probs by {wanted:.3g} on "
                f"average, and the writer's otherwise, {off:.3g} off. Look for names that are not mapped, or for "
                "layers that are not bound"
            )


def _check_images(trainer_N: np.ndarray, writer_WN: Sequence[np.ndarray]) -> float:
    """Changes of log-probs by another image in the context, of the decisions that see it. Returns the smallest mean."""
    wanted = _mean(trainer_N)
    if wanted < LEAST_CHANGE:
        logger.warning(
            "another image in the context changes the trainer's own log-probs by %.2g on average: it hardly sees them",
            wanted,
        )
        return wanted
    changes = []
    for number, change_N in enumerate(writer_WN):
        change = _mean(change_N)
        if not change >= wanted / 2:
            raise ConformanceError(
                f"writer {number} does not see the images: with others in their place the trainer's log-probs of what "
                f"comes after change by {wanted:.3g} on average, and the writer's by {change:.3g}. Every image of the "
                "context must be fed in every turn, in the form that the recorded context names"
            )
        changes.append(change)
    return min(changes)


def _check_gap(
    what: str,
    said_N: np.ndarray,
    trainer_N: np.ndarray,
    trajectories: Sequence[Trajectory],
    places: np.ndarray,
    exact: bool,
    tolerance: float,
) -> float:
    gap_N = np.nan_to_num(np.abs(said_N.astype(np.float64) - trainer_N), nan=np.inf)
    gap = float(gap_N.max() if exact else gap_N.mean())
    if gap <= tolerance:
        return gap
    n = int(gap_N.argmax())
    number, index = places[n].tolist()
    trajectory = trajectories[number]
    kind = DecisionKind(int(_kinds(trajectories)[n])).name.lower()
    raise ConformanceError(
        f"the log-probs of the writer's decisions, as it {what}, are off the trainer's by "
        f"{f'up to {gap:.3g}' if exact else f'{gap:.3g} on average'}, over the tolerance of {tolerance:g}. Worst at "
        f"trajectory {trajectory.key}, segment {index} ('{trajectory.segments[index].role}'), a {kind}: the writer "
        f"says {said_N[n]:.4f}, the trainer {trainer_N[n]:.4f}. Look for a temperature, an allowed set, a sampler or a "
        "context that one side applies and the other does not"
    )


def _recorded(trajectories: Sequence[Trajectory]) -> np.ndarray:
    return _by_decision(trajectories, "logprob_N")


def _kinds(trajectories: Sequence[Trajectory]) -> np.ndarray:
    return _by_decision(trajectories, "kind_N")


def _by_decision(trajectories: Sequence[Trajectory], column: str) -> np.ndarray:
    """A column of all decisions that are scored, in the order of Policy.score."""
    return np.concatenate(
        [
            getattr(s.decisions, column)[~s.decisions.sampling.greedy_N]
            for t in trajectories
            for s in t.segments
            if s.trained and s.decisions is not None
        ]
    )


def _mean(difference_N: np.ndarray) -> float:
    return float(np.abs(difference_N.astype(np.float64)).mean())
