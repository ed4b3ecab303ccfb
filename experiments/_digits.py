"""The digits world's visual tokenizer in figures, and the images that it is trained on: what train_vq.py asks for.

A scan need not come back exactly. What counts is whether it is still read as what it was, and by whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from policy.chameleon.vq import ChameleonVQ
from rewards.detectors.base import Detection, Detections
from rewards.detectors.digits import WEIGHTS, DigitsLearned
from rewards.functions.geneval import SCORE_THRESHOLD
from tasks.digits.detector import detect
from tasks.digits.scans import DIGITS, OBJECT, Use, enlarged
from tasks.digits.world import COLORS, MAX_OBJECTS, digit, paint, render, sample_scene
from tasks.shapes.world import CANVAS, GROUND, Scene


def sample(rng: np.random.Generator) -> Scene:
    """1 to 4 digits that demonstrations may draw, full images more often: a blank patch is soon learned."""
    return sample_scene(rng, int(rng.choice(MAX_OBJECTS, p=[0.1, 0.2, 0.3, 0.4])) + 1)


def stray(rng: np.random.Generator) -> np.ndarray:
    """An image outside the world's rules: digits at any pixel, over one another, cut by the edge."""
    padded = np.empty((CANVAS + 2 * OBJECT, CANVAS + 2 * OBJECT, 3), np.float32)
    padded[:] = GROUND
    for _ in range(rng.integers(1, MAX_OBJECTS + 2)):
        x, y = rng.integers(0, CANVAS + OBJECT, 2)
        one = digit(rng, DIGITS[rng.integers(len(DIGITS))], tuple(COLORS)[rng.integers(len(COLORS))], 0)
        paint(padded[y : y + OBJECT, x : x + OBJECT], enlarged()[one.scan], one.color)
    return padded[OBJECT:-OBJECT, OBJECT:-OBJECT].round().astype(np.uint8)


def peak_signal_to_noise(made: Sequence[np.ndarray], images: Sequence[np.ndarray]) -> float:
    """10 log10(255^2 / mean squared error), in decibels, over all pixels of all images; inf where they are equal."""
    error = np.mean([np.square(a.astype(float) - b).mean() for a, b in zip(made, images, strict=True)])
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def read_right(found: Sequence[Detection], wanted: Scene) -> bool:
    """Whether a detector sees the scene's digits, in their colors and within 3 px, and no other, as GenEval sees."""
    left = [one for one in found if one.score > SCORE_THRESHOLD]
    for item in wanted.objects:
        near = [
            one
            for one in left
            if (one.cls, one.color) == (item.shape, item.color) and np.abs(np.subtract(one.box, item.box)).max() <= 3
        ]
        if not near:
            return False
        left.remove(near[0])
    return not left


def figures(vq: ChameleonVQ, count: int, rng: np.random.Generator) -> dict[str, float]:
    """The round trip of `count` scenes of 1 to 4 scans, once of those that demonstrations draw, which it was trained
    on, and once of held-out ones: dB of signal to noise, the share of scenes that each detector reads right as they
    are and as they come back, and the share of codes in use. The learned detector is left out while it has no weights.
    """
    found: dict[str, float] = {}
    uses: tuple[Use, ...] = ("drawn", "heldout")
    learned = DigitsLearned() if WEIGHTS.is_file() else None
    for use in uses:
        scenes = [sample_scene(rng, int(rng.integers(1, MAX_OBJECTS + 1)), use) for _ in range(count)]
        images = [render(one) for one in scenes]
        codes_BN = vq.encode_images(images)
        made = vq.decode_images(codes_BN)
        found[f"{use}/psnr"] = peak_signal_to_noise(made, images)
        for name, shown in (("as drawn", images), ("redrawn", made)):
            right = [read_right(detect(image), one) for image, one in zip(shown, scenes, strict=True)]
            found[f"{use}/exact/{name}"] = float(np.mean(right))
            if learned is not None:
                seen = [_flat(objects) for objects in learned.detect(shown)]
                found[f"{use}/learned/{name}"] = float(np.mean(list(map(read_right, seen, scenes))))
        found[f"{use}/codes_used"] = len(codes_BN.unique()) / vq.config.num_embeddings
    return found


def _flat(objects: Detections) -> list[Detection]:
    return [replace(item, cls=name) for name, items in objects.items() for item in items]
