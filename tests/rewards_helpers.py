"""Thoughts for the reward tests: words and pictures in order, without ids where no test reads them."""

from __future__ import annotations

import numpy as np

from formats.base import Part
from record.trajectory import Author, Modality, Segment, StopReason, Trajectory


def text(role, words, author=Author.POLICY, ids=()):
    return Segment(role, author, Modality.TEXT, author is Author.POLICY, np.asarray(ids, np.int32), words)


def image(role, picture, author=Author.POLICY, ids=()):
    return Segment(
        role, author, Modality.IMAGE_TOKENS, author is Author.POLICY, np.asarray(ids, np.int32), picture=picture
    )


def thought(record, *segments, group=0, member=0, stop=StopReason.END, fmt="strokes"):
    prompt = record.get("prompt", "a prompt")
    return Trajectory(prompt, record, fmt, [text("prompt", prompt, Author.USER), *segments], group, member, stop=stop)


def from_parts(record, parts: tuple[Part, ...], fmt="strokes", **kwargs):
    """A demonstration's parts as a thought."""
    return thought(
        record,
        *[text(p.role, p.text) if p.picture is None else image(p.role, p.picture) for p in parts],
        fmt=fmt,
        **kwargs,
    )
