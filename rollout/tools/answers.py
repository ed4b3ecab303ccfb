"""What tools reply, as segments of the environment: held to the limits, given roles and ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from formats.base import Format, Vocabulary
from formats.segments import media_segment, text_segment
from record.trajectory import Author, Frames, Modality, Segment
from rollout.requests import RolloutError
from rollout.tools.base import Reply, ToolError
from rollout.tools.config import ToolConfig
from runtime.errors import UserError

logger = logging.getLogger(__name__)
ERROR_ROLES = ("error", "tool_error")  # in which errors are told, where a format has one of them
_told: set[tuple[str, str]] = set()  # formats and roles whose words were shortened
_OBSERVATION = "observation"  # the environment's role in a format that names none


@dataclass(frozen=True)
class Answer:
    """What came of one call."""

    tool: str  # "": the call named none that there is
    replies: tuple[Reply, ...] = ()
    error: str | None = None  # in words for the model


def hold_to_limits(found: Any, name: str, config: ToolConfig) -> tuple[Reply, ...]:
    """A tool's replies as they came.

    Raises:
        ToolError: they are more than the limits let through, or no replies.
    """
    if isinstance(found, str | np.ndarray | Frames | Segment) or not isinstance(found, Sequence):
        raise ToolError(f"{name} answered with {type(found).__name__}; a tool answers with a list")
    images, words = 0, 0
    for reply in found:
        media = [reply] if not isinstance(reply, Segment) else [m for m in (reply.image, reply.frames) if m is not None]
        if isinstance(reply, Segment) and not media and reply.modality is not Modality.TEXT:
            raise ToolError(f"{name} answered with a segment that is to show something and holds no image")
        for item in media:
            if isinstance(item, Frames):
                images += int(np.prod(item.frames_F.shape[:3]))
            elif isinstance(item, np.ndarray):
                if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3 or not item.size:
                    raise ToolError(f"{name} answered with an array of {item.dtype} {list(item.shape)}, no image")
                images += item.shape[0] * item.shape[1]
            elif not isinstance(item, str):
                raise ToolError(f"{name} answered with {type(item).__name__}, neither words nor an image")
        words += len(reply) if isinstance(reply, str) else len(reply.text) if isinstance(reply, Segment) else 0
    for count, what, limit in (
        (len(found), "segments", "max_segments"),
        (images, "pixels", "max_pixels"),
        (words, "characters", "max_characters"),
    ):
        most = getattr(config, limit)
        if count > most:
            raise ToolError(f"{name} answered with {count} {what}; at most {most} are let through ({limit})")
    return tuple(found)


def answer_segments(answer: Answer, fmt: Format, called: str, vocabulary: Vocabulary) -> list[Segment]:
    """An answer as untrained segments of the environment. Those that hold media have no ids yet (Policy.perceive).

    Args:
        called: the policy's role that is answered.

    Raises:
        RolloutError: the format has no role for what came.
    """
    replies: Sequence[Reply] = answer.replies if answer.error is None else (f"error: {answer.error}",)
    segments = [_segment(reply, fmt, called, answer.error is not None, vocabulary) for reply in replies]
    for segment in segments:
        unknown = segment.ids[(segment.ids < 0) | (segment.ids >= vocabulary.size)]
        if len(unknown):
            raise RolloutError(
                f"{answer.tool} answered '{called}' with the id {unknown[0]}, and the policy's vocabulary has "
                f"{vocabulary.size}; leave a segment's ids out, and its words are encoded"
            )
    return [s for s in segments if len(s.ids) or s.modality is not Modality.TEXT]


def answer_roles(fmt: Format, called: str) -> list[str]:
    """The roles in which the environment may answer, in the format's order."""
    answers = getattr(fmt, "answers", None)
    return list(answers(called)) if answers is not None else [_OBSERVATION]


def role_for(fmt: Format, called: str, modality: Modality, error: bool = False) -> str | None:
    """In which role something is answered: errors in a role for errors and nothing else there, where the format has
    one; frames rather as frames, and images as images. None: in none."""
    grammar = getattr(fmt, "grammar", None)
    names = answer_roles(fmt, called)
    if grammar is None:
        return names[0] if names else None
    text = modality is Modality.TEXT
    fitting = [name for name in names if (grammar.by_name[name].modality is Modality.TEXT) == text]
    fitting.sort(
        key=lambda name: ((name in ERROR_ROLES) != error, not text and grammar.by_name[name].modality != modality)
    )
    return fitting[0] if fitting else None


def _segment(reply: Reply, fmt: Format, called: str, error: bool, vocabulary: Vocabulary) -> Segment:
    if isinstance(reply, Segment) and reply.role:
        role: str | None = reply.role
        if role not in answer_roles(fmt, called):
            raise RolloutError(f"format '{fmt.name}': the environment has no role '{role}' after '{called}'")
    else:
        role = role_for(fmt, called, _modality(reply), error)
        if role is None:
            what = "words" if _modality(reply) is Modality.TEXT else "an image"
            raise RolloutError(
                f"format '{fmt.name}': after '{called}' the environment has no role for {what}, with which a tool "
                "answered; declare one"
            )
    if isinstance(reply, Segment):
        if reply.modality is Modality.TEXT and not len(reply.ids):
            return text_segment(role, *_encoded(reply.text, fmt, role, vocabulary), Author.ENVIRONMENT)
        return replace(reply, role=role, author=Author.ENVIRONMENT, trained=False, decisions=None)
    if isinstance(reply, str):
        return text_segment(role, *_encoded(reply, fmt, role, vocabulary), Author.ENVIRONMENT)
    return media_segment(role, reply, Author.ENVIRONMENT)


def _modality(reply: Reply) -> Modality:
    if isinstance(reply, Segment):
        return reply.modality
    return {str: Modality.TEXT, Frames: Modality.VIDEO_FRAMES}.get(type(reply), Modality.IMAGE)


def _encoded(text: str, fmt: Format, role: str, vocabulary: Vocabulary) -> tuple[list[int], str]:
    """Ids of the words, between the role's tags where it has some, and the words.

    Words that the vocabulary cannot say, or that spell one of its markers, are left out: the rest is still an answer.
    """
    grammar = getattr(fmt, "grammar", None)
    tags = grammar.by_name[role].tags[:1] if grammar is not None and role in grammar.by_name else ()
    if not text.strip():
        return [], ""
    said = f"{tags[0][0]}{text}{tags[0][1]}" if tags else text
    try:
        return [int(i) for i in vocabulary.encode(said)], said
    except UserError as error:
        _warn_once(fmt.name, role, error)
    kept = " ".join(word for word in text.split() if _known(word, vocabulary))
    said = f"{tags[0][0]}{kept}{tags[0][1]}" if tags else kept
    return ([int(i) for i in vocabulary.encode(said)], said) if kept else ([], "")


def _warn_once(fmt: str, role: str, error: UserError) -> None:
    """Once for a role: answers differ, and each would be told."""
    if (fmt, role) not in _told:
        _told.add((fmt, role))
        logger.warning("a tool's words ('%s') are shortened to those that the policy knows: %s", role, error)


def _known(word: str, vocabulary: Vocabulary) -> bool:
    try:
        return bool(vocabulary.encode(word))
    except UserError:
        return False
