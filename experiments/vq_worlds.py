"""What a visual tokenizer of the shapes world is trained on and measured by: the scenes of its levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tasks.base import Detection
from tasks.shapes import detector, grid, grid_detector, render
from tasks.shapes.world import MAX_OBJECTS, Scene, sample_scene

MOST_SMALL = 8  # objects of a scene of the grid


@dataclass(frozen=True)
class World:
    """One world of images. `masks` are of the sizes that its objects have."""

    sample: Callable[[np.random.Generator], Scene]
    render: Callable[[Scene], np.ndarray]
    detect: Callable[[np.ndarray], list[Detection]]
    masks: tuple[Mapping[str, np.ndarray], ...]
    codes: int  # of the codebook


def _easy(rng: np.random.Generator) -> Scene:
    return sample_scene(rng, int(rng.integers(MAX_OBJECTS + 1)))


def _grid(rng: np.random.Generator) -> Scene:
    return grid.sample_scene(rng, int(rng.integers(MOST_SMALL + 1)), int(rng.integers(grid.MOST_LARGE + 1)))


WORLDS = {
    "easy": World(_easy, render.render, detector.detect, (render.MASKS,), 512),
    "grid": World(_grid, grid.render, grid_detector.detect, tuple(grid.MASKS_OF.values()), 256),
}
