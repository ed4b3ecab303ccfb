"""Like LVM, the model of visual planning (VPRL, arXiv:2505.11409): pictures of codes and nothing else. No word, no
marker, no end of the turn; each picture is drawn from the one before it alone."""

from __future__ import annotations

import numpy as np

from formats.base import Codes, ContextSpec, PieceSpec
from formats.declared import DeclaredFormat
from formats.grammar import END, START, Grammar, Role
from record.trajectory import Modality
from runtime.errors import UserError
from tests.families.transformer import FamilyPolicy, Vocabulary

SIDE, CODES = 2, 6


class Lvm(FamilyPolicy):
    family = "lvm_like"
    image_slots = SIDE * SIDE

    def __init__(self, max_length: int = 40, seed: int = 0):
        vocabulary = Vocabulary(words=(), codes=CODES, eos=False)
        vocabulary.never = np.arange(2, dtype=np.int32)  # all that is no code
        vocabulary.imaging = Codes(vocabulary.code_ids, SIDE * SIDE)
        super().__init__(vocabulary, max_length, seed)

    def perceive(self, segments) -> None:
        for segment in segments:
            if segment.image is None:
                raise UserError(f"segment '{segment.role}': the family '{self.family}' sees pictures, one by one")
            (segment.ids,) = self.encode_images([segment.image])
            segment.modality = Modality.IMAGE_TOKENS

    def encode_images(self, images):
        """A code is a grey of a quarter."""
        found = []
        for image in images:
            height, width = image.shape[0] // SIDE, image.shape[1] // SIDE
            cut = image[: SIDE * height, : SIDE * width, 0].reshape(SIDE, height, SIDE, width)
            grey = np.clip(np.round(cut.mean((1, 3)) / 40), 0, CODES - 1).astype(int)
            found.append(self.vocabulary.code_ids[grey.ravel()])
        return found

    def decode_images(self, contents):
        greys = [((ids - self.vocabulary.code_ids[0]) * 40).astype(np.uint8).reshape(SIDE, SIDE) for ids in contents]
        return [np.repeat(np.kron(grey, np.ones((2, 2), np.uint8))[..., None], 3, 2) for grey in greys]


class Planner(DeclaredFormat):
    """A picture follows a picture, as many as the limit allows."""

    def __init__(self, max_images: int = 4):
        states = Role("state", Modality.IMAGE)
        super().__init__(Grammar("planner", (states,), {START: ("state",), "state": ("state", END)}, max_images))

    def contexts(self, trajectory, segment):
        return (ContextSpec("full", (PieceSpec(segment - 1),)),)
