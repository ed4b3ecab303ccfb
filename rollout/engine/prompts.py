"""What stands before the first decision of each request, and whether anything fits after it.

A prompt is what the user says and shows; a fork's is its parent's first segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from formats.base import Codes, SeenOnly
from formats.segments import prompt_segments
from policy.base import Policy
from policy.context import resolve
from record.trajectory import Author, Modality, Segment, Trajectory
from rollout.engine.state import EngineState
from rollout.forks import follow, inherited_segments, place
from rollout.requests import RolloutError, RolloutRequest


@dataclass(frozen=True)
class ImageRoom:
    """What an image takes."""

    ids: int  # its markers and codes, of max_tokens
    slots: int  # of the cache, once it is drawn and seen again


def image_room(policy: Policy) -> ImageRoom:
    imaging = policy.vocabulary.imaging
    if isinstance(imaging, SeenOnly):
        return ImageRoom(0, policy.image_slots)
    markers = sum(id is not None for id in (imaging.open, imaging.close))
    return ImageRoom(markers + (imaging.count if isinstance(imaging, Codes) else 0), policy.image_slots)


def lay_out_prompts(
    engine: EngineState, requests: Sequence[RolloutRequest], image: ImageRoom
) -> tuple[list[list[Segment]], list[int]]:
    """By request: its prompt's segments, then what guidance sees beside them (a negative prompt); and how many slots
    contexts may take beside what the policy writes, of which max_tokens counts the ids: the first one's, or all that
    others say and show, since a later segment may see of it what the first one does not.

    Raises RolloutError where nothing could be written after a prompt or a prefix.
    """
    fmt, policy, config = engine.fmt, engine.policy, engine.config
    beside = getattr(fmt, "beside_prompt", None)
    prompts = [
        inherited_segments(request)
        if request.parent is not None or request.prefix
        else [
            *prompt_segments(fmt, request.prompt, request.media, policy.vocabulary),
            *(beside(policy.vocabulary) if beside and config.guidance else []),
        ]
        for request in requests
    ]
    # What a parent's prefix shows has the ids that it was seen by: codes of an image are not found anew.
    shown = [
        segment
        for segments in prompts
        for segment in segments
        if segment.modality is not Modality.TEXT and segment.author is not Author.POLICY and not len(segment.ids)
    ]
    if shown:
        policy.perceive(shown)
    slots = []
    for request, segments in zip(requests, prompts, strict=True):
        opened = Segment("", Author.POLICY, Modality.TEXT, trained=False)
        trajectory = Trajectory(request.prompt, request.record, fmt.name, [*segments, opened])
        specs = fmt.contexts(trajectory, len(segments))
        first = resolve(policy, trajectory, specs[:1])[0].slots
        slots.append(max(first, _slots_of_others(policy, segments)))
        # Where the first thing is an image without a marker, it begins at once.
        cursor = fmt.cursor(policy.vocabulary, engine.constrain)
        ids = len(follow(cursor, fmt, request).ids) if request.parent is not None else None
        least = image if cursor.in_image else ImageRoom(1, 1)
        if ids is None:
            _check_prompt(request, first, least, policy.max_length, bool(shown))
        else:
            _check_prefix(request, ids, first, least, config.max_tokens, policy.max_length)
    return prompts, slots


def _slots_of_others(policy: Policy, segments: Sequence[Segment]) -> int:
    """What the user and the environment say and show takes, in every form in which it is seen."""
    taken = [
        policy.extent(segment, form)
        for segment in segments
        if segment.author is not Author.POLICY
        for form in policy.forms(segment)
    ]
    return sum(extent.slots for extent in taken if extent is not None)


def _check_prompt(request: RolloutRequest, slots: int, least: ImageRoom, length: int, shows: bool) -> None:
    if slots + least.slots > length:
        said = request.prompt if len(request.prompt) <= 60 else request.prompt[:57] + "..."
        takes = f"takes {slots} slots with what it shows" if shows else f"has {slots} ids"
        raise RolloutError(
            f"prompt '{said}' (group {request.group}) {takes}, but the policy's context "
            f"holds {length}, the answer included; shorten the prompt"
        )


def _check_prefix(
    request: RolloutRequest, ids: int, slots: int, least: ImageRoom, max_tokens: int, length: int
) -> None:
    if ids + least.ids > max_tokens:
        raise RolloutError(f"{place(request)}: {ids} ids stand before it, and rollout.max_tokens is {max_tokens}")
    if slots + least.slots > length:
        raise RolloutError(
            f"{place(request)}: what stands before it takes {slots} slots, and the policy's context holds {length}"
        )
