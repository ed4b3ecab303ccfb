"""Like Qwen-VL: words only. Pictures are seen, in the prompt and as an answer of the environment; each patch has a
place on three axes (time, row, column), and a picture advances positions by the longer side of its grid (M-RoPE,
arXiv:2409.12191, section 2.2). The placeholder ids that stand for patches may never be sampled."""

from __future__ import annotations

import numpy as np
import torch

from formats.declared import DeclaredFormat
from formats.grammar import END, START, Grammar, Role
from policy.base import Extent
from record.trajectory import Author, Modality, Segment
from runtime.errors import UserError
from tests.families.transformer import FamilyPolicy, Vocabulary

PATCH = 2  # px
GRAMMAR = Grammar(
    "look",
    (
        Role("think", tags=(("<think>", "</think>"),), max_tokens=4),
        Role("call", tags=(("<call>", "</call>"),), max_tokens=3),
        Role("crop", Modality.IMAGE, author=Author.ENVIRONMENT, trained=False),
        Role("answer", tags=(("<answer>", "</answer>"),), max_tokens=3),
    ),
    {START: ("think",), "think": ("call", "answer"), "call": ("crop",), "crop": ("think",), "answer": (END,)},
    max_images=4,
)


def look(**options) -> DeclaredFormat:
    """Think, then crop and think again, or answer."""
    return DeclaredFormat(GRAMMAR, **options)


class Qwen(FamilyPolicy):
    family = "qwen_like"
    axes = 3
    inputs = {"patch": 3}

    def __init__(self, max_length: int = 200, seed: int = 0):
        special = ("vision_start", "vision_end", "image_pad", "turn", "turn_end")
        vocabulary = Vocabulary(special, GRAMMAR.tags, never=("vision_start", "vision_end", "image_pad", "turn"))
        ids = vocabulary.special
        vocabulary.frame = ([ids["turn"]], [ids["turn_end"]])
        super().__init__(vocabulary, max_length, seed)

    def grid(self, segment: Segment) -> tuple[int, int]:
        return segment.image.shape[0] // PATCH, segment.image.shape[1] // PATCH

    def perceive(self, segments) -> None:
        """The ids that stand for a picture: a placeholder a patch, between markers."""
        ids = self.vocabulary.special
        for segment in segments:
            if segment.image is None:
                raise UserError(f"segment '{segment.role}': the family '{self.family}' sees single images")
            rows, columns = self.grid(segment)
            if not rows or not columns:
                raise UserError(f"segment '{segment.role}': an image of less than {PATCH} x {PATCH} px")
            inner = [ids["image_pad"]] * (rows * columns)
            segment.ids = np.array([ids["vision_start"], *inner, ids["vision_end"]], np.int32)

    def forms(self, segment: Segment) -> tuple[str, ...]:
        return ("vit",) if segment.modality is Modality.IMAGE else ("ids",)

    def extent(self, segment, form, keep=None) -> Extent | None:
        if form == "vit":
            if segment.modality is not Modality.IMAGE:
                return None
            rows, columns = self.grid(segment)
            return Extent(rows * columns + 2, max(rows, columns) + 2)
        return None if segment.modality is Modality.IMAGE else super().extent(segment, form, keep)

    def look(self, segment, form, keep):
        h = super().look(segment, "ids", keep)
        if form != "vit":
            return h
        rows, columns = self.grid(segment)
        cut = segment.image[: rows * PATCH, : columns * PATCH] / 255 - 0.5
        patches = cut.reshape(rows, PATCH, columns, PATCH, 3).mean((1, 3)).reshape(-1, 3).astype(np.float32)
        return torch.cat([h[:1], torch.from_numpy(patches) @ self.model.look["patch"].T, h[-1:]])

    def offsets(self, segment, form, keep):
        if form != "vit":
            return super().offsets(segment, form, keep)
        rows, columns = self.grid(segment)
        row, column = np.divmod(np.arange(rows * columns), columns)
        patches = 1 + np.stack([np.zeros_like(row), row, column], 1)
        last = max(rows, columns) + 1
        return np.concatenate([[[0, 0, 0]], patches, [[last, last, last]]])


def crop(trajectory) -> Segment:
    """The environment: a cut of the last picture, whose size is a matter of how many came before."""
    pictures = [s.image for s in trajectory.segments if s.image is not None]
    image = pictures[-1]
    rows = max(PATCH, image.shape[0] - PATCH)
    return Segment("crop", Author.ENVIRONMENT, Modality.IMAGE, False, image=image[:rows, ::-1].copy())
