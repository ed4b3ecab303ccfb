"""Scenes to pixels, exactly: flat colors, no antialiasing, so that equal scenes are equal bytes.

The masks are also the detector's templates.
"""

from __future__ import annotations

import numpy as np

from tasks.shapes.world import CANVAS, COLORS, GROUND, OBJECT, Object, Scene


def masks(side: int) -> dict[str, np.ndarray]:
    """Shape name -> bool [side, side]."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2  # centred pixel coordinates, half-integers
    row = np.arange(side)[:, None]
    arm = side / 6
    return {
        "circle": x**2 + y**2 <= (side / 2) ** 2,
        "square": np.ones((side, side), bool),
        "triangle": np.abs(x) <= (row + 1) / 2,  # apex up; the base fills the last row
        "cross": (np.abs(x) < arm) | (np.abs(y) < arm),
    }


MASKS = masks(OBJECT)


def draw(image: np.ndarray, item: Object) -> None:
    """Paint one object into a uint8 image [CANVAS, CANVAS, 3], in place."""
    x0, y0, x1, y1 = item.box
    image[y0:y1, x0:x1][MASKS[item.shape]] = COLORS[item.color]


def render(scene: Scene) -> np.ndarray:
    """uint8 [CANVAS, CANVAS, 3]."""
    image = np.empty((CANVAS, CANVAS, 3), np.uint8)
    image[:] = GROUND
    for item in scene.objects:
        draw(image, item)
    return image
