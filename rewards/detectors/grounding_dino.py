"""Grounding DINO: sees whatever phrase it is asked for, as boxes without masks.

The phrases of a picture are one caption, "dog. red cup."; a (box, phrase) scores the largest sigmoid among the
phrase's own tokens. The released `predict` (IDEA-Research/GroundingDINO, arXiv:2303.05499) takes the largest over the
whole caption, full stops included, and reads the phrase off the tokens above a second threshold. Scores are lower than
a closed detector's: the usual threshold is 0.35, and GenEval's 0.9 for counting would let nothing pass, so a recipe
states its own thresholds with it (options `threshold` and `counting_threshold` of `geneval`).
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


class GroundingDinoDetector:
    """A GroundingDinoForObjectDetection of transformers."""

    classes: tuple[str, ...] = ()
    open_vocabulary = True
    sees_colors = False  # colors.py names them afterwards

    def __init__(self, path: str, device: str = "auto", batch_size: int = 4, dtype: str = "float32",
                 min_score: float = 0.35, overlap: float | None = None, download: bool = False) -> None:
        """Load the network.

        Args:
            path: a folder in the released layout (weights, tokenizer, preprocessor_config.json), or a hub id.
            overlap: IoU above which the worse of two boxes of one phrase is dropped; None: the release drops none.

        Raises:
            WeightsError: the folder is not there, or holds another kind of model.
        """
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GroundingDinoForObjectDetection

        where = "rewards.detector.path"
        folder = folder_of(path, "config.json", download, where)
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "grounding-dino":
            raise WeightsError(f"{where}: {path} holds a model of type '{config.model_type}', not grounding-dino")
        self.device = device_of(device, "rewards.detector.device")
        self.processor: Any = AutoImageProcessor.from_pretrained(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = GroundingDinoForObjectDetection.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = model.to(self.device).eval()
        self.max_tokens = int(config.max_text_len)
        self.batch_size, self.min_score, self.overlap = batch_size, min_score, overlap

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        raise UserError("grounding_dino sees what it is asked for: call detect_phrases")

    def detect_phrases(self, pictures: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        """Objects by phrase. Raises UserError for more phrases than the text encoder reads."""
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
        captions, spans = zip(*[caption_of(some) for some in phrases], strict=True)
        words = self.tokenizer(list(captions), padding=True, return_offsets_mapping=True, return_tensors="pt")
        offsets = words.pop("offset_mapping")
        if words["input_ids"].shape[1] > self.max_tokens:
            longest = max(captions, key=len)
            raise UserError(f"grounding_dino reads {self.max_tokens} tokens at once; '{longest[:80]}...' has more: "
                            f"ask for fewer phrases")
        # Pictures of a batch have one size, so nothing is padded and shares refer to the whole picture.
        seen = self.processor(images=list(pictures), return_tensors="pt")
        output = self.model(pixel_values=seen["pixel_values"].to(self.device, self.model.dtype),
                            pixel_mask=seen["pixel_mask"].to(self.device), **words.to(self.device))
        found = []
        size = (pictures[0].shape[0], pictures[0].shape[1])
        for row, some in enumerate(phrases):
            probability = output.logits[row].float().sigmoid()
            score_QP = torch.stack([probability[:, tokens_of(offsets[row], span)].amax(1) for span in spans[row]], 1)
            found.append(by_phrase(score_QP, output.pred_boxes[row].float(), some, size, size, self.min_score,
                                   self.overlap))
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
    return [place for place, (start, stop) in enumerate(offsets_T2.tolist())
            if start < stop and start >= span[0] and stop <= span[1]]
