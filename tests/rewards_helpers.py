"""Thoughts for the reward tests: words and images in order, without ids where no test reads them."""

from __future__ import annotations

import numpy as np

from formats.base import Part
from record.trajectory import Author, Modality, Segment, StopReason, Trajectory


def text(role, words, author=Author.POLICY, ids=()):
    return Segment(role, author, Modality.TEXT, author is Author.POLICY, np.asarray(ids, np.int32), words)


def image_segment(role, image, author=Author.POLICY, ids=()):
    return Segment(role, author, Modality.IMAGE_TOKENS, author is Author.POLICY, np.asarray(ids, np.int32), image=image)


def trajectory_of(record, *segments, group=0, member=0, stop=StopReason.END, fmt="strokes"):
    prompt = record.get("prompt", "a prompt")
    return Trajectory(prompt, record, fmt, [text("prompt", prompt, Author.USER), *segments], group, member, stop=stop)


def from_parts(record, parts: tuple[Part, ...], fmt="strokes", **kwargs):
    """A demonstration's parts as a thought."""
    return trajectory_of(
        record,
        *[text(p.role, p.text) if p.image is None else image_segment(p.role, p.image) for p in parts],
        fmt=fmt,
        **kwargs,
    )
