"""What the open-vocabulary detectors share: loading, batching, and from scores of (box, phrase) to objects by phrase.

Letters: Q boxes, P phrases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert, clip_boxes_to_image, nms

from rewards.detectors.base import Detection, Detections
from rewards.detectors.mask2former import same_size
from rewards.detectors.weights import WeightsError, device_of, folder_of
from runtime.errors import UserError


class PhraseDetector:
    """A detector of transformers that sees whatever phrase it is asked for, as boxes without masks. A subclass names
    its model and says what it sees in one batch."""

    classes: tuple[str, ...] = ()
    open_vocabulary = True
    sees_colors = False  # colors.py names them afterwards
    name: str  # in recipes
    model_type: str  # in the released config.json
    model_class: str  # of transformers

    def __init__(
        self,
        path: str,
        device: str,
        batch_size: int,
        dtype: str,
        min_score: float,
        overlap: float | None,
        download: bool,
    ) -> None:
        """Load the network.

        Args:
            path: a folder in the released layout (weights, tokenizer, preprocessor_config.json), or a hub id.
            min_score: boxes at or below it are left out.
            overlap: IoU above which the worse of two boxes of one phrase is dropped; None: none is.

        Raises:
            WeightsError: the folder is not there, or holds another kind of model.
        """
        import transformers

        where = "rewards.detector.path"
        folder = folder_of(path, "config.json", download, where)
        self.config: Any = transformers.AutoConfig.from_pretrained(folder)
        if self.config.model_type != self.model_type:
            raise WeightsError(
                f"{where}: {path} holds a model of type '{self.config.model_type}', not {self.model_type}"
            )
        self.device = device_of(device, "rewards.detector.device")
        self.processor: Any = transformers.AutoImageProcessor.from_pretrained(folder)
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        model = getattr(transformers, self.model_class).from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = model.to(self.device).eval()
        self.batch_size, self.min_score, self.overlap = batch_size, min_score, overlap

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        raise UserError(f"{self.name} sees what it is asked for: call detect_phrases")

    def detect_phrases(self, images: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        """Objects by phrase. Raises UserError for more phrases than the text encoder reads."""
        found: list[Detections] = [{} for _ in images]
        asked = [row for row in range(len(images)) if phrases[row]]
        for batch in same_size([images[row] for row in asked], self.batch_size):
            rows = [asked[index] for index in batch]
            with torch.inference_mode():
                objects = self.see([images[row] for row in rows], [phrases[row] for row in rows])
            for row, those in zip(rows, objects, strict=True):
                found[row] = those
        return found

    def see(self, images: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        """Objects of images of one size, at least one phrase each."""
        raise NotImplementedError


def by_phrase(
    score_QP: torch.Tensor,
    box_Q4: torch.Tensor,
    phrases: Sequence[str],
    scale: tuple[float, float],
    size: tuple[int, int],
    min_score: float,
    overlap: float | None,
) -> Detections:
    """Objects of one image, best first. Every box belongs to the phrase that it scores best for.

    Args:
        box_Q4: centre x, centre y, width, height as shares of `scale`.
        scale: (height, width) in px that the shares refer to.
        size: (height, width) of the image in px; boxes are cut to it.
        min_score: boxes at or below it are left out.
        overlap: of two boxes of one phrase with a larger IoU the worse one is dropped; None: both stay.
    """
    score_Q, phrase_Q = score_QP.max(1)
    left = (score_Q > min_score).nonzero(as_tuple=True)[0]
    left = left[score_Q[left].argsort(descending=True, stable=True)]
    height, width = scale
    corners = box_convert(box_Q4[left], "cxcywh", "xyxy") * torch.tensor(
        [width, height, width, height], device=box_Q4.device
    )
    corners = clip_boxes_to_image(corners, size)
    found: Detections = {}
    for position in range(len(phrases)):
        mine = (phrase_Q[left] == position).nonzero(as_tuple=True)[0]
        if overlap is not None:
            mine = mine[nms(corners[mine].float(), score_Q[left][mine].float(), overlap)]
        if len(mine):
            found[phrases[position]] = [
                Detection((x0, y0, x1, y1), score)
                for (x0, y0, x1, y1), score in zip(corners[mine].tolist(), score_Q[left][mine].tolist(), strict=True)
            ]
    return found
