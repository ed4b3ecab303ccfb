"""The color of an object as GenEval names it: CLIP's zero-shot choice among ten colors, of the object alone.

Everything but the object's mask is painted #999999 (where the detector draws no mask the image stays), the result is
cut to the object's box and shown to CLIP ViT-L-14 of OpenAI; the class vector of a color is the normalised mean of
its three sentences' normalised embeddings, and the color with the largest cosine wins. Source: GenEval's released
scorer (its templates, background, crop and order of colors).

OpenAI's weights were trained with QuickGELU. open_clip's plain "ViT-L-14" computes another activation with them and
only warns, so the model is forced to its quickgelu variant here, and a configuration that says otherwise is refused
(encoders.py). All crops of all images go through the encoder in full batches; a class's sentences are embedded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from rewards.detectors.base import COLORS, Detection
from rewards.detectors.encoders import OpenClipConfig, OpenClipEncoder

TEMPLATES = ("a photo of a {color} {cls}", "a photo of a {color}-colored {cls}", "a photo of a {color} object")
BACKGROUND = (0x99, 0x99, 0x99)


class ColorNamer:
    """Names colors; not loaded until the first question or `load`."""

    def __init__(self, config: OpenClipConfig | None = None) -> None:
        self.config = config if config is not None else OpenClipConfig()
        self._encoder: OpenClipEncoder | None = None
        self._classifiers: dict[str, torch.Tensor] = {}  # by class name, [10, D]

    def load(self) -> OpenClipEncoder:
        """Raises WeightsError where the encoder's weights are not there."""
        if self._encoder is None:
            self._encoder = OpenClipEncoder(self.config, "rewards.detector.colors")
        return self._encoder

    def name(self, images: Sequence[np.ndarray], objects: Sequence[Sequence[tuple[str, Detection]]]) -> list[list[str]]:
        """One of COLORS for each (class, object) of each image, uint8 [height, width, 3]."""
        crops = [crop_of(image, item) for image, items in zip(images, objects, strict=True) for _, item in items]
        names = [name for items in objects for name, _ in items]
        if not crops:
            return [[] for _ in objects]
        features_ND = self.load().images(crops)
        classifier_N = torch.stack([self.classifier(name) for name in names])  # [N, 10, D]
        chosen = iter(torch.einsum("nd,ncd->nc", features_ND, classifier_N).argmax(1).tolist())
        return [[COLORS[next(chosen)] for _ in items] for items in objects]

    def classifier(self, name: str) -> torch.Tensor:
        """[10, D] unit vectors: one for each of COLORS."""
        if name not in self._classifiers:
            sentences = [template.format(color=color, cls=name) for color in COLORS for template in TEMPLATES]
            embedded = self.load().texts(sentences).view(len(COLORS), len(TEMPLATES), -1).mean(1)
            self._classifiers[name] = torch.nn.functional.normalize(embedded, dim=-1)
        return self._classifiers[name]


def crop_of(image: np.ndarray, item: Detection) -> Image.Image:
    """The object on grey, cut to its box, the corners rounded to whole pixels; at least one pixel of the image."""
    pil = Image.fromarray(image)
    if item.mask is not None:
        if item.mask.shape != image.shape[:2]:
            raise ValueError(f"a mask of {item.mask.shape} for an image of {image.shape[:2]}")
        pil = Image.composite(pil, Image.new("RGB", pil.size, BACKGROUND), Image.fromarray(item.mask))
    x0, y0, x1, y1 = (round(corner) for corner in item.box)
    left, top = min(max(x0, 0), pil.width - 1), min(max(y0, 0), pil.height - 1)
    return pil.crop((left, top, max(x1, left + 1), max(y1, top + 1)) if x1 <= x0 or y1 <= y0 else (x0, y0, x1, y1))


class Colored:
    """A detector whose objects have their colors named afterwards."""

    def __init__(self, detector: Any, namer: ColorNamer) -> None:
        self.detector, self.namer = detector, namer
        self.classes = tuple(detector.classes)
        self.open_vocabulary = bool(getattr(detector, "open_vocabulary", False))

    def detect(self, images: Sequence[np.ndarray]) -> Any:
        return self.detector.detect(images)

    def detect_phrases(self, images: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]) -> Any:
        return self.detector.detect_phrases(images, phrases)

    def name_colors(
        self, images: Sequence[np.ndarray], objects: Sequence[Sequence[tuple[str, Detection]]]
    ) -> list[list[str]]:
        return self.namer.name(images, objects)

    def require_colors(self, where: str) -> None:
        self.namer.load()
