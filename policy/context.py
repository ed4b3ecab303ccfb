"""From what a format says a segment sees to what the family feeds: forms, slots and positions.

An id, a cache slot and a position are three things. A code is one of each; an image of BAGEL has thousands of slots and
one position; an image of Qwen-VL advances positions by the longer side of its grid. The family says which (`extent`),
here they are added up, and the result is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from formats.base import ContextSpec
from policy.base import Extent, Policy
from record.trajectory import Context, Piece, Trajectory
from runtime.errors import UserError


class ContextError(UserError):
    """A context that the family cannot feed; the sentence names the segment and its form."""


@dataclass(frozen=True)
class Resolved:
    """A context as it is fed and recorded, and the slots that it takes."""

    context: Context
    slots: int


def resolve(policy: Policy, trajectory: Trajectory, specs: Sequence[ContextSpec]) -> tuple[Resolved, ...]:
    """Each branch's pieces with their forms, at consecutive positions.

    Raises:
        ContextError: a segment that is not there, or a form that the family gives no extent for.
    """
    return tuple(_resolve(policy, trajectory, spec) for spec in specs)


def _resolve(policy: Policy, trajectory: Trajectory, spec: ContextSpec) -> Resolved:
    pieces: list[Piece] = []
    start = slots = 0
    for seen in spec.pieces:
        if not 0 <= seen.segment < len(trajectory.segments):
            raise ContextError(
                f"format '{trajectory.format}': the context '{spec.branch}' names segment {seen.segment} of "
                f"{len(trajectory.segments)}"
            )
        segment = trajectory.segments[seen.segment]
        forms = (seen.form,) if seen.form is not None else policy.forms(segment)
        for form in forms:
            extent = extent_of(policy, trajectory, Piece(seen.segment, form, start, seen.keep))
            pieces.append(Piece(seen.segment, form, start, seen.keep))
            start += extent.positions
            slots += extent.slots
    return Resolved(Context(spec.branch, tuple(pieces), start), slots)


def extent_of(policy: Policy, trajectory: Trajectory, piece: Piece) -> Extent:
    """What one piece takes.

    Raises ContextError where the family gives no extent for its form.
    """
    segment = trajectory.segments[piece.segment]
    extent = policy.extent(segment, piece.form, piece.keep)
    if extent is None:
        raise ContextError(
            f"trajectory {trajectory.key}: segment {piece.segment} ('{segment.role}', {segment.modality}) is to be "
            f"seen as '{piece.form}', for which the family '{policy.family}' gives no extent"
        )
    return extent


def slots_of(policy: Policy, trajectory: Trajectory, context: Context) -> int:
    """How many slots a recorded context takes."""
    return sum(extent_of(policy, trajectory, piece).slots for piece in context.pieces)
