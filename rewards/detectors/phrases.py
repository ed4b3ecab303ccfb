"""What the open-vocabulary detectors share: from scores of (box, phrase) to objects by phrase.

Letters: Q boxes, P phrases.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchvision.ops import box_convert, clip_boxes_to_image, nms

from rewards.detectors.base import Detected, Detections


def by_phrase(score_QP: torch.Tensor, box_Q4: torch.Tensor, phrases: Sequence[str], scale: tuple[float, float],
              size: tuple[int, int], min_score: float, overlap: float | None) -> Detections:
    """Objects of one picture, best first. Every box belongs to the phrase that it scores best for.

    Args:
        box_Q4: centre x, centre y, width, height as shares of `scale`.
        scale: (height, width) in px that the shares refer to.
        size: (height, width) of the picture in px; boxes are cut to it.
        min_score: boxes at or below it are left out.
        overlap: of two boxes of one phrase with a larger IoU the worse one is dropped; None: both stay.
    """
    score_Q, phrase_Q = score_QP.max(1)
    left = (score_Q > min_score).nonzero(as_tuple=True)[0]
    left = left[score_Q[left].argsort(descending=True, stable=True)]
    height, width = scale
    corners = box_convert(box_Q4[left], "cxcywh", "xyxy") * torch.tensor([width, height, width, height],
                                                                         device=box_Q4.device)
    corners = clip_boxes_to_image(corners, size)
    found: Detections = {}
    for place in range(len(phrases)):
        mine = (phrase_Q[left] == place).nonzero(as_tuple=True)[0]
        if overlap is not None:
            mine = mine[nms(corners[mine].float(), score_Q[left][mine].float(), overlap)]
        if len(mine):
            found[phrases[place]] = [Detected((x0, y0, x1, y1), score) for (x0, y0, x1, y1), score in
                                     zip(corners[mine].tolist(), score_Q[left][mine].tolist(), strict=True)]
    return found
