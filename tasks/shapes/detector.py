"""Pixels back to objects: exact on rendered scenes, and forgiving enough for a visual tokenizer's reconstructions.

Each pixel is given the palette color it is a tint of, blobs of one color are labelled (scikit-image), and each blob
is compared with the templates of render.py. Reads 32 x 32 images of the shapes world and nothing else.

Letters: P palette colors (ground first), K templates (shape by shift), W a window's pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
from skimage.measure import label

from runtime.errors import UserError
from tasks.base import Detection
from tasks.shapes.render import MASKS
from tasks.shapes.world import CANVAS, COLORS, GROUND

MIN_AREA = 24  # px; smaller blobs are blur or dirt. A quarter of the smallest shape's area is 20
SHIFT = 2  # px by which a blob's box may be off a template's

# A blob that covers a template to IoU 0.55 or less scores 0 (the shapes overlap one another by 0.52 to 0.78, so half
# an object, or two halves of different ones, lies there), one at 0.85 or more scores 1: GenEval's thresholds of 0.3
# and 0.9 fall at IoU 0.64 and 0.82.
IOU_FLOOR, IOU_FULL = 0.55, 0.85

_COLOR_NAMES = tuple(COLORS)
Reading = tuple[str, str | None, float]  # of a blob: its shape, its size where there are several, its score


class ImageError(UserError):
    """An image that is none of this world's."""


@cache
def _color_table() -> np.ndarray:
    """uint8 [32, 32, 32]: index of the palette color (0 is the ground) by the upper five bits of r, g, b.

    A pixel on an object's edge is a mix of ground and color, so colors are told apart by their distance from the
    line between the ground and each color, and belong to an object when more than half of the mix is color.
    """
    levels = np.arange(32, dtype=np.float32) * 8 + 4
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1)
    ground = np.asarray(GROUND, np.float32)
    line_P3 = np.asarray(list(COLORS.values()), np.float32) - ground
    away = rgb - ground
    share_P = (away @ line_P3.T) / (line_P3**2).sum(-1)
    nearest_P3 = np.clip(share_P, 0, 1)[..., None] * line_P3
    distance_P = np.linalg.norm(away[..., None, :] - nearest_P3, axis=-1)
    best = distance_P.argmin(-1)
    share = np.take_along_axis(share_P, best[..., None], -1)[..., 0]
    return np.where(share > 0.5, best + 1, 0).astype(np.uint8)


class Templates:
    """The masks of one size of object at every shift in a window, to compare blobs with.

    Args:
        masks: shape to bool [side, side].
        shift: px by which a blob's box may be off a template's.
    """

    def __init__(self, masks: Mapping[str, np.ndarray], shift: int) -> None:
        side = len(next(iter(masks.values())))
        self.window = side + 2 * shift
        self.shapes = tuple(masks)
        templates, shape_K = [], []
        for index, mask in enumerate(masks.values()):
            for dy in range(2 * shift + 1):
                for dx in range(2 * shift + 1):
                    window = np.zeros((self.window, self.window), np.float32)
                    window[dy : dy + side, dx : dx + side] = mask
                    templates.append(window.ravel())
                    shape_K.append(index)
        self.templates_KW = np.stack(templates)  # float32
        self.areas_K, self.shape_K = self.templates_KW.sum(1), shape_K

    def match(self, mask: np.ndarray, box: tuple[float, ...], area: int) -> tuple[str, float]:
        """The shape whose template, at the best shift, overlaps a blob most, and that overlap (IoU)."""
        side = self.window
        x = round((box[0] + box[2] - side) / 2)
        y = round((box[1] + box[3] - side) / 2)
        padded = np.pad(mask, side)
        window = padded[y + side : y + 2 * side, x + side : x + 2 * side]
        shared_K = self.templates_KW @ window.ravel().astype(np.float32)
        iou_K = shared_K / (self.areas_K + area - shared_K)
        best = int(iou_K.argmax())
        return self.shapes[self.shape_K[best]], float(iou_K[best])


@cache
def _templates() -> Templates:
    return Templates(MASKS, SHIFT)


def color_map(image: np.ndarray) -> np.ndarray:
    """uint8 [32, 32]: each pixel's color, 0 the ground, 1 the first of COLORS. Raises ImageError as `detect`."""
    if image.dtype != np.uint8 or image.shape != (CANVAS, CANVAS, 3):
        raise ImageError(
            f"the shapes detector reads uint8 images of [{CANVAS}, {CANVAS}, 3], not {image.dtype} {list(image.shape)}"
        )
    r, g, b = np.moveaxis(image >> 3, -1, 0)
    return _color_table()[r, g, b]


def detect(image: np.ndarray) -> list[Detection]:
    """Objects in an image, best score first, then in reading order.

    Args:
        image: uint8 [32, 32, 3].

    Raises:
        ImageError: another type or size.
    """
    return read_blobs(image, MIN_AREA, _read)


def _read(mask: np.ndarray, box: tuple[float, ...], area: int) -> Reading:
    shape, iou = _templates().match(mask, box, area)
    return shape, None, scored(iou, IOU_FLOOR, IOU_FULL)


def scored(iou: float, floor: float, full: float) -> float:
    """0 up to an overlap of `floor`, 1 from `full` on, linear between them."""
    return float(np.clip((iou - floor) / (full - floor), 0, 1))


def read_blobs(
    image: np.ndarray, least: int, read: Callable[[np.ndarray, tuple[float, ...], int], Reading]
) -> list[Detection]:
    """Every blob of one color with `least` px or more that `read` (mask, box, area) takes for an object, best score
    first, then in reading order. Raises ImageError as `detect`."""
    colors = color_map(image)
    blobs = label(colors, background=0, connectivity=1)
    areas = np.bincount(blobs.ravel())
    found = []
    for index in np.flatnonzero(areas[1:] >= least) + 1:
        mask = blobs == index
        ys, xs = np.nonzero(mask)
        box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
        shape, size, score = read(mask, box, int(areas[index]))
        if score > 0:
            found.append(Detection(box, score, _COLOR_NAMES[colors[ys[0], xs[0]] - 1], mask, shape, size))
    return sorted(found, key=lambda d: (-d.score, d.box[1], d.box[0]))
