"""How much two boxes, two stretches of time, or a ranking and its relevant items agree; and the rewards that say so.

The measures are plain functions on numbers, for the published rewards too. `box_iou_reward` and `temporal_iou_reward`
read what the policy answered, in the coordinate frame that the recipe states, and never repair it: corners in the wrong
order, or an end before its start, enclose nothing and earn 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from record.trajectory import Author, Trajectory
from rewards.contract import RewardError, policy_text
from rewards.functions.text import blocks
from runtime.errors import UserError

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 with x0 < x1 and y0 < y1
Span = tuple[float, float]  # start, end with start < end
Frame = Literal["pixels", "unit", "thousand"]
TimeFrame = Literal["seconds", "unit", "frames"]
Form = Literal["corners", "corner_size", "center_size"]
FRAMES, TIME_FRAMES, FORMS = (
    ("pixels", "unit", "thousand"),
    ("seconds", "unit", "frames"),
    ("corners", "corner_size", "center_size"),
)

_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_COMMA = r"\s*,\s*"
# [x0, y0, x1, y1] or (x0, y0), (x1, y1), as grounding models write them
_BOX = re.compile(
    rf"[\[(]\s*({_NUMBER}){_COMMA}({_NUMBER})\s*(?:\)?\s*,\s*\(?|\)\s*\()\s*({_NUMBER}){_COMMA}"
    rf"({_NUMBER})\s*[\])]"
)
_TIME = r"(?:\d+:)?\d+:\d+(?:\.\d+)?|\d+(?:\.\d+)?"
_UNIT = r"(?:\s*(?:seconds|second|secs|sec|s))?"
_SPAN = re.compile(rf"(?<![\d.:])({_TIME}){_UNIT}\s*(?:-|–|—|~|,|to|and|until)\s*({_TIME})(?![\d:])")


# ---- measures ------------------------------------------------------------------------------------------------------


def area(box: Sequence[float]) -> float:
    """Width times height; 0 for a box whose corners are in the wrong order."""
    x0, y0, x1, y1 = box
    return (x1 - x0) * (y1 - y0) if x1 > x0 and y1 > y0 else 0.0


def box_iou(box: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1), in [0, 1]; 0 where either encloses nothing."""
    common = area((max(box[0], other[0]), max(box[1], other[1]), min(box[2], other[2]), min(box[3], other[3])))
    sizes = area(box), area(other)
    if min(sizes) <= 0 or not math.isfinite(sum(sizes)):
        return 0.0
    return min(1.0, common / (sizes[0] + sizes[1] - common))


def matched_iou(
    boxes: Sequence[Sequence[float]], gold: Sequence[Sequence[float]], threshold: float | None = None
) -> float:
    """The best one-to-one matching's IoU, summed, over the larger number of boxes: a superfluous box costs what a
    missing one does. With a threshold a pair counts 1 from there on and 0 below. 1 where both are empty."""
    if not boxes or not gold:
        return float(not boxes and not gold)
    overlap = np.array([[box_iou(box, other) for other in gold] for box in boxes])
    if threshold is not None:
        overlap = (overlap >= threshold).astype(float)
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    return float(overlap[rows, columns].sum()) / max(len(boxes), len(gold))


def temporal_iou(spans: Sequence[Sequence[float]], gold: Sequence[Sequence[float]]) -> float:
    """Seconds in both sets of spans over seconds in either, in [0, 1]; overlapping spans of one set count once, and a
    span that ends before it starts counts nothing."""
    first, second = _merged(spans), _merged(gold)
    common = math.fsum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in first for b in second)
    either = math.fsum(end - start for start, end in _merged([*first, *second]))
    return min(1.0, common / either) if either > 0 else 0.0


