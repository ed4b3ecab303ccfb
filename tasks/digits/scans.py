"""The scans: 1,797 handwritten digits of 8 x 8 px that scikit-learn ships, and who may see which of them.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (1998), its
test set, as `sklearn.datasets.load_digits` reads it from the installed package: nothing is fetched.

Three uses are kept apart, class by class in the order of the data, so that no figure is of a scan that its subject has
seen: demonstrations are drawn with the first DRAWN of a digit, the learned detector is trained on the next LEARNED, and
the rest is held out.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
from PIL import Image

DIGITS = tuple("0123456789")
SIDE = 8  # px of a scan
OBJECT = 14  # px of a scan as it stands on the canvas; 1 px is left on each side of its block
DRAWN, LEARNED = 20, 40  # scans of each digit

Use = Literal["drawn", "learned", "heldout"]


@cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """All scans: ink, float32 [1797, 8, 8] in [0, 1], and digits, int64 [1797]."""
    from sklearn.datasets import load_digits  # half a second, which only who looks at a digit waits

    data = load_digits()
    return data.images.astype(np.float32) / 16, data.target.astype(np.int64)


@cache
def used_for(use: Use, digit: str) -> tuple[int, ...]:
    """Indices of a digit's scans for one use, in the order of the data."""
    every = np.flatnonzero(scans()[1] == int(digit)).tolist()
    first, last = {"drawn": (0, DRAWN), "learned": (DRAWN, DRAWN + LEARNED), "heldout": (DRAWN + LEARNED, None)}[use]
    return tuple(every[first:last])


@cache
def enlarged() -> np.ndarray:
    """Ink of all scans at the size they are drawn in, float32 [1797, 14, 14] in [0, 1]."""
    ink = scans()[0]
    large = [Image.fromarray(one).resize((OBJECT, OBJECT), Image.Resampling.BICUBIC) for one in ink]
    return np.clip(np.stack([np.asarray(one) for one in large]), 0, 1)
