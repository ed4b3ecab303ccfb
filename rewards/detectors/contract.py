"""What a detector must keep, whoever wrote it. Run it on your own: `check_detector(my_detector, images)`.

A failure is an AssertionError whose first words are the detector's class and the promise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rewards.detectors.base import COLORS, Detection, Detections
from tasks.contract import detection_fault

TOLERANCE = 1e-3  # of scores, and of box corners as shares of the image's sides


def check_detector(
    detector: Any,
    images: Sequence[np.ndarray],
    phrases: Sequence[Sequence[str]] | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> None:
    """Check what a detector says of some images: together, one by one, and once more.

    Args:
        images: uint8 [height, width, 3], better of several sizes, with something in them that it sees.
        phrases: by image, what a detector with an open vocabulary is asked for.
        tolerance: by how much scores may differ between an image alone and one in a batch; networks round.

    Raises:
        AssertionError: a promise is broken; the message names the detector and the promise.
    """
    check = _Check(detector, phrases, tolerance)
    check.members()
    together = check.look(images)
    for number, (image, found) in enumerate(zip(images, together, strict=True)):
        check.objects(number, image, found)
    check.same(images, together, check.look(images), "looking twice gives two answers")
    alone = [check.look([image], [number])[0] for number, image in enumerate(images)]
    check.same(images, together, alone, "an image alone is seen otherwise than among others")
    check.require(len(check.look([], [])) == 0, "detect", "nothing is seen in no image")
    if hasattr(detector, "name_colors"):
        check.colors(images, together)


class _Check:
    def __init__(self, detector: Any, phrases: Sequence[Sequence[str]] | None, tolerance: float) -> None:
        self.detector, self.phrases, self.tolerance = detector, phrases, tolerance
        self.open = bool(getattr(detector, "open_vocabulary", False))

    def require(self, holds: bool, promise: str, sentence: str) -> None:
        assert holds, f"{type(self.detector).__name__}: {promise}: {sentence}"

    def members(self) -> None:
        classes = getattr(self.detector, "classes", None)
        self.require(classes is not None, "classes", "missing: every class that it can see, or nothing")
        names = tuple(classes or ())
        self.require(all(isinstance(name, str) for name in names), "classes", "they are texts")
        self.require(len(set(names)) == len(names), "classes", "one of them stands there twice")
        if self.open:
            self.require(hasattr(self.detector, "detect_phrases"), "detect_phrases", "an open vocabulary wants it")
            self.require(self.phrases is not None, "phrases", "an open vocabulary is asked for some; give them")
        else:
            self.require(bool(names), "classes", "there are none, and no open vocabulary")
            self.require(hasattr(self.detector, "detect"), "detect", "missing")

    def look(self, images: Sequence[np.ndarray], numbers: Sequence[int] | None = None) -> list[Detections]:
        chosen = range(len(images)) if numbers is None else numbers
        before = [image.copy() for image in images]
        if self.open:
            assert self.phrases is not None
            found = self.detector.detect_phrases(list(images), [self.phrases[number] for number in chosen])
        else:
            found = self.detector.detect(list(images))
        untouched = all(np.array_equal(a, b) for a, b in zip(images, before, strict=True))
        self.require(untouched, "detect", "it wrote to an image")
        self.require(len(found) == len(images), "detect", f"{len(found)} answers for {len(images)} images")
        return list(found)

    def objects(self, number: int, image: np.ndarray, found: Detections) -> None:
        where = f"image {number}"
        known = set(self.phrases[number]) if self.open and self.phrases is not None else set(self.detector.classes)
        colors = set(getattr(self.detector, "colors", ()) or COLORS)
        for name, items in found.items():
            self.require(name in known, "detect", f"{where}: '{name}' is nothing that it was to look for")
            for item in items:
                self.require(isinstance(item, Detection), "detect", f"{where}: {item!r} is no Detection")
                fault = detection_fault(item, image)
                self.require(not fault, "detect", f"{where}, '{name}': {fault}")
                named = item.color is None or item.color in colors
                self.require(named, "colors", f"{where}, '{name}': the color '{item.color}' is none that it names")
                told = item.size is None or item.size in getattr(self.detector, "sizes", ())
                self.require(told, "sizes", f"{where}, '{name}': the size '{item.size}' is none that it tells")
            scores = [item.score for item in items]
            best_first = scores == sorted(scores, reverse=True)
            self.require(best_first, "detect", f"{where}, '{name}': the best does not come first")

    def same(
        self, images: Sequence[np.ndarray], a: Sequence[Detections], b: Sequence[Detections], sentence: str
    ) -> None:
        for number, (image, here, there) in enumerate(zip(images, a, b, strict=True)):
            sides = np.array([image.shape[1], image.shape[0]] * 2)
            for name in {*here, *there}:
                ours, theirs = here.get(name, []), there.get(name, [])
                equal = len(ours) == len(theirs) and all(
                    abs(x.score - y.score) <= self.tolerance
                    and bool((np.abs(np.array(x.box) - np.array(y.box)) <= self.tolerance * sides).all())
                    for x, y in zip(ours, theirs, strict=False)
                )
                self.require(equal, "detect", f"image {number}, '{name}': {sentence}")

    def colors(self, images: Sequence[np.ndarray], found: Sequence[Detections]) -> None:
        """One color for each object that is asked about, among those that it names."""
        rows = [[(name, item) for name, items in objects.items() for item in items] for objects in found]
        named = self.detector.name_colors(list(images), rows)
        colors = set(getattr(self.detector, "colors", ()) or COLORS)
        for number, (row, given) in enumerate(zip(rows, named, strict=True)):
            self.require(
                len(given) == len(row), "name_colors", f"image {number}: {len(given)} colors for {len(row)} objects"
            )
            for color in given:
                self.require(color in colors, "name_colors", f"image {number}: '{color}' is none that it names")
