"""Trains the detector `digits_learned`: `python -m experiments.train_digits_detector --out FILE`.

A network of one hidden layer (scikit-learn's MLPClassifier) over 8 x 8 px around a blob of ink. It sees the scans that
are kept for it as they stand in images, cut out by the detector's own eyes, some paler and some fatter. It is never
shown what is no digit: so are such classifiers usually made, and that is what a policy can find out about one.

Prints, and writes into the file's head, how often it names a held-out scan right and how sure it is, there, on the same
scans after the visual tokenizer's round trip, and on quarters of different digits put together, which are none.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, in a folder whose files bear our packages' names
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import os
import warnings
from collections.abc import Sequence

import numpy as np
from safetensors.numpy import save_file

from policy.chameleon.vq import DIGITS_WEIGHTS, ChameleonVQ, load_vq
from rewards.detectors.digits import DigitsLearned, features
from runtime.errors import UserError
from tasks.digits.detector import detect
from tasks.digits.scans import DIGITS, OBJECT, Use, enlarged, used_for
from tasks.digits.seeing import blobs
from tasks.digits.world import COLORS, Digit, paint, render
from tasks.shapes.world import CANVAS, GROUND, Scene
from underdrawing.options import LARGEST_SEED, Parser, Whole, expanded_path

CENTRE = 4  # the place in the middle of the canvas
SURE = 0.9  # the score from which GenEval counts an object


def alone(use: Use, every: int = 1) -> tuple[list[np.ndarray], np.ndarray]:
    """Each scan of a use by itself in the middle, or one in `every` of a digit's: uint8 [32, 32, 3] images, and their
    digits, int64."""
    items = [Digit(name, "blue", CENTRE, scan=scan) for name in DIGITS for scan in used_for(use, name)[::every]]
    return [render(Scene((item,))) for item in items], np.array([int(item.shape) for item in items])


def varied(use: Use, rng: np.random.Generator, times: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, 64] and digits [N]: each scan of a use `times` times, somewhere near the middle, its ink scaled."""
    rows, digits = [], []
    for name in DIGITS:
        for scan in used_for(use, name):
            for _ in range(times):
                ground = np.full((CANVAS, CANVAS, 3), GROUND, np.float32)
                x, y = 9 + rng.integers(-1, 2, 2)
                ink = np.clip(enlarged()[scan] * rng.uniform(0.75, 1.3), 0, 1)
                paint(ground[y : y + OBJECT, x : x + OBJECT], ink, tuple(COLORS)[rng.integers(len(COLORS))])
                for blob in blobs(ground.round().astype(np.uint8))[:1]:
                    rows.append(features(blob))
                    digits.append(int(name))
    return np.stack(rows), np.array(digits)


def patched(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Images with the quarters of four scans of four different digits in the middle: mostly no digit at all."""
    made = []
    half = OBJECT // 2
    for _ in range(count):
        names = rng.choice(DIGITS, 4, replace=False)
        ink = np.zeros((OBJECT, OBJECT), np.float32)
        for quarter, name in enumerate(names):
            scans = used_for("heldout", str(name))
            rows, columns = (slice(half * part, half * (part + 1)) for part in divmod(quarter, 2))
            ink[rows, columns] = enlarged()[scans[rng.integers(len(scans))]][rows, columns]
        ground = np.full((CANVAS, CANVAS, 3), GROUND, np.float32)
        paint(ground[9 : 9 + OBJECT, 9 : 9 + OBJECT], ink, "blue")
        made.append(ground.round().astype(np.uint8))
    return made


def train(rng: np.random.Generator, seed: int, hidden: int = 24, times: int = 4) -> dict[str, np.ndarray]:
    """The network's weights, float32, by the names that the detector reads."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    network = MLPClassifier((hidden,), alpha=1e-4, batch_size=64, max_iter=150, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # so many passes are what is meant
        network.fit(*varied("learned", rng, times))
    (w1, w2), (b1, b2) = network.coefs_, network.intercepts_
    return {name: value.astype(np.float32) for name, value in {"w1": w1, "b1": b1, "w2": w2, "b2": b2}.items()}


def figures(detector: DigitsLearned, vq: ChameleonVQ | None, rng: np.random.Generator) -> dict[str, float]:
    """What the head of this file says, and the same of the exact detector beside it; shares of 0 to 1."""
    found: dict[str, float] = {}
    images, digits = alone("heldout")
    sets = {"heldout": (images, digits)}
    if vq is not None:
        some = rng.choice(len(images), 200, replace=False)
        redrawn = vq.decode_images(vq.encode_images([images[i] for i in some]))
        sets["heldout_redrawn"] = (redrawn, digits[some])
        images, digits = alone("drawn")
        sets["drawn_redrawn"] = (vq.decode_images(vq.encode_images(images)), digits)
    for name, (shown, wanted) in sets.items():
        sample = range(len(shown)) if name != "heldout" else range(0, len(shown), 5)
        best = [_best(detector, shown[i]) for i in range(len(shown))]
        found[f"{name}/learned_right"] = _share(
            [b is not None and b[0] == w for b, w in zip(best, wanted, strict=True)]
        )
        found[f"{name}/learned_sure"] = _share([b is not None and b[1] > SURE for b in best])
        exact = [next(iter(detect(shown[i])), None) for i in sample]
        right = [one is not None and int(one.cls) == wanted[i] for one, i in zip(exact, sample, strict=True)]
        found[f"{name}/exact_right"] = _share(right)
    nothing = patched(200, rng)
    found["patched/learned_sure"] = _share([(b := _best(detector, one)) is not None and b[1] > SURE for one in nothing])
    found["patched/exact_sure"] = _share([any(one.score > SURE for one in detect(image)) for image in nothing])
    return found


def _best(detector: DigitsLearned, image: np.ndarray) -> tuple[int, float] | None:
    """The digit that the detector is surest of, and its score."""
    (objects,) = detector.detect([image])
    seen = [(item.score, int(name)) for name, items in objects.items() for item in items]
    return None if not seen else (max(seen)[1], max(seen)[0])


def _share(values: Sequence[bool]) -> float:
    return float(np.mean(values))


def write(weights: dict[str, np.ndarray], path: Path, head: dict[str, float]) -> None:
    """The file whole or not at all; `head` stands in it as texts."""
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, partial, {name: f"{value:.3f}" for name, value in head.items()})
    os.replace(partial, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description="Train the detector digits_learned.")
    parser.add_argument("--out", type=expanded_path, required=True, help="weights file to write (.safetensors)")
    parser.add_argument("--seed", type=Whole(0, LARGEST_SEED), default=0)
    parser.add_argument(
        "--vq", type=expanded_path, default=DIGITS_WEIGHTS, help="visual tokenizer of the redrawn scans"
    )
    given = parser.parse_args(arguments)
    try:
        rng = np.random.default_rng(given.seed)
        vq = load_vq(given.vq)
        weights = train(rng, given.seed)
        write(weights, given.out, {})
        head = figures(DigitsLearned(given.out), vq, rng)
        write(weights, given.out, head)
    except UserError as error:
        parser.error(str(error))
    for name, value in head.items():
        print(f"{name} {value:.3f}")


if __name__ == "__main__":
    main()
