"""The shapes detector against the library's own way, on exact images and after the visual tokenizer's round trip.

    python benchmarks/shapes_detector.py [--scenes 1000] [--seed 0]

The peer is scikit-image's `match_template`: every shape slid over every color's map of each image, peaks kept that
no better one overlaps. An image is right when shapes, colors and places are exactly the scene's. Both are timed on
the same images in one run, and read them through the same color map. The last line is one JSON object: ours and
peer are images a second, ratio is ours / peer.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, in a folder whose files bear our packages' names
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json
import time
from collections.abc import Callable, Sequence

import numpy as np
from skimage.feature import match_template, peak_local_max

from tasks.shapes.detector import color_map, detect
from tasks.shapes.render import MASKS, render
from tasks.shapes.world import COLORS, OBJECT, PLACES, Scene, place_of, sample_scene
from underdrawing.options import LARGEST_SEED, Whole

Read = list[tuple[str, str, str]]  # (shape, color, place), sorted
SURE = 0.9  # the score that counting asks for: the stricter of GenEval's two thresholds
FAINT = 0.3


def truth(scene: Scene) -> Read:
    return sorted((item.shape, item.color, PLACES[item.place]) for item in scene.objects)


def ours(image: np.ndarray, threshold: float = FAINT) -> Read:
    return sorted((d.cls, str(d.color), PLACES[place_of(d.box)]) for d in detect(image) if d.score > threshold)


def peer(image: np.ndarray) -> Read:
    """Normalised cross-correlation of every shape with every color present, best peaks first, overlaps dropped."""
    colors = color_map(image)
    peaks: list[tuple[float, str, str, int, int]] = []
    for index, color in enumerate(COLORS, 1):
        field = (colors == index).astype(np.float32)
        if not field.any():
            continue
        for shape, mask in MASKS.items():
            template = np.pad(mask, 1).astype(np.float32)  # with its rim, or every square holds a perfect circle
            score = match_template(np.pad(field, 1), template)
            for y, x in peak_local_max(score, min_distance=2, threshold_abs=0.7, exclude_border=False):
                peaks.append((float(score[y, x]), shape, color, int(x), int(y)))
    kept: list[tuple[float, str, str, int, int]] = []
    for peak in sorted(peaks, reverse=True):
        if all(max(abs(peak[3] - other[3]), abs(peak[4] - other[4])) >= OBJECT for other in kept):
            kept.append(peak)
    return sorted((shape, color, PLACES[place_of((x, y, x + OBJECT, y + OBJECT))]) for _, shape, color, x, y in kept)


def measure(
    read: Callable[[np.ndarray], Read], images: Sequence[np.ndarray], scenes: Sequence[Scene]
) -> tuple[float, float]:
    """(share read right, images a second)."""
    start = time.perf_counter()
    found = [read(image) for image in images]
    seconds = time.perf_counter() - start
    return float(np.mean([a == truth(b) for a, b in zip(found, scenes, strict=True)])), len(images) / seconds


def round_trip(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    from policy.chameleon.vq import load_shapes_vq  # torch is needed only here

    tokenizer = load_shapes_vq()
    chunks = [images[start : start + 64] for start in range(0, len(images), 64)]
    return [image for chunk in chunks for image in tokenizer.decode_images(tokenizer.encode_images(chunk))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Whole(1), default=1000)
    parser.add_argument("--seed", type=Whole(0, LARGEST_SEED), default=0)
    given = parser.parse_args()
    rng = np.random.default_rng(given.seed)
    scenes = [sample_scene(rng, 1 + index % 4) for index in range(given.scenes)]
    rendered = [render(scene) for scene in scenes]
    again = round_trip(rendered)
    detect(rendered[0])  # tables are made on the first call
    exact, speed = measure(ours, rendered, scenes)
    tripped, _ = measure(ours, again, scenes)
    sure, _ = measure(lambda image: ours(image, SURE), again, scenes)
    peer_exact, peer_speed = measure(peer, rendered, scenes)
    peer_tripped, _ = measure(peer, again, scenes)
    print(f"{given.scenes} scenes of 1 to 4 objects, seed {given.seed}")
    print(f"{'':34}{'ours':>10}{'match_template':>16}")
    print(f"{'rendered, read right':34}{exact:10.4f}{peer_exact:16.4f}")
    print(f"{'after the tokenizer, read right':34}{tripped:10.4f}{peer_tripped:16.4f}")
    print(f"{f'after the tokenizer, score > {SURE}':34}{sure:10.4f}{'-':>16}")
    print(f"{'images a second':34}{speed:10.0f}{peer_speed:16.0f}")
    print(
        json.dumps(
            {
                "ours": round(speed, 1),
                "peer": round(peer_speed, 1),
                "ratio": round(speed / peer_speed, 2),
                "unit": "images/s",
                "rendered": exact,
                "round_trip": tripped,
                "round_trip_sure": sure,
                "peer_rendered": peer_exact,
                "peer_round_trip": peer_tripped,
            }
        )
    )


if __name__ == "__main__":
    main()
