"""OWLv2: sees whatever phrase it is asked for, as boxes without masks.

Each phrase is a sentence of its own, "a photo of a dog"; a box's score for it is the sigmoid of their similarity
(arXiv:2306.09683). Images are padded to squares below and to the right, so boxes are shares of the longer side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.detectors.base import Detections
from rewards.detectors.phrases import PhraseDetector, by_phrase
from runtime.errors import UserError


class Owlv2Detector(PhraseDetector):
    """An Owlv2ForObjectDetection of transformers."""

    name = "owlv2"
    model_type = "owlv2"
    model_class = "Owlv2ForObjectDetection"

    def __init__(
        self,
        path: str,
        device: str = "auto",
        batch_size: int = 4,
        dtype: str = "float32",
        min_score: float = 0.2,
        overlap: float | None = None,
        template: str = "a photo of a {}",
        download: bool = False,
    ) -> None:
        """As PhraseDetector; `template` is the sentence that a phrase is put into."""
        if "{}" not in template:
            raise UserError(f"rewards.detector.template: '{template}' has no {{}} for the phrase")
        super().__init__(path, device, batch_size, dtype, min_score, overlap, download)
        self.context = int(self.config.text_config.max_position_embeddings)
        self.template = template

    def see(self, images: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        most = max(len(some) for some in phrases)
        # The network wants equally many phrases for every image; the last one is repeated and its copies not read.
        sentences = [
            self.template.format(some[min(position, len(some) - 1)]) for some in phrases for position in range(most)
        ]
        words = self.tokenizer(
            sentences, padding="max_length", truncation=True, max_length=self.context, return_tensors="pt"
        ).to(self.device)
        seen = self.processor(images=list(images), return_tensors="pt")
        output = self.model(
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
            pixel_values=seen["pixel_values"].to(self.device, self.model.dtype),
        )
        height, width = images[0].shape[:2]
        side = float(max(height, width))
        return [
            by_phrase(
                output.logits[row, :, : len(some)].float().sigmoid(),
                output.pred_boxes[row].float(),
                some,
                (side, side),
                (height, width),
                self.min_score,
                self.overlap,
            )
            for row, some in enumerate(phrases)
        ]
