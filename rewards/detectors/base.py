"""What sees an image for the rewards: objects by class, best score first. geneval.py judges what it returns.

Any object with `classes` and `detect` is a detector; shapes.py, mask2former.py, grounding_dino.py and owlv2.py are the
toolkit's own. Four members are optional and found by name:

    open_vocabulary = True          it sees whatever phrase it is asked for: `detect_phrases(images, phrases)`
    name_colors(images, objects)  colors are named afterwards, and only of the objects that somebody asks about
    colors = ("red", "grey")        every color that it names; without it GenEval's ten
    sizes = ("small", "large")      every size that it tells; without it none
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from runtime.errors import UserError, nearest
from tasks.base import Detection

# GenEval's ten colors, in its order.
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


class UnknownClass(UserError):
    """A prompt asks for a class that the detector cannot see."""


Detections = dict[str, list[Detection]]


class Detector(Protocol):
    """Any object with these two members serves."""

    @property
    def classes(self) -> Sequence[str]:
        """Every class it can see; empty where it has an open vocabulary."""
        ...

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """uint8 [height, width, 3] each. Classes that were not seen may be left out."""
        ...


class CachedDetector:
    """Looks at each distinct image once until it is cleared, however many rewards ask about it."""

    def __init__(self, detector: Detector) -> None:
        self.detector: Any = detector
        self.classes = tuple(detector.classes)
        self.open_vocabulary = bool(getattr(detector, "open_vocabulary", False))
        self.names_colors = hasattr(detector, "name_colors")
        self.colors = tuple(getattr(detector, "colors", ()))  # empty: GenEval's
        self.sizes = tuple(getattr(detector, "sizes", ()))
        self.looks = 0  # images that went through the detector
        self._seen: dict[Any, Detections] = {}
        self._colors: dict[Any, str] = {}  # by image, class and place in its list

    def detect(
        self,
        images: Sequence[np.ndarray],
        phrases: Sequence[Sequence[str]] | None = None,
        colored: Sequence[Mapping[str, int]] | None = None,
    ) -> list[Detections]:
        """Objects in each image.

        Args:
            phrases: by image, what is asked about; a detector with an open vocabulary looks for these, any other
                looks for all its classes.
            colored: by image, of which classes how many objects (the best ones) are asked about by color. None: all
                of them. Makes no difference to a detector that sees colors while it looks.

        Raises:
            UserError: a detector with an open vocabulary is not told what to look for.
        """
        asked: list[tuple[str, ...]] = [()] * len(images)
        if self.open_vocabulary:
            if phrases is None:
                raise UserError("a detector with an open vocabulary must be told which phrases to look for")
            asked = [tuple(sorted(set(some))) for some in phrases]
        keys = [(_key(image), some) for image, some in zip(images, asked, strict=True)]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._seen}
        if new:
            looked = list(new.values())
            found = (
                self.detector.detect_phrases(looked, [some for _, some in new])
                if self.open_vocabulary
                else self.detector.detect(looked)
            )
            self._seen.update(zip(new, found, strict=True))
            self.looks += len(new)
        objects = [self._seen[key] for key in keys]
        return self._with_colors(keys, images, objects, colored) if self.names_colors else objects

    def _with_colors(
        self,
        keys: Sequence[Any],
        images: Sequence[np.ndarray],
        found: Sequence[Detections],
        colored: Sequence[Mapping[str, int]] | None,
    ) -> list[Detections]:
        """The same detections, colored as far as asked; each object's color is named once."""
        chosen = [best_of(objects, colored[i] if colored is not None else None) for i, objects in enumerate(found)]
        todo = {
            (key, name, at): (index, name, found[index][name][at])
            for index, key in enumerate(keys)
            for name, positions in chosen[index].items()
            for at in positions
            if (key, name, at) not in self._colors
        }
        if todo:
            indices = sorted({index for index, _, _ in todo.values()})
            rows = [[(name, item) for at, name, item in todo.values() if at == index] for index in indices]
            order = [key for index in indices for key, (at, _, _) in todo.items() if at == index]
            named = self.detector.name_colors([images[index] for index in indices], rows)
            self._colors.update(zip(order, (color for row in named for color in row), strict=True))
        return [
            {
                name: [
                    replace(item, color=self._colors.get((key, name, at))) if at in positions.get(name, ()) else item
                    for at, item in enumerate(items)
                ]
                for name, items in objects.items()
            }
            for key, objects, positions in zip(keys, found, chosen, strict=True)
        ]

    def clear(self) -> None:
        self._seen.clear()
        self._colors.clear()

    def require(self, classes: Sequence[str], where: str) -> None:
        """Raises UnknownClass for the first class that the detector cannot see."""
        if self.open_vocabulary:
            return
        for name in classes:
            if name not in self.classes:
                raise UnknownClass(
                    f"{where} asks for '{name}', which the detector cannot see; {nearest(name, self.classes)}"
                )

    def require_colors(self, where: str) -> None:
        """Make sure that colors can be named: loads what names them. Raises UserError where nothing does.

        A detector that says nothing about colors is taken to see them while it looks, as the embedded worlds' do.
        """
        if getattr(self.detector, "sees_colors", True) is False:
            raise UserError(f"{where} asks for a color, and the detector names none; give rewards.detector.colors")
        prepare = getattr(self.detector, "require_colors", None)
        if prepare is not None:
            prepare(where)


def best_of(objects: Detections, counts: Mapping[str, int] | None) -> dict[str, list[int]]:
    """By class, the places of the `count` best-scored objects; all of every class without counts."""
    if counts is None:
        return {name: list(range(len(items))) for name, items in objects.items()}
    return {
        name: sorted(range(len(objects[name])), key=lambda at: -objects[name][at].score)[:count]
        for name, count in counts.items()
        if name in objects
    }


def _key(image: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return image.shape, hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
