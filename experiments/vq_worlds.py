"""What a visual tokenizer is trained on and measured by: the scenes of the shapes world's levels, and of the digits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from experiments import _digits
from tasks.base import Detection
from tasks.digits import world as digits_world
from tasks.digits.detector import detect as digits_detect
from tasks.shapes import detector, grid, grid_detector, grid_prompts, render
from tasks.shapes.world import MAX_OBJECTS, Scene, sample_scene

MOST_SMALL = 8  # objects of a scene of the grid


@dataclass(frozen=True)
class World:
    """One world of images.

    Attributes:
        masks: of the sizes that its objects have, for strays: images outside its rules.
        stray: makes such an image where objects have no masks.
    """

    sample: Callable[[np.random.Generator], Scene]
    render: Callable[[Scene], np.ndarray]
    detect: Callable[[np.ndarray], list[Detection]]
    masks: tuple[Mapping[str, np.ndarray], ...]
    codes: int  # of the codebook
    stray: Callable[[np.random.Generator], np.ndarray] | None = None


def _easy(rng: np.random.Generator) -> Scene:
    return sample_scene(rng, int(rng.integers(MAX_OBJECTS + 1)))


def _grid(rng: np.random.Generator) -> Scene:
    return grid.sample_scene(rng, int(rng.integers(MOST_SMALL + 1)), int(rng.integers(grid.MOST_LARGE + 1)))


def _levels(rng: np.random.Generator) -> Scene:
    """Half of them as prompts ask for them, where many objects look alike, and parts of those; the others any."""
    if rng.random() < 0.5:
        return _grid(rng)
    level: grid_prompts.Level = "middle" if rng.random() < 0.5 else "hard"
    tags = grid_prompts.TAGS[level]
    records = grid_prompts.pool(level, "train", tags[rng.integers(len(tags))])
    scene = grid.sample_scene_for(records[rng.integers(len(records))], rng)
    count = len(scene.objects) if rng.random() < 0.7 else int(rng.integers(len(scene.objects)))
    return Scene(scene.objects[:count])


WORLDS = {
    "easy": World(_easy, render.render, detector.detect, (render.MASKS,), 512),
    "grid": World(_grid, grid.render, grid_detector.detect, tuple(grid.MASKS_OF.values()), 256),
    "levels": World(_levels, grid.render, grid_detector.detect, tuple(grid.MASKS_OF.values()), 256),
    "digits": World(_digits.sample, digits_world.render, digits_detect, (), 512, _digits.stray),
}
