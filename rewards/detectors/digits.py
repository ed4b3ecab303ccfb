"""The digits world's two detectors: `digits_exact`, the truth, and `digits_learned`, a small classifier that errs.

Both find the same blobs of ink (tasks/digits/seeing.py) and name their colors alike; they differ in what they take a
blob for. The exact one compares it with every scan, and what is like none is nothing. The learned one is what a
reward model is: a network trained on a few hundred scans, which has ten answers and none for "no digit", so a policy
that is paid by it can find blobs that it is sure of and nobody else would read. Watch the exact one beside it:

    rewards:
      detector: digits_learned
      parts:
        detect: {function: geneval}
        truth: {function: geneval, options: {detector: digits_exact}, log_only: true}

experiments/train_digits_detector.py makes the weights and measures them.

Letters: N blobs, H hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from rewards.detectors.base import Detection, Detections
from rewards.detectors.shapes import TaskDetector
from runtime.errors import UserError
from tasks.digits.scans import DIGITS
from tasks.digits.seeing import Blob, blobs, window
from tasks.digits.world import COLORS

WEIGHTS = Path(__file__).with_name("digits_learned.safetensors")
TRAIN = "python -m experiments.train_digits_detector --out"
SIDE = 8  # px of what the network sees: a window of twice the side, each 2 x 2 px averaged
SHAPES = {"w1": (SIDE * SIDE, None), "b1": (None,), "w2": (None, len(DIGITS)), "b2": (len(DIGITS),)}  # None: H


def features(blob: Blob) -> np.ndarray:
    """What the network sees of a blob: float32 [64] in [0, 1], its ink around the centre of its box."""
    wide = window(blob.ink, blob.box, 2 * SIDE)
    return wide.reshape(SIDE, 2, SIDE, 2).mean((1, 3)).ravel()


class DigitsLearned:
    """A Detector whose scores are a network's largest probability among the ten digits.

    Raises:
        UserError: weights that are not there, or are those of another network; the sentence says what makes them.
    """

    classes = DIGITS
    colors = tuple(COLORS)

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else WEIGHTS
        if not self.path.is_file():
            raise UserError(f"digits_learned: {self.path}: no weights; make them with `{TRAIN} {self.path}`")
        try:
            with safe_open(self.path, "numpy") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"digits_learned: {self.path}: cannot be read as safetensors ({error}); make it anew with "
                f"`{TRAIN} {self.path}`"
            ) from None
        self._check(found)
        self._layers = [(found["w1"], found["b1"]), (found["w2"], found["b2"])]

    def _check(self, found: dict[str, np.ndarray]) -> None:
        hidden = found["b1"].shape[0] if "b1" in found and found["b1"].ndim == 1 else 0
        for name, shape in SHAPES.items():
            wanted = tuple(hidden if side is None else side for side in shape)
            if name not in found or found[name].shape != wanted or not np.isfinite(found[name]).all():
                has = list(found[name].shape) if name in found else "nothing"
                raise UserError(
                    f"digits_learned: {self.path}: '{name}' is {has}, and the network's is finite {list(wanted)}; make "
                    f"it anew with `{TRAIN} {self.path}`"
                )

    def probabilities(self, features_ND: np.ndarray) -> np.ndarray:
        """float64 [N, 10]: how sure the network is of each digit."""
        (w1, b1), (w2, b2) = self._layers
        # in double precision, so that a blob is seen alike alone and among others
        hidden_NH = np.maximum(features_ND.astype(np.float64) @ w1.astype(np.float64) + b1, 0)
        logits = hidden_NH @ w2.astype(np.float64) + b2
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """uint8 [32, 32, 3] each; every blob of ink is some digit. Raises ImageError for another type or size."""
        found = []
        for image in images:
            objects: Detections = {}
            seen = blobs(image)
            if seen:
                chances = self.probabilities(np.stack([features(blob) for blob in seen]))
                for blob, chance in zip(seen, chances, strict=True):
                    x0, y0, x1, y1 = map(float, blob.box)
                    one = Detection((x0, y0, x1, y1), float(chance.max()), blob.color, blob.mask)
                    objects.setdefault(DIGITS[int(chance.argmax())], []).append(one)
            found.append({name: sorted(items, key=lambda one: -one.score) for name, items in objects.items()})
        return found


def digits_exact() -> TaskDetector:
    """The digits world's own detector, as `shapes_detector` is the shapes': the scans themselves."""
    from tasks.registry import get_task

    return TaskDetector(get_task("digits"))
