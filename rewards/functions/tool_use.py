"""Which tools a thought called, whether each call worked, and whether an image came back.

The one reader of tool use for every reward that pays for it or against it. A call is the policy's: a segment with the
role of a call, or a closed call block inside other words of its own. What it led to is read from the environment's
segments up to the policy's next word: an image among them is a returned image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from record.trajectory import Author, Modality, Segment, Trajectory
from rewards.functions.text import blocks

ROLES = ("tool_call", "code", "search", "tool", "look")  # of a policy segment that is a call as a whole
TAGS = ("tool_call", "code")  # of a call inside a segment with another role
FAILED_ROLES = ("error", "tool_error")
# At the start of what the tool answered, behind any opening tags and labels.
_FAILURE = re.compile(
    r"(?:<[^<>]*>\s*)*(?:observation\s*:?\s*)?"
    r"(?:execution error|error|traceback|exception|code execution failed|failed|invalid)\b",
    re.I,
)
_OPENING = re.compile(r"\s*<([^<>/]+)>")
_GLUE = re.compile(r"<\|im_start\|>\s*\w*|<\|im_end\|>|<\|vision_start\|>|<\|vision_end\|>|<\|image_pad\|>")


@dataclass(frozen=True)
class ToolCall:
    segment: int  # the policy's segment that holds the call
    ok: bool  # the environment answered, and not with an error
    returned_image: bool


def tool_calls(trajectory: Trajectory, roles: Sequence[str] = ROLES, tags: Sequence[str] = TAGS) -> list[ToolCall]:
    """The policy's calls in order. Where several calls of one turn get as many answers they are matched in order;
    otherwise they share all of the turn's answers, and the turn's calls worked if any answer was no error."""
    calls: list[ToolCall] = []
    pending: list[int] = []
    answers: list[Segment] = []
    for index, segment in enumerate(trajectory.segments):
        if segment.author is Author.ENVIRONMENT:
            if pending:
                answers.append(segment)
            continue
        if segment.author is not Author.POLICY:
            continue
        if answers:
            calls += _answered(pending, answers)
            pending, answers = [], []
        pending += [index] * _calls_in(segment, roles, tags)
    return calls + _answered(pending, answers)


def asked(trajectory: Trajectory) -> bool:
    """Whether the environment was asked anything: a call was answered, or it was closed and the policy went on after an
    answer of nothing. What was not closed before an image or a limit asked nobody."""
    segments = trajectory.segments
    for call in tool_calls(trajectory):
        following = segments[call.segment + 1 : call.segment + 2]
        if following and (following[0].author is Author.ENVIRONMENT or not _stands_open(segments[call.segment])):
            return True
    return False


def failed(segment: Segment) -> bool:
    """Whether an environment segment is an error: by its role, or by how its words begin."""
    return segment.role in FAILED_ROLES or (segment.image is None and _FAILURE.match(_words(segment)) is not None)


def returned_images(trajectory: Trajectory) -> int:
    """Images (or stretches of frames) that the environment answered with, after the policy's first word."""
    first = next((i for i, s in enumerate(trajectory.segments) if s.author is Author.POLICY), 0)
    return sum(_shows(s) for s in trajectory.segments[first:] if s.author is Author.ENVIRONMENT)


def _calls_in(segment: Segment, roles: Sequence[str], tags: Sequence[str]) -> int:
    if segment.image is not None:
        return 0
    inside = sum(len(blocks(segment.text, tag)) for tag in tags)
    return max(inside, 1) if segment.role in roles else inside


def _stands_open(call: Segment) -> bool:
    """The tag that it begins with is not closed."""
    opening = _OPENING.match(call.text)
    return opening is not None and f"</{opening[1]}>" not in call.text


def _words(segment: Segment) -> str:
    """What the environment says, without the chat template's marks around it."""
    return _GLUE.sub(" ", segment.text).strip()


def _shows(segment: Segment) -> bool:
    return segment.image is not None or segment.modality is Modality.VIDEO_FRAMES


def _answered(pending: list[int], answers: list[Segment]) -> list[ToolCall]:
    spoken = [s for s in answers if _shows(s) or _words(s)]
    if len(pending) > 1 and len(pending) == len(spoken):
        return [
            ToolCall(call, not failed(answer), _shows(answer)) for call, answer in zip(pending, spoken, strict=True)
        ]
    # An image is an answer that worked, whatever words go with it; words alone are judged by how they begin.
    imaged = any(_shows(s) for s in spoken)
    ok = imaged or (bool(spoken) and not any(failed(s) for s in spoken))
    return [ToolCall(call, ok, imaged) for call in pending]