def _merged(spans: Sequence[Sequence[float]]) -> list[Span]:
    """The same stretches of time, in order, none touching another."""
    merged: list[Span] = []
    for start, end in sorted((float(s), float(e)) for s, e in spans if e > s):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def ndcg(ranked: Sequence[Hashable], relevant: Sequence[Hashable], repeats: bool = False) -> float:
    """Normalised discounted cumulative gain with binary relevance: sum over hits of 1 / log2(rank + 1), rank from 1,
    over the same for all relevant items ranked first. 0 where nothing is relevant.

    An item that stands twice in the ranking is found once and its further places are taken up for nothing, so the
    result is at most 1. `repeats` counts each appearance, as VRAG-RL's release does: then it can exceed 1.

    Source: Järvelin and Kekäläinen, ACM TOIS 20(4), 2002.
    """
    wanted = set(relevant)
    if not wanted:
        return 0.0
    gain, found = 0.0, set()
    for rank, item in enumerate(ranked, 1):
        if item in wanted and (repeats or item not in found):
            gain += 1 / math.log2(rank + 1)
            found.add(item)
    ideal = math.fsum(1 / math.log2(rank + 1) for rank in range(1, len(relevant if repeats else wanted) + 1))
    return gain / ideal


# ---- reading -------------------------------------------------------------------------------------------------------


def boxes_in(text: str) -> list[Box]:
    """Every [a, b, c, d] or (a, b), (c, d) of four numbers, in order."""
    return [tuple(float(number) for number in found) for found in _BOX.findall(text)]  # type: ignore[misc]


def spans_in(text: str) -> list[Span]:
    """Every pair of times: "12.5 to 30", "12.5s - 30s", "[12.5, 30]", "1:02 - 1:30.5", in seconds."""
    return [(seconds(start), seconds(end)) for start, end in _SPAN.findall(text)]


def seconds(time: str) -> float:
    """ "75.5", "1:15.5" or "0:01:15.5" in seconds."""
    total = 0.0
    for field in time.split(":"):
        total = total * 60 + float(field)
    return total


def corners(box: Sequence[float], form: Form) -> Box:
    """A box as (x0, y0, x1, y1): given so, as corner and size, or as centre and size."""
    a, b, c, d = (float(value) for value in box)
    if form == "corners":
        return a, b, c, d
    return (a, b, a + c, b + d) if form == "corner_size" else (a - c / 2, b - d / 2, a + c / 2, b + d / 2)


def to_unit(box: Sequence[float], frame: Frame, size: Sequence[float] | None) -> Box:
    """A box as shares of the image. `size` is (width, height) of the image in whose pixels the box is given.

    Raises:
        RewardError: pixels without a size.
    """
    if frame == "unit":
        width = height = 1.0
    elif frame == "thousand":
        width = height = 1000.0
    elif size is None:
        raise RewardError(
            "box_iou: the frames differ and the image's size is unknown: give the record a column "
            "'image_size' [width, height], or name it with the option `size`"
        )
    else:
        width, height = (float(side) for side in size)
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


# ---- rewards -------------------------------------------------------------------------------------------------------


def box_iou_reward(
    trajectories: Sequence[Trajectory],
    gold: str = "ground_truth",
    frame: Frame = "pixels",
    gold_frame: Frame | None = None,
    size: str = "image_size",
    policy_size: str | None = None,
    form: Form = "corners",
    gold_form: Form = "corners",
    threshold: float | None = None,
    **columns: Any,
) -> list[float | None]:
    """IoU of the answered boxes with the record's, in [0, 1]; None where the record has none, or not the size that its
    pixels need.

    Boxes are read from the last answer block, or from all of the policy's words where there is none. Several are
    matched one to one, over the larger number (`matched_iou`).

    Args:
        gold: column of the true box, or list of boxes.
        frame, gold_frame: what the numbers mean: pixels, shares of the image, or thousandths; gold's is `frame`
            unless given.
        size: column with [width, height] of the image that the true box is in pixels of; without it the first
            image of the prompt. Needed only where the frames or the sizes differ.
        policy_size: column with [width, height] of the image as the policy saw it, where that was resized.
        form, gold_form: "corners" (x0, y0, x1, y1), "corner_size" or "center_size" (x, y, width, height).
        threshold: pay 1 from this IoU on and 0 below, instead of the IoU.
    """
    gold_frame = gold_frame or frame
    for name, value, known in (
        ("frame", frame, FRAMES),
        ("gold_frame", gold_frame, FRAMES),
        ("form", form, FORMS),
        ("gold_form", gold_form, FORMS),
    ):
        _check_choice("box_iou", name, value, known)
    _check_threshold("box_iou", threshold)
    plain = frame == gold_frame and policy_size is None
    values: list[float | None] = []
    for t in trajectories:
        if t.record.get(gold) is None:
            values.append(None)
            continue
        true = [corners(box, gold_form) for box in _listed(t, gold, 4)]
        said = [corners(box, form) for box in boxes_in(_answer(t))]
        if not plain:
            true_size = t.record.get(size) or _prompt_size(t)
            seen_size = true_size if policy_size is None else t.record.get(policy_size)
            if true_size is None and gold_frame == "pixels" or seen_size is None and frame == "pixels":
                values.append(None)
                continue
            true = [to_unit(box, gold_frame, true_size) for box in true]
            said = [to_unit(box, frame, seen_size) for box in said]
        values.append(matched_iou(said, true, threshold))
    return values


