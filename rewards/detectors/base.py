"""What sees a picture for the rewards: objects by class, best score first. geneval.py judges what it returns.

shapes.py reads the embedded world exactly; a detector for photographs has the same two members.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rollout.errors import UserError, nearest


class UnknownClass(UserError):
    """A prompt asks for a class that the detector cannot see."""


@dataclass(frozen=True, eq=False)
class Detected:
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in px
    score: float  # 0..1
    color: str | None = None  # None: the detector does not judge colours
    mask: np.ndarray | None = None  # bool [height, width]


Detections = dict[str, list[Detected]]


class Detector(Protocol):
    """Any object with these two members serves."""

    @property
    def classes(self) -> Sequence[str]:
        """Every class it can see."""
        ...

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        """uint8 [height, width, 3] each. Classes that were not seen may be left out."""
        ...


class CachedDetector:
    """Looks at each distinct picture once until it is cleared, however many rewards ask about it."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.classes = tuple(detector.classes)
        self.looks = 0  # pictures that went through the detector
        self._seen: dict[tuple[tuple[int, ...], bytes], Detections] = {}

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        keys = [_key(picture) for picture in pictures]
        new = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in self._seen}
        if new:
            self._seen.update(zip(new, self.detector.detect(list(new.values())), strict=True))
            self.looks += len(new)
        return [self._seen[key] for key in keys]

    def clear(self) -> None:
        self._seen.clear()

    def require(self, classes: Sequence[str], where: str) -> None:
        """Raises UnknownClass for the first class that the detector cannot see."""
        for name in classes:
            if name not in self.classes:
                raise UnknownClass(f"{where} asks for '{name}', which the detector cannot see; "
                                   f"{nearest(name, self.classes)}")


def _key(picture: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return picture.shape, hashlib.blake2b(np.ascontiguousarray(picture).data, digest_size=16).digest()
