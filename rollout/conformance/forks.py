"""Whether what a writer writes from a prefix is that prefix and what follows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from record.trajectory import Author, Segment, Trajectory
from rollout.conformance.record import ConformanceError
from rollout.forks import fork
from rollout.requests import RolloutRequest, key_of

CANDIDATES = 2  # members at a state

States = Callable[[Trajectory], Sequence[int]]  # the segments before which a trajectory is continued


def fork_requests(trajectories: Sequence[Trajectory], states: States) -> list[RolloutRequest]:
    """For each group, members that go on from the longest prefix at whose end one of its trajectories is forked."""
    requests = []
    for group in dict.fromkeys(t.group for t in trajectories):
        members = [t for t in trajectories if t.group == group]
        ends = [(state, -place) for place, t in enumerate(members) for state in states(t)]
        if not ends:
            continue
        state, place = max(ends)
        number = 1 + max(t.member for t in members)
        asked = fork(members[-place], state, range(number, number + CANDIDATES))
        requests.append(replace(asked, rehearsal=True))
    return requests


def written_segments(trajectory: Trajectory) -> list[int]:
    """The states before each segment that the policy wrote."""
    return [n for n, segment in enumerate(trajectory.segments) if segment.author is Author.POLICY]


def check_prefixes(children: Sequence[Trajectory], requests: Sequence[RolloutRequest]) -> None:
    """Hold children to the requests that they answer: they begin with the parent's segments, and train none of them.

    Raises:
        ConformanceError: it names the child, the segment, and what would be right.
    """
    by_key = {request.key: request for request in requests}
    for child in children:
        check_prefix(child, by_key[key_of(child)].prefix)


def check_prefix(child: Trajectory, prefix: Sequence[Segment]) -> None:
    """See check_prefixes."""
    assert child.parent is not None
    for number, (right, given) in enumerate(zip(prefix, [*child.segments, *[None] * len(prefix)], strict=False)):
        where = (
            f"trajectory {child.key}, which goes on from member {child.parent[0]} after {len(prefix)} segments: "
            f"segment {number} ('{right.role}')"
        )
        if given is None:
            raise ConformanceError(f"{where} is missing: the record begins with all of the request's prefix")
        if not _same(right, given):
            raise ConformanceError(
                f"{where} is another than the parent's: the writer must go on from the request's prefix, and record "
                "its segments with their ids and media as they are, or say that it cannot fork (Capabilities.forks)"
            )
        if given.trained:
            raise ConformanceError(
                f"{where} is trained: its decisions are the parent's, and would count in the loss twice"
            )


def _same(one: Segment, other: Segment) -> bool:
    """Author, modality, ids and media. Not the role: what follows an image may tell which one it has."""
    if (one.author, one.modality) != (other.author, other.modality):
        return False
    return all(_equal(a, b) for a, b in zip(_contents(one), _contents(other), strict=True))


def _contents(segment: Segment) -> tuple[np.ndarray | None, ...]:
    frames = None if segment.frames is None else segment.frames.frames_F
    return segment.ids, segment.image, segment.latent, frames


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)
