"""Pixels back to digits by the scans themselves: what is like none of the 1,797 is nothing.

Each blob of ink is compared with every scan at every shift of a pixel; it is the digit of the nearest one. There is
nothing learned in it that an image could be made to please: the only way to a high score is to look like a scan.

Letters: K scans, S shifts, W a window's pixels.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tasks.base import Detection
from tasks.digits.scans import OBJECT, enlarged, scans
from tasks.digits.seeing import Blob, blobs, window
from tasks.digits.world import INK, ink_box

SHIFT = 1  # px by which a blob's box may be off a scan's
_SIDE = OBJECT + 4
# The distance of a blob to a scan is |a - b|^2 / (|a|^2 + |b|^2) over the ink of both: 0 where they are equal, 1 where
# they share nothing. At NEAR or less it scores 1, at FAR or more 0. GenEval's thresholds of 0.3 and 0.9 fall between.
NEAR, FAR = 0.06, 0.11
PURE = 0.75  # share of a blob's ink that has its color; below it is no object of one color


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """float32 [K, W]: each scan's ink, centred by its box as a blob's is; and the squared lengths [K]."""
    rows = []
    for index, ink in enumerate(enlarged()):
        rows.append(window(np.where(ink > INK, ink, 0), ink_box(index), _SIDE).ravel())
    templates_KW = np.stack(rows).astype(np.float32)
    return templates_KW, (templates_KW**2).sum(1)


def distances(blob: Blob) -> np.ndarray:
    """float32 [K]: how far a blob is from each scan, at its best shift; in [0, 1]."""
    templates_KW, length_K = _templates()
    wide = window(blob.ink, blob.box, _SIDE + 2 * SHIFT)
    steps = range(2 * SHIFT + 1)
    shifted_SW = np.stack([wide[y : y + _SIDE, x : x + _SIDE].ravel() for y in steps for x in steps])
    both_SK = (shifted_SW**2).sum(1)[:, None] + length_K
    shared_SK = shifted_SW @ templates_KW.T
    return np.clip((1 - 2 * shared_SK / both_SK).min(0), 0, 1)


def detect(image: np.ndarray) -> list[Detection]:
    """Digits in an image, best score first, then in reading order.

    Args:
        image: uint8 [32, 32, 3].

    Raises:
        ImageError: another type or size.
    """
    found = []
    for blob in blobs(image):
        distance_K = distances(blob)
        nearest = int(distance_K.argmin())
        score = float(np.clip((FAR - distance_K[nearest]) / (FAR - NEAR), 0, 1))
        if score > 0 and blob.purity >= PURE:
            box = (float(blob.box[0]), float(blob.box[1]), float(blob.box[2]), float(blob.box[3]))
            found.append(Detection(box, score, blob.color, blob.mask, str(scans()[1][nearest])))
    return sorted(found, key=lambda one: -one.score)
