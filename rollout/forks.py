"""Members that go on from a prefix: what they are asked for by, and how a cursor is brought to where the prefix ends.

A state is what stands before one segment of a trajectory: the prompt and the segments before it. Members that continue
from one state are candidates there (VPRL), restarts from a buffer (R3), or counterfactuals of one segment. The
decisions of the prefix are the parent's: a child's record keeps them, and never trains them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from formats.base import Cursor, Format, Vocabulary
from record.trajectory import Author, Modality, Segment, Trajectory
from rollout.requests import RolloutError, RolloutRequest
from rollout.tools.answers import answer_roles


@dataclass(frozen=True)
class Inherited:
    """What a member has of its parent when it begins to write."""

    ids: np.ndarray  # int64: the policy's, forced ones included; the environment's are not among them
    decisions: int  # the next one's index in the noise is this


NOTHING = Inherited(np.empty(0, np.int64), 0)


def fork(
    trajectory: Trajectory, segments: int, members: Sequence[int], group: int | None = None, seed: int | None = None
) -> RolloutRequest:
    """Ask for members that continue from a trajectory's first `segments` segments, those of the prompt included.

    Args:
        members: their numbers, which name their noise; a number that the parent's group has used draws that noise
            again, so that the parent's own number writes the parent again.
        group: of the new members; None: the parent's.
        seed: None: the parent's.

    Raises:
        RolloutError: the trajectory has no such state: fewer segments, or a prompt that would be cut.
    """
    prompt = _prompt_length(trajectory.segments)
    if not prompt <= segments <= len(trajectory.segments):
        raise RolloutError(
            f"trajectory {trajectory.key}: it cannot be continued after {segments} segments; it has "
            f"{len(trajectory.segments)}, of which the prompt takes {prompt}"
        )
    group = trajectory.group if group is None else group
    went_on = segments < len(trajectory.segments) and trajectory.segments[segments].author is Author.POLICY
    return RolloutRequest(
        group,
        trajectory.prompt,
        trajectory.record,
        tuple(members),
        trajectory.seed if seed is None else seed,
        parent=(trajectory.member, segments),
        parent_group=None if trajectory.group == group else trajectory.group,
        prefix=tuple(trajectory.segments[:segments]),
        unanswered=went_on,
    )


def inherited_segments(request: RolloutRequest) -> list[Segment]:
    """The prefix as a child records it: whole, and untrained. Arrays are shared with the parent's.

    Raises RolloutError where the prefix is not what `parent` says.
    """
    if request.parent is None:
        raise RolloutError(f"group {request.group}: a prefix of {len(request.prefix)} segments, but no parent")
    if request.parent[1] != len(request.prefix) or not _prompt_length(request.prefix):
        raise RolloutError(
            f"{place(request)}: the prefix has {len(request.prefix)} segments; it has the parent's first "
            f"{request.parent[1]}, those of the prompt included"
        )
    return [replace(segment, trained=False) for segment in request.prefix]


def follow(cursor: Cursor, fmt: Format, request: RolloutRequest) -> Inherited:
    """Bring a fresh cursor to the end of a request's prefix.

    Raises:
        RolloutError: the prefix ends in the midst of an image or of a call, after the turn's end or where the
            environment is to speak, holds more images than the format allows, or is not the format's.
    """
    segments = request.prefix[_prompt_length(request.prefix) :]
    stops = _replay(cursor, fmt, request, segments)
    count = stops[-1] if stops else 0
    if segments and _calls(segments[-1], fmt) and not (cursor.awaits or cursor.stopped):
        raise RolloutError(
            f"{place(request)}: the call in '{segments[-1].role}' stands open there, and a tool is asked with one "
            "whole segment. Fork before the call, or after its answer"
        )
    _close_at(cursor, fmt, request, count)
    if [span.stop for span in cursor.spans] != stops:
        raise _not_the_formats(request, fmt, f"it reads {[span.role for span in cursor.spans]} there")
    own = [segment for segment in segments if segment.author is Author.POLICY]
    ids = np.concatenate([segment.ids for segment in own]).astype(np.int64) if own else NOTHING.ids
    held = sum(len(segment.decisions) for segment in own if segment.decisions is not None)
    return Inherited(ids, held if request.decided is None else request.decided)


def stands_in_call(request: RolloutRequest, fmt: Format, vocabulary: Vocabulary) -> bool:
    """Whether a request's prefix ends in a call that is not closed, from which `follow` does not go on: an image cut it
    short, or a limit.

    Raises RolloutError where the prefix is not the format's.
    """
    segments = request.prefix[_prompt_length(request.prefix) :]
    if not segments or not _calls(segments[-1], fmt):
        return False
    cursor = fmt.cursor(vocabulary)
    _replay(cursor, fmt, request, segments)
    return not (cursor.awaits or cursor.stopped)


def _calls(segment: Segment, fmt: Format) -> bool:
    return segment.author is Author.POLICY and segment.role in getattr(fmt, "calls", ())


def _replay(cursor: Cursor, fmt: Format, request: RolloutRequest, segments: Sequence[Segment]) -> list[int]:
    """Tell a fresh cursor what stands in a prefix. Returns where the policy's segments end among its ids."""
    stops: list[int] = []
    count = 0
    for index, segment in enumerate(segments):
        if segment.author is Author.ENVIRONMENT:
            last = index + 1 == len(segments) or segments[index + 1].author is not Author.ENVIRONMENT
            if not cursor.awaits:
                raise _not_the_formats(request, fmt, f"the environment speaks ('{segment.role}') where it is not asked")
            if last:
                cursor.observe(segment.role)
            continue
        if cursor.awaits:
            _answered_with_nothing(cursor, fmt)
        closed = len(cursor.spans)
        try:
            for id in segment.ids:
                cursor.advance(int(id))
        except ValueError as error:
            raise _not_the_formats(request, fmt, f"in '{segment.role}': {error}") from error
        if segment.modality is Modality.IMAGE_LATENT and cursor.in_image and len(cursor.spans) == closed:
            cursor.end_image()
        count += len(segment.ids)
        stops.append(count)
    return stops


