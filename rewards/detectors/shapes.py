"""The embedded worlds' own detectors, in the rewards' form: whatever a task's `detect` sees, grouped by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rewards.detectors.base import Detection, Detections


class TaskDetector:
    """A Detector over a task's `detect`. Quick and pure, so it runs in the driver."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self.classes: tuple[str, ...] = tuple(task.classes)
        self.colors: tuple[str, ...] = tuple(getattr(task, "colors", ()))  # empty: GenEval's
        self.sizes: tuple[str, ...] = tuple(getattr(task, "sizes", ()))  # empty: it tells none

    @staticmethod
    def of(task: Any) -> TaskDetector | None:
        """None where the task has nothing to detect with."""
        if getattr(task, "detect", None) is None or getattr(task, "classes", None) is None:
            return None
        return TaskDetector(task)

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        found = []
        for image in images:
            objects: Detections = {}
            for seen in self.task.detect(image):
                objects.setdefault(seen.cls, []).append(
                    Detection(seen.box, seen.score, seen.color, seen.mask, size=seen.size)
                )
            found.append(objects)
        return found


def shapes_detector() -> TaskDetector:
    """The shapes world's detector at its level easy, for images that no run of the task made."""
    from tasks.registry import get_task

    return TaskDetector(get_task("shapes"))


def shapes_grid_detector() -> TaskDetector:
    """That of its levels middle and hard, which see alike."""
    from tasks.registry import get_task

    return TaskDetector(get_task("shapes", level="hard"))
