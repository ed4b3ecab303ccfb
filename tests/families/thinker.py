"""Like VR-Thinker (arXiv:2510.10518): words about a video. The prompt shows few frames of it, calls bring more, and
what earlier calls brought leaves the context."""

from __future__ import annotations

import numpy as np
import torch

from formats.base import ContextSpec, PieceSpec
from formats.declared import DeclaredFormat
from formats.grammar import END, START, Grammar, Role
from policy.base import Extent
from record.trajectory import Author, Frames, Modality, Segment
from runtime.errors import UserError
from tests.families.transformer import FamilyPolicy, Vocabulary

FRAME_SLOTS = 2  # the upper and the lower half
GRAMMAR = Grammar(
    "watch",
    (
        Role("think", tags=(("<think>", "</think>"),), max_tokens=4),
        Role("call", tags=(("<call>", "</call>"),), max_tokens=3),
        Role("frames", Modality.VIDEO_FRAMES, author=Author.ENVIRONMENT, trained=False),
        Role("answer", tags=(("<answer>", "</answer>"),), max_tokens=3),
    ),
    {START: ("think",), "think": ("call", "answer"), "call": ("frames",), "frames": ("think",), "answer": (END,)},
    max_images=4,
)


class Thinker(FamilyPolicy):
    family = "thinker_like"
    inputs = {"frame": 4}  # color, and the time

    def __init__(self, max_length: int = 160, seed: int = 0):
        super().__init__(Vocabulary((), GRAMMAR.tags), max_length, seed)

    def perceive(self, segments) -> None:
        for segment in segments:
            if segment.frames is None:
                raise UserError(f"segment '{segment.role}': the family '{self.family}' sees video alone")

    def forms(self, segment: Segment) -> tuple[str, ...]:
        return ("frames",) if segment.modality is Modality.VIDEO_FRAMES else ("ids",)

    def kept(self, segment: Segment, keep) -> range:
        return range(*(keep or (0, len(segment.frames.time_F))))

    def extent(self, segment, form, keep=None) -> Extent | None:
        """A position a frame."""
        if form == "frames":
            if segment.frames is None:
                return None
            count = len(self.kept(segment, keep))
            return Extent(count * FRAME_SLOTS, count)
        return None if segment.frames is not None else super().extent(segment, form, keep)

    def look(self, segment, form, keep):
        if form != "frames":
            return super().look(segment, form, keep)
        kept = self.kept(segment, keep)
        frames = segment.frames.frames_F[kept.start : kept.stop] / 255 - 0.5
        halves = np.stack([half.mean((1, 2)) for half in np.array_split(frames, FRAME_SLOTS, 1)], 1)
        time = np.repeat(segment.frames.time_F[kept.start : kept.stop, None, None], FRAME_SLOTS, 1)
        seen = np.concatenate([halves, time], 2).reshape(-1, 4).astype(np.float32)
        return torch.from_numpy(seen) @ self.model.look["frame"].T

    def offsets(self, segment, form, keep):
        if form != "frames":
            return super().offsets(segment, form, keep)
        return np.repeat(np.arange(len(self.kept(segment, keep))), FRAME_SLOTS)[:, None]


class Watch(DeclaredFormat):
    """Of the prompt's video the first `window` frames are seen at first; later only the last call's frames are."""

    def __init__(self, window: int = 3, **options):
        super().__init__(GRAMMAR, **options)
        self.window = window

    def contexts(self, trajectory, segment):
        segments = trajectory.segments
        video = [i for i in range(segment) if segments[i].modality is Modality.VIDEO_FRAMES]
        pieces = []
        for index in range(segment):
            if index not in video:
                pieces.append(PieceSpec(index))
            elif index == video[-1]:
                pieces.append(PieceSpec(index, (0, min(self.window, len(segments[index].frames.time_F)))))
        return (ContextSpec("full", tuple(pieces)),)


def more_frames(trajectory) -> Segment:
    """The environment: frames of the prompt's video, later ones at each call."""
    video = next(s.frames for s in trajectory.segments if s.frames is not None)
    calls = sum(s.author is Author.ENVIRONMENT for s in trajectory.segments)
    chosen = (np.arange(2 + calls % 2) + 1 + calls) % len(video.time_F)
    frames = Frames(video.frames_F[chosen], video.time_F[chosen])
    return Segment("frames", Author.ENVIRONMENT, Modality.VIDEO_FRAMES, False, frames=frames)
