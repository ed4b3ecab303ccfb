"""Segments that nobody sampled: what the user says and shows, and what the environment answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from formats.base import Codes, Format, Vocabulary
from formats.grammar import PROMPT
from record.trajectory import Author, Frames, Media, Modality, Segment
from runtime.errors import UserError


def frame_of(vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """The ids before and after what the user says: a chat template's, where the family has one, else BOS and SEP."""
    frame = getattr(vocabulary, "frame", None)
    if frame is not None:
        opening, closing = frame
        return list(opening), list(closing)
    return [i for i in (vocabulary.bos,) if i is not None], [i for i in (vocabulary.sep,) if i is not None]


def text_segment(role: str, ids: Sequence[int], text: str, author: Author = Author.USER) -> Segment:
    """Words that nobody sampled."""
    return Segment(role, author, Modality.TEXT, False, np.asarray(ids, np.int32), text)


def media_segment(role: str, media: Media, author: Author) -> Segment:
    """An image or frames that nobody drew. The family gives it ids, where it sees images as ids (Policy.perceive)."""
    if isinstance(media, Frames):
        return Segment(role, author, Modality.VIDEO_FRAMES, False, frames=media)
    return Segment(role, author, Modality.IMAGE, False, image=media)


def image_content(segment: Segment, vocabulary: Vocabulary) -> np.ndarray:
    """What an image is drawn from: its latent, or the ids of its codes without the markers."""
    if segment.latent is not None:
        return segment.latent
    imaging = vocabulary.imaging
    assert isinstance(imaging, Codes)
    first = int(imaging.open is not None)
    return segment.ids[first : first + imaging.count]


def prompt_segments(fmt: Format, prompt: str, media: Sequence[Media], vocabulary: Vocabulary) -> list[Segment]:
    """What the user says and shows, as the format lays it out.

    Raises UserError for media in a format that has no place for any.
    """
    own = getattr(fmt, "prompt", None)
    if own is not None:
        return own(prompt, media, vocabulary)
    if media:
        raise UserError(f"format '{fmt.name}': its prompts are words alone, and this one shows {len(media)} image(s)")
    return [text_segment(PROMPT, fmt.prompt_ids(prompt, vocabulary), prompt)]
