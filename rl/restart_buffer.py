"""The pictures that groups may begin from: those that the latest steps' thoughts drew, each judged by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from record.store import load_trajectories, save_trajectories
from record.trajectory import Trajectory
from rl.config import RestartConfig

STEP = "step"  # in a stored picture's info: in which step it was drawn
STREAM = 0x5245  # keeps the draws of pictures apart from other draws of the run's seed


@dataclass
class RestartBuffer:
    """The pictures of the latest steps, each as the thought that ends with it; its reward is the picture's own."""

    pictures: list[Trajectory] = field(default_factory=list)

    def add(self, step: int, pictures: Sequence[Trajectory], steps: int) -> None:
        """Take in a step's pictures, and forget those that are older than `steps` such steps. One without a reward is
        not kept: nobody knows what is better than it."""
        for picture in pictures:
            picture.info[STEP] = step
        judged = [picture for picture in pictures if picture.reward is not None]
        kept = sorted({picture.info[STEP] for picture in (*self.pictures, *judged)})[-steps:]
        self.pictures = [picture for picture in (*self.pictures, *judged) if picture.info[STEP] in kept]

    def draw(self, count: int, config: RestartConfig, seed: int, step: int) -> list[Trajectory]:
        """Pictures for `count` groups: each from the perfect ones with probability perfect_share, else from the rest;
        where there are none of these, from the others. A function of (seed, step) and of what is kept."""
        rng = np.random.default_rng([STREAM, seed, step])
        perfect = [picture for picture in self.pictures if is_perfect(picture, config)]
        rest = [picture for picture in self.pictures if not is_perfect(picture, config)]
        drawn = []
        for _ in range(count):
            first, second = (perfect, rest) if rng.random() < config.perfect_share else (rest, perfect)
            among = first or second
            drawn.append(among[int(rng.integers(len(among)))])
        return drawn

    def save(self, folder: Path) -> None:
        if self.pictures:
            save_trajectories(self.pictures, folder)

    def load(self, folder: Path) -> None:
        self.pictures = load_trajectories(folder) if folder.is_dir() else []


def is_perfect(picture: Trajectory, config: RestartConfig) -> bool:
    return picture.reward is not None and picture.reward >= config.perfect