def _answered_with_nothing(cursor: Cursor, fmt: Format) -> None:
    """A tool may say nothing, which leaves no segment: the policy went on, as the engine has it do."""
    cursor.observe(answer_roles(fmt, cursor.spans[-1].role)[0])


def _close_at(cursor: Cursor, fmt: Format, request: RolloutRequest, count: int) -> None:
    """Close what the cursor still holds open at the end of the prefix, and refuse what nothing may follow."""
    covered = cursor.spans[-1].stop if cursor.spans else 0
    if covered < count and cursor.in_image:
        raise RolloutError(
            f"{place(request)} is in the midst of an image: {count - covered} of its ids are there. "
            "Fork before the image, or after all of it"
        )
    if cursor.stopped:
        raise RolloutError(f"{place(request)}: the turn has ended there, and nothing may follow")
    if cursor.awaits and request.unanswered:
        _answered_with_nothing(cursor, fmt)
    if cursor.awaits:
        raise RolloutError(f"{place(request)}: the environment is to speak there; fork after what it says")
    if cursor.images > fmt.max_images:
        raise RolloutError(
            f"{place(request)}: {cursor.images} images stand before it, and format '{fmt.name}' allows "
            f"{fmt.max_images} (format.max_images)"
        )
    if covered < count:
        cut = getattr(cursor, "cut", None)
        if cut is None:
            raise RolloutError(
                f"{place(request)}: format '{fmt.name}' closes the segment before it by what follows, and its cursor "
                "has no cut() that would close it there"
            )
        cut()


def place(request: RolloutRequest) -> str:
    """A request's state, as an error names it."""
    assert request.parent is not None
    member, segments = request.parent
    group = request.group if request.parent_group is None else request.parent_group
    return f"a fork of trajectory {group}-{member} after segment {segments - 1}"


def _not_the_formats(request: RolloutRequest, fmt: Format, what: str) -> RolloutError:
    return RolloutError(f"{place(request)}: the prefix is no beginning in format '{fmt.name}': {what}")


def _prompt_length(segments: Sequence[Segment]) -> int:
    """How many segments stand before the policy or the environment says anything."""
    return next((n for n, segment in enumerate(segments) if segment.author is not Author.USER), len(segments))
