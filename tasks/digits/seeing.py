"""Where something stands in an image of the digits world, and with how much ink: what every detector starts from.

Says nothing about which digit it is. tasks/digits/detector.py compares it with scans, a learned detector classifies it.

Letters: P palette colors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from skimage.measure import label

from runtime.errors import UserError
from tasks.digits.world import COLORS, INK
from tasks.shapes.world import CANVAS, GROUND

MIN_AREA = 16  # px; the smallest scan has 38. Smaller blobs are dirt


class ImageError(UserError):
    """An image that is none of this world's."""


@dataclass(frozen=True, eq=False)
class Blob:
    """Ink in one piece."""

    box: tuple[int, int, int, int]  # x0, y0, x1, y1 in px, half-open
    mask: np.ndarray  # bool [32, 32]
    ink: np.ndarray  # float32 [32, 32] in [0, 1]: its share of color in each pixel, 0 outside the mask
    color: str  # the one that most of its ink has
    purity: float  # the share of its ink that has this color


def ink_of(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pixel as a mix of the ground and the nearest palette color: that color's index, int64 [32, 32], and its
    share, float32 [32, 32] in [0, 1]. Off the line between the two the share is what the pixel's nearest point has.

    Raises:
        ImageError: another type or size.
    """
    if image.dtype != np.uint8 or image.shape != (CANVAS, CANVAS, 3):
        raise ImageError(
            f"the digits' detectors read uint8 images of [{CANVAS}, {CANVAS}, 3], not {image.dtype} {list(image.shape)}"
        )
    ground = np.asarray(GROUND, np.float32)
    line_P3 = np.asarray(list(COLORS.values()), np.float32) - ground
    away = image.astype(np.float32) - ground
    share_P = np.clip((away @ line_P3.T) / (line_P3**2).sum(-1), 0, 1)
    distance_P = np.linalg.norm(away[..., None, :] - share_P[..., None] * line_P3, axis=-1)
    best = distance_P.argmin(-1)
    return best, np.take_along_axis(share_P, best[..., None], -1)[..., 0]


def blobs(image: np.ndarray) -> list[Blob]:
    """Pieces of ink in reading order of their boxes. Raises ImageError as `ink_of`."""
    color, share = ink_of(image)
    pieces = label(share > INK, connectivity=2)
    found = []
    for index in range(1, pieces.max() + 1):
        mask = pieces == index
        if mask.sum() < MIN_AREA:
            continue
        ys, xs = np.nonzero(mask)
        ink = np.where(mask, share, 0)
        by_color = np.bincount(color[mask], ink[mask], minlength=len(COLORS))
        best = int(by_color.argmax())
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        found.append(Blob(box, mask, ink, tuple(COLORS)[best], float(by_color[best] / by_color.sum())))
    return sorted(found, key=lambda blob: (blob.box[1], blob.box[0]))


def window(ink: np.ndarray, box: Sequence[int], side: int) -> np.ndarray:
    """float32 [side, side] of ink around a box's centre; 0 beyond the canvas."""
    x, y = (box[0] + box[2] - side) // 2, (box[1] + box[3] - side) // 2
    padded = np.pad(ink, side)
    return padded[y + side : y + 2 * side, x + side : x + 2 * side]
