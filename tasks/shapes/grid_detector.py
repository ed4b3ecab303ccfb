"""Pixels back to the objects of the grid, with their sizes: detector.py's way, with templates of both sizes.

A blob is compared with the templates of the size that its box is nearer to. A quarter of a large circle is nearly a
small square (IoU 0.83), so a small object counts only from where no torn large one lies: GenEval's threshold of 0.3
falls at IoU 0.845, that of 0.9 at 0.935.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tasks.base import Detection
from tasks.shapes.detector import IOU_FLOOR, IOU_FULL, Reading, Templates, read_blobs, scored
from tasks.shapes.grid import MASKS_OF, SIZES

MIN_AREA = 12  # px; smaller blobs are blur or dirt. The smallest object, a small cross, has 20
SHIFT = {"small": 1, "large": 2}  # px by which a blob's box may be off a template's
# IoU from which an object has a score above 0, and from which it has 1.
SCORED = {"small": (0.8, 0.95), "large": (IOU_FLOOR, IOU_FULL)}


@cache
def _templates(size: str) -> Templates:
    return Templates(MASKS_OF[size], SHIFT[size])


def detect(image: np.ndarray) -> list[Detection]:
    """Objects in an image, best score first, then in reading order.

    Args:
        image: uint8 [32, 32, 3].

    Raises:
        ImageError: another type or size.
    """
    return read_blobs(image, MIN_AREA, _read)


def _read(mask: np.ndarray, box: tuple[float, ...], area: int) -> Reading:
    side = max(box[2] - box[0], box[3] - box[1])
    size = min(SIZES, key=lambda name: abs(SIZES[name] - side))
    shape, iou = _templates(size).match(mask, box, area)
    return shape, size, scored(iou, *SCORED[size])
