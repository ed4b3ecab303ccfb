"""A reward tried on images or thoughts, as one page: how each part spreads, and every image with what the detector
sees in it. underdrawing/trial.py judges; this draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record.trajectory import Trajectory
from rewards.contract import policy_images
from rewards.detectors.base import Detections
from tasks.images import data_url
from underdrawing.report.charts import PALETTE
from underdrawing.report.page import Film, Frame, Seen, SeenBox, film_of, from_template, write_page

BINS = 14


@dataclass(frozen=True)
class PartRow:
    """One reward part over everything that was judged; numbers are None where nothing was."""

    name: str
    kind: str  # "watched", "by segment", "not paid"; nothing where the formula pays it
    what: str  # its formula, or where it comes from
    mean: float | None
    std: float | None
    least: float | None
    most: float | None
    none: float  # share that was not judged, failures included
    failed: float
    histogram: str = ""
    total: bool = False


@dataclass(frozen=True)
class TrialPage:
    title: str
    subtitle: str
    formula: str
    rows: Sequence[PartRow]
    by_tag: Sequence[tuple[str, int, Sequence[float | None]]]  # tag, how many, mean of each row
    unit: str  # "thoughts" or "images"
    heading: str
    films: Sequence[Film]
    notes: Sequence[str] = ()
    side: int = 150  # px of an image


def write_trial(page: TrialPage, path: Path) -> Path:
    """One self-contained file, written whole or not at all."""
    return write_page(from_template("trial.html.j2", data=page), path)


def row_of(
    name: str,
    values: Sequence[float | None],
    *,
    kind: str = "",
    what: str = "",
    failed: float = 0.0,
    total: bool = False,
) -> PartRow:
    judged = [value for value in values if value is not None]
    none = 1 - len(judged) / len(values) if values else 0.0
    if not judged:
        return PartRow(name, kind, what, None, None, None, None, none, failed, total=total)
    mean = math.fsum(judged) / len(judged)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in judged) / len(judged))
    return PartRow(name, kind, what, mean, std, min(judged), max(judged), none, failed, histogram(judged), total)


def histogram(values: Sequence[float]) -> str:
    """An SVG of how many values fall into each of BINS equal stretches between the least and the most."""
    low, high = min(values), max(values)
    counts = [0] * BINS
    for value in values:
        counts[min(int((value - low) / (high - low) * BINS), BINS - 1) if high > low else BINS // 2] += 1
    width, most = 140 / BINS, max(counts)
    bars = "".join(
        f'<rect x="{n * width + 0.5:.1f}" y="{29 - 28 * count / most:.1f}" width="{width - 1:.1f}" '
        f'height="{28 * count / most:.1f}" rx="1"/>'
        for n, count in enumerate(counts)
        if count
    )
    return f'<svg viewBox="0 0 140 30" role="img"><title>{low:.3g} to {high:.3g}</title>{bars}</svg>'


def seen_of(image: Any, objects: Detections, correct: bool | None, reason: str) -> Seen:
    """Boxes of the objects, most certain first, a color for each class."""
    height, width = image.shape[:2]
    colors = {name: PALETTE[at % len(PALETTE)] for at, name in enumerate(objects)}
    found = sorted(((name, item) for name, items in objects.items() for item in items), key=lambda pair: -pair[1].score)
    boxes = []
    for name, item in found:
        x0, y0, x1, y1 = (max(0.0, float(v)) for v in item.box)
        x0, x1, y0, y1 = min(x0, width), min(x1, width), min(y0, height), min(y1, height)
        label = f"{item.color} {name}" if item.color else name
        boxes.append(
            SeenBox(
                label,
                float(item.score),
                colors[name],
                round(100 * x0 / width, 2),
                round(100 * y0 / height, 2),
                round(100 * (x1 - x0) / width, 2),
                round(100 * (y1 - y0) / height, 2),
            )
        )
    return Seen(boxes, correct, reason)


def thought_films(trajectories: Sequence[Trajectory], seen: Mapping[int, Mapping[int, Seen]]) -> list[Film]:
    """A filmstrip a thought. `seen` is by id() of the trajectory, then by segment."""
    return [film_of(trajectory, seen.get(id(trajectory))) for trajectory in trajectories]


def image_films(
    trajectories: Sequence[Trajectory], seen: Mapping[int, Mapping[int, Seen]], names: Mapping[int, str]
) -> list[Film]:
    """A strip a prompt, its images side by side with their own rewards."""
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.group, []).append(trajectory)
    films = []
    for members in groups.values():
        frames = []
        for trajectory in members:
            index, image = policy_images(trajectory)[0]
            parts = [*trajectory.rewards.items(), ("reward", trajectory.reward)]
            frames.append(
                Frame(
                    names[id(trajectory)],
                    "policy",
                    [],
                    data_url(image),
                    None,
                    "",
                    0,
                    seen.get(id(trajectory), {}).get(index),
                    parts,
                )
            )
        rewards = [t.reward for t in members if t.reward is not None]
        mean = math.fsum(rewards) / len(rewards) if rewards else None
        tag = str(members[0].record.get("tag", "")).replace("_", " ")
        films.append(Film(members[0].prompt, tag, "end", None, False, [("mean reward", mean)], frames))
    return films
