"""How long one core takes to judge a step of the shapes world: 128 thoughts, 384 images, all of the toolkit's parts.

    python -m benchmarks.judging [--groups 16] [--members 8]

The images are what a policy draws after its warm start, blurred by noise, so that hardly two are equal and every one
must be looked at. Prints the median of five judgements and where the time goes.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, in a folder whose files bear our packages' names
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json
import statistics
import time

import numpy as np

from formats.registry import get_format
from record.trajectory import Author, Modality, Segment, Trajectory
from rewards.config import RewardsConfig
from rewards.manager import RewardManager
from tasks.registry import get_task
from underdrawing.options import Whole

PARTS = {
    "result": "geneval",
    "critique": "critique_consistency",
    "better": "improvement",
    "steps": "steps",
    "form": "format",
}
TOTAL = "result * (1 + 0.5 * coalesce(critique, 0)) + 0.2 * better + 0.1 * steps + 0.1 * form"


def trajectories(groups: int, members: int, images: int = 3) -> list[list[Trajectory]]:
    """Demonstrations with noisy images, each thought with exactly so many of them."""
    task, rng = get_task("shapes"), np.random.default_rng(0)
    demos = [
        d
        for d in task.demonstrations("strokes", 40 * groups * members, 0)
        if sum(p.image is not None for p in d.parts) == images
    ][: groups * members]
    made = []
    for index, demo in enumerate(demos):
        segments = []
        for part in demo.parts:
            image, ids = part.image, np.zeros(18, np.int32)
            if image is not None:
                noise = rng.normal(0, 12, image.shape)
                image = np.clip(image + noise, 0, 255).astype(np.uint8)
            modality = Modality.TEXT if image is None else Modality.IMAGE_TOKENS
            segments.append(Segment(part.role, Author.POLICY, modality, True, ids, part.text, image=image))
        made.append(Trajectory(demo.prompt, demo.record, "strokes", segments, index // members, index % members))
    return [made[i : i + members] for i in range(0, len(made), members)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=Whole(1), default=16)
    parser.add_argument("--members", type=Whole(1), default=8)
    arguments = parser.parse_args()
    groups = trajectories(arguments.groups, arguments.members)
    config = RewardsConfig.model_validate({"parts": {n: {"function": f} for n, f in PARTS.items()}, "total": TOTAL})
    seconds, report = [], None
    with RewardManager(config, get_task("shapes"), get_format("strokes")) as manager:
        for _ in range(5):
            started = time.process_time()
            report = manager.score(groups)
            seconds.append(time.process_time() - started)
    assert report is not None
    rows = sum(len(group) for group in groups)
    images = sum(len(t.images()) for group in groups for t in group)
    print(
        json.dumps(
            {
                "trajectories": rows,
                "images": images,
                "seconds": round(statistics.median(seconds), 3),
                **{name: round(value, 3) for name, value in report.metrics.items() if name.startswith("time/")},
                "reward_mean": round(report.metrics["reward/mean"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
