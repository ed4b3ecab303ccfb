"""Grounding DINO: sees whatever phrase it is asked for, as boxes without masks.

The phrases of an image are one caption, "dog. red cup."; a (box, phrase) scores the largest sigmoid among the
phrase's own tokens. The released `predict` (IDEA-Research/GroundingDINO, arXiv:2303.05499) takes the largest over the
whole caption, full stops included, and reads the phrase off the tokens above a second threshold. Scores are lower than
a closed detector's: the usual threshold is 0.35, and GenEval's 0.9 for counting would let nothing pass, so a recipe
states its own thresholds with it (options `threshold` and `counting_threshold` of `geneval`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rewards.detectors.base import Detections
from rewards.detectors.phrases import PhraseDetector, by_phrase
from runtime.errors import UserError


class GroundingDinoDetector(PhraseDetector):
    """A GroundingDinoForObjectDetection of transformers. The release drops no overlapping box of a phrase."""

    name = "grounding_dino"
    model_type = "grounding-dino"
    model_class = "GroundingDinoForObjectDetection"

    def __init__(
        self,
        path: str,
        device: str = "auto",
        batch_size: int = 4,
        dtype: str = "float32",
        min_score: float = 0.35,
        overlap: float | None = None,
        download: bool = False,
    ) -> None:
        """As PhraseDetector."""
        super().__init__(path, device, batch_size, dtype, min_score, overlap, download)
        self.max_tokens = int(self.config.max_text_len)

    def see(self, images: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        captions, spans = zip(*[caption_of(some) for some in phrases], strict=True)
        words = self.tokenizer(list(captions), padding=True, return_offsets_mapping=True, return_tensors="pt")
        offsets = words.pop("offset_mapping")
        if words["input_ids"].shape[1] > self.max_tokens:
            longest = max(captions, key=len)
            raise UserError(
                f"grounding_dino reads {self.max_tokens} tokens at once; '{longest[:80]}...' has more: "
                f"ask for fewer phrases"
            )
        # Images of a batch have one size, so nothing is padded and shares refer to the whole image.
        seen = self.processor(images=list(images), return_tensors="pt")
        output = self.model(
            pixel_values=seen["pixel_values"].to(self.device, self.model.dtype),
            pixel_mask=seen["pixel_mask"].to(self.device),
            **words.to(self.device),
        )
        found = []
        size = (images[0].shape[0], images[0].shape[1])
        for row, some in enumerate(phrases):
            probability = output.logits[row].float().sigmoid()
            score_QP = torch.stack([probability[:, tokens_of(offsets[row], span)].amax(1) for span in spans[row]], 1)
            found.append(
                by_phrase(score_QP, output.pred_boxes[row].float(), some, size, size, self.min_score, self.overlap)
            )
        return found


def caption_of(phrases: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The caption, lower case, each phrase ended by a full stop, and where each phrase stands in it."""
    caption, spans = "", []
    for phrase in phrases:
        words = phrase.strip().lower().rstrip(".")
        spans.append((len(caption), len(caption) + len(words)))
        caption += words + ". "
    return caption.rstrip(), spans


def tokens_of(offsets_T2: torch.Tensor, span: tuple[int, int]) -> list[int]:
    """Places of the tokens that lie inside a span of characters; special tokens cover none."""
    return [
        position
        for position, (start, stop) in enumerate(offsets_T2.tolist())
        if start < stop and start >= span[0] and stop <= span[1]
    ]
