"""Like BAGEL: an image is denoised, has many slots and one position, and is seen again in two forms, the clean latent
("vae") and features of its pixels ("vit"). Guided by three branches, one of which sees no words."""

from __future__ import annotations

import numpy as np
import torch

from formats.base import ContextSpec, Latent, PieceSpec
from formats.declared import DeclaredFormat
from formats.strokes import GRAMMAR
from policy.base import Extent
from record.trajectory import Guidance, Modality, Segment
from tests.families.transformer import FamilyPolicy, Vocabulary

LATENT_SLOTS, LATENT_CHANNELS, PATCHES = 5, 3, 4


class Bagel(FamilyPolicy):
    family = "bagel_like"
    latent_shape = (LATENT_SLOTS, LATENT_CHANNELS)
    image_slots = LATENT_SLOTS + PATCHES
    inputs = {"latent": LATENT_CHANNELS, "vit": 3}

    def __init__(self, max_length: int = 220, seed: int = 0):
        vocabulary = Vocabulary(("open", "close"), GRAMMAR.tags, never=())
        vocabulary.imaging = Latent(vocabulary.special["open"], vocabulary.special["close"])
        super().__init__(vocabulary, max_length, seed)

    def forms(self, segment: Segment) -> tuple[str, ...]:
        if segment.modality is Modality.IMAGE_LATENT:
            return ("vae", "vit")
        return ("vit",) if segment.modality is Modality.IMAGE else ("ids",)

    def extent(self, segment, form, keep=None) -> Extent | None:
        drawn = segment.modality is Modality.IMAGE_LATENT
        if form == "vae":
            return Extent(LATENT_SLOTS, 1) if drawn else None
        if form == "vit":
            return Extent(PATCHES, 1) if drawn or segment.modality is Modality.IMAGE else None
        return None if segment.modality is not Modality.TEXT else super().extent(segment, form, keep)

    def look(self, segment, form, keep):
        if form == "vae":
            return torch.from_numpy(segment.latent) @ self.model.look["latent"].T
        if form == "vit":
            height, width = segment.image.shape[0] // 2, segment.image.shape[1] // 2
            pixels = segment.image[: 2 * height, : 2 * width].reshape(2, height, 2, width, 3).mean((1, 3)) / 255 - 0.5
            return torch.from_numpy(pixels.reshape(PATCHES, 3).astype(np.float32)) @ self.model.look["vit"].T
        return super().look(segment, form, keep)

    def offsets(self, segment, form, keep):
        if form == "ids":
            return super().offsets(segment, form, keep)
        return np.zeros((LATENT_SLOTS if form == "vae" else PATCHES, 1), np.int64)  # one position

    def encode_images(self, images):
        """The means of five horizontal bands."""
        return [
            np.stack([band.mean((0, 1)) for band in np.array_split(image / 127.5 - 1, LATENT_SLOTS)]).astype(np.float32)
            for image in images
        ]

    def decode_images(self, contents):
        """Five bands, two pixels high."""
        bands = [((np.tanh(latent) + 1) * 127.5).astype(np.uint8) for latent in contents]
        return [np.repeat(np.repeat(band[:, None], 4, 1), 2, 0) for band in bands]

    def guide(self, branches, guidance: Guidance, at=None):
        """First away from what the words do not explain, then from what the images do not; only above a time, and no
        longer than the conditional velocity."""
        assert at is not None, "velocities are guided at a time"
        full, scales = branches["full"], guidance.scales
        text = branches["no_text"] + scales["text"] * (full - branches["no_text"])
        guided = branches["no_image"] + scales["image"] * (text - branches["no_image"])
        norms = [v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.ndim - 1)) for v in (full, guided)]
        guided = guided * (norms[0] / norms[1]).clamp(max=1)
        inside = (at.time_B > scales["from"]).reshape(-1, *[1] * (full.ndim - 1))
        return torch.where(inside, guided, full)


class BagelFormat(DeclaredFormat):
    """The strokes, guided the way BAGEL is."""

    def __init__(self, guided: bool = True, **options):
        super().__init__(GRAMMAR, **options)
        self.guided = guided

    def guidance(self, trajectory, segment):
        if not self.guided or trajectory.segments[segment].modality is Modality.TEXT:
            return None
        return Guidance("bagel", {"text": 3.0, "image": 1.5, "from": 0.4})

    def contexts(self, trajectory, segment):
        segments = trajectory.segments[:segment]
        text = [i for i, s in enumerate(segments) if s.modality is Modality.TEXT]
        full = _spec("full", range(segment))
        if self.guidance(trajectory, segment) is None:
            return (full,)
        return full, _spec("no_text", [i for i in range(segment) if i not in text]), _spec("no_image", text)


def _spec(branch, segments) -> ContextSpec:
    return ContextSpec(branch, tuple(PieceSpec(i) for i in segments))
