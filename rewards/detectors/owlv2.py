"""OWLv2: sees whatever phrase it is asked for, as boxes without masks.

Each phrase is a sentence of its own, "a photo of a dog"; a box's score for it is the sigmoid of their similarity
(arXiv:2306.09683). Pictures are padded to squares below and to the right, so boxes are shares of the longer side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rewards.detectors.base import Detections
from rewards.detectors.mask2former import same_size
from rewards.detectors.phrases import by_phrase
from rewards.weights import WeightsError, device_of, folder_of
from rollout.errors import UserError


class Owlv2Detector:
    """An Owlv2ForObjectDetection of transformers."""

    classes: tuple[str, ...] = ()
    open_vocabulary = True
    sees_colors = False  # colors.py names them afterwards

    def __init__(self, path: str, device: str = "auto", batch_size: int = 4, dtype: str = "float32",
                 min_score: float = 0.2, overlap: float | None = None, template: str = "a photo of a {}",
                 download: bool = False) -> None:
        """Load the network.

        Args:
            path: a folder in the released layout (weights, tokenizer, preprocessor_config.json), or a hub id.
            overlap: IoU above which the worse of two boxes of one phrase is dropped; None: none is.
            template: the sentence that a phrase is put into.

        Raises:
            WeightsError: the folder is not there, or holds another kind of model.
        """
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, Owlv2ForObjectDetection

        where = "rewards.detector.path"
        folder = folder_of(path, "config.json", download, where)
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "owlv2":
            raise WeightsError(f"{where}: {path} holds a model of type '{config.model_type}', not owlv2")
        if "{}" not in template:
            raise UserError(f"rewards.detector.template: '{template}' has no {{}} for the phrase")
        self.device = device_of(device, "rewards.detector.device")
        self.processor: Any = AutoImageProcessor.from_pretrained(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = Owlv2ForObjectDetection.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = model.to(self.device).eval()
        self.context = int(config.text_config.max_position_embeddings)
        self.batch_size, self.min_score, self.overlap, self.template = batch_size, min_score, overlap, template

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        raise UserError("owlv2 sees what it is asked for: call detect_phrases")

    def detect_phrases(self, pictures: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        """Objects by phrase."""
        found: list[Detections] = [{} for _ in pictures]
        asked = [row for row in range(len(pictures)) if phrases[row]]
        for batch in same_size([pictures[row] for row in asked], self.batch_size):
            rows = [asked[index] for index in batch]
            for row, objects in zip(rows, self._batch([pictures[row] for row in rows], [phrases[row] for row in rows]),
                                    strict=True):
                found[row] = objects
        return found

    @torch.inference_mode()
    def _batch(self, pictures: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        most = max(len(some) for some in phrases)
        # The network wants equally many phrases for every picture; the last one is repeated and its copies not read.
        sentences = [self.template.format(some[min(place, len(some) - 1)]) for some in phrases for place in range(most)]
        words = self.tokenizer(sentences, padding="max_length", truncation=True, max_length=self.context,
                               return_tensors="pt").to(self.device)
        seen = self.processor(images=list(pictures), return_tensors="pt")
        output = self.model(input_ids=words["input_ids"], attention_mask=words["attention_mask"],
                            pixel_values=seen["pixel_values"].to(self.device, self.model.dtype))
        height, width = pictures[0].shape[:2]
        side = float(max(height, width))
        return [by_phrase(output.logits[row, :, :len(some)].float().sigmoid(), output.pred_boxes[row].float(), some,
                          (side, side), (height, width), self.min_score, self.overlap)
                for row, some in enumerate(phrases)]
