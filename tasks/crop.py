"""A part of a picture, enlarged: what the tool `look` answers, and what demonstrations of it show."""

from __future__ import annotations

import numpy as np
from PIL import Image


def crop(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """The box of an image, enlarged to the image's size, uint8 [height, width, 3].

    The box (x0, y0, x1, y1 in px, half-open) first grows around its middle to the image's proportions, inside of the
    image, so that nothing is distorted.
    """
    height, width = image.shape[:2]
    x0, y0, x1, y1 = box
    scale = max((x1 - x0) / width, (y1 - y0) / height)
    wide, high = min(width, round(scale * width)), min(height, round(scale * height))
    left = int(np.clip(round((x0 + x1 - wide) / 2), 0, width - wide))
    top = int(np.clip(round((y0 + y1 - high) / 2), 0, height - high))
    part = Image.fromarray(image[top : top + high, left : left + wide])
    return np.asarray(part.resize((width, height), Image.Resampling.BICUBIC))