def temporal_iou_reward(
    trajectories: Sequence[Trajectory],
    gold: str = "ground_truth",
    frame: TimeFrame = "seconds",
    gold_frame: TimeFrame | None = None,
    duration: str = "duration",
    fps: str = "fps",
    threshold: float | None = None,
    **columns: Any,
) -> list[float | None]:
    """IoU of the answered spans of time with the record's, in [0, 1]; None where the record has none, or lacks what
    turns it into seconds.

    Args:
        gold: column of the true [start, end], or list of them.
        frame, gold_frame: seconds, shares of the video, or frame numbers; gold's is `frame` unless given.
        duration, fps: columns that turn shares and frame numbers into seconds, where the frames differ.
        threshold: pay 1 from this IoU on and 0 below, instead of the IoU.
    """
    gold_frame = gold_frame or frame
    _check_choice("temporal_iou", "frame", frame, TIME_FRAMES)
    _check_choice("temporal_iou", "gold_frame", gold_frame, TIME_FRAMES)
    _check_threshold("temporal_iou", threshold)
    values: list[float | None] = []
    for t in trajectories:
        if t.record.get(gold) is None:
            values.append(None)
            continue
        true: Sequence[Sequence[float]] = _listed(t, gold, 2)
        said: Sequence[Sequence[float]] = spans_in(_answer(t))
        if frame != gold_frame:
            scales = [_seconds_of(t, one, duration, fps) for one in (gold_frame, frame)]
            if scales[0] is None or scales[1] is None:
                values.append(None)
                continue
            true, said = _scaled(true, scales[0]), _scaled(said, scales[1])
        overlap = temporal_iou(said, true)
        values.append(overlap if threshold is None else float(overlap >= threshold))
    return values


def _answer(t: Trajectory) -> str:
    """What stands in the policy's last answer block, or all of its words where there is none."""
    own = policy_text(t)
    found = blocks(own, "answer")
    return found[-1] if found else own


def _seconds_of(t: Trajectory, frame: TimeFrame, duration: str, fps: str) -> float | None:
    """Seconds of a unit of the frame; None where the record does not tell."""
    if frame == "seconds":
        return 1.0
    told = t.record.get(duration if frame == "unit" else fps)
    if not told:
        return None
    return float(told) if frame == "unit" else 1 / float(told)


def _scaled(spans: Sequence[Sequence[float]], scale: float) -> list[Span]:
    return [(start * scale, end * scale) for start, end in spans]


def _listed(t: Trajectory, column: str, length: int) -> list[list[float]]:
    """The column as a list of boxes or spans. Raises RewardError for anything else."""
    value = t.record[column]
    several = value if isinstance(value, Sequence) and value and isinstance(value[0], Sequence) else [value]
    try:
        listed = [[float(number) for number in one] for one in several]
        if any(
            len(one) != length or isinstance(source, Mapping | str) for one, source in zip(listed, several, strict=True)
        ):
            raise ValueError
    except (TypeError, ValueError):
        raise RewardError(
            f"the record of '{t.prompt}' has {value!r} in '{column}'; it must be {length} numbers, or a list of such"
        ) from None
    return listed


def _prompt_size(t: Trajectory) -> tuple[int, int] | None:
    shown = next((s.image for s in t.segments if s.author is Author.USER and s.image is not None), None)
    return None if shown is None else (shown.shape[1], shown.shape[0])


def _check_choice(reward: str, option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{reward}: no {option} '{value}'. Known: {', '.join(known)}")


def _check_threshold(reward: str, threshold: float | None) -> None:
    if threshold is not None and not 0 < threshold <= 1:
        raise UserError(f"{reward}: threshold is {threshold}; it is an IoU, above 0 and up to 1")
