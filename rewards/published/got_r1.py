"""GoT-R1: whether objects stand in the image where the plan put them.

Source: Duan et al., arXiv:2505.17022; README of gogoduan/GoT-R1 (no training code is released). Theirs:

    total  R_PI * (R_sem + R_spa) * R_RI
    R_PI   the image against the prompt; R_sem, R_spa: the plan against the prompt, in what it names and where it
           puts it; all three are a model's judgement
    R_RI   overlap (IoU) of the planned boxes with the boxes at which the objects are found in the image

    plan   "a brown dog (100,200),(350,450)": the words, then two corners in thousandths of the image

Ours, where the paper leaves it open: R_RI is the mean over the planned boxes; planned and found boxes of one name are
paired one to one so that the sum of overlaps is largest; a planned object that is not found counts 0; the detector of
the recipe finds them, where theirs asks a language model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from scipy.optimize import linear_sum_assignment

from record.trajectory import Author, Modality, Trajectory
from rewards.contract import RewardContext, policy_images
from rewards.functions.geneval import classes_of
from rewards.functions.overlap import Box, box_iou
from rewards.published.judge_helpers import one_of
from runtime.errors import UserError

Frame = Literal["thousand", "unit", "pixels"]
_NUMBER = r"\d+(?:\.\d+)?"
_POINT = rf"\s*({_NUMBER})\s*,\s*({_NUMBER})\s*"
_CORNERS = re.compile(rf"[(\[]{_POINT}(?:[)\]]\s*,?\s*[(\[]|,){_POINT}[)\]]")
# What leads up to the corners without being part of the name.
_FILLING = re.compile(
    r"^(?:(?:a|an|the|and|with|one|another)\s+)+"
    r"|[\s:]+(?:(?:is|are|at|in|on|located|placed|positioned|box|the|region)[\s:]*)*$",
    re.IGNORECASE,
)


# ---- the formulas ---------------------------------------------------------------------------------------------


def total(prompt_image: float, semantic: float, spatial: float, reasoning_image: float) -> float:
    """R_PI * (R_sem + R_spa) * R_RI."""
    return prompt_image * (semantic + spatial) * reasoning_image


def reasoning_image(planned: Sequence[tuple[str, Box]], found: dict[str, list[Box]]) -> float:
    """R_RI in [0, 1]: the mean over planned boxes of the overlap with the object found for it; 0 without a plan."""
    if not planned:
        return 0.0
    overlaps = 0.0
    for name in {name for name, _ in planned}:
        mine, theirs = [box for other, box in planned if other == name], found.get(name, [])
        if theirs:
            table = np.array([[box_iou(one, other) for other in theirs] for one in mine])
            overlaps += float(table[linear_sum_assignment(table, maximize=True)].sum())
    return overlaps / len(planned)


def planned_boxes(text: str, names: Sequence[str] = ()) -> list[tuple[str, Box]]:
    """What a plan puts where: (name, (x0, y0, x1, y1) in the plan's own numbers), in order.

    With `names` (what the detector knows) a box belongs to the one that is mentioned last before it, and to none where
    none is; otherwise to the words before it, back to the last box or mark of punctuation, without article and "at".
    """
    boxes: list[tuple[str, Box]] = []
    end = 0
    for match in _CORNERS.finditer(text):
        words, end = text[end : match.start()], match.end()
        x0, y0, x1, y1 = (float(number) for number in match.groups())
        box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        name = _mentioned(words, names) if names else _FILLING.sub("", re.split(r"[.,;()\[\]]", words)[-1].strip())
        if name:
            boxes.append((name, box))
    return boxes


def _mentioned(words: str, names: Sequence[str]) -> str | None:
    """The name that ends last in `words`; the longest of those that end there."""
    ends = [
        (match.end(), len(name), name)
        for name in names
        for match in re.finditer(rf"\b{re.escape(name)}(?=s?\b)", words, re.IGNORECASE)
    ]
    return max(ends)[2] if ends else None


# ---- the reward -----------------------------------------------------------------------------------------------


def got_r1(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    log_metric: Any = None,
    frame: Frame = "thousand",
    threshold: float = 0.3,
    **columns: Any,
) -> list[float | None]:
    """R_RI of the final image against the boxes in all words of the policy before it; 0 without a plan or an image.

    With a detector of fixed classes the record's own classes are the names (all that it knows, where the record has
    none), so that "a brown dog" is looked for as "dog"; an open vocabulary is asked for the plan's own words.

    Args:
        frame: what the plan's numbers are: thousandths of the image (GoT's), shares of it, or pixels.
        threshold: what the detector is less sure of than this is not there.
    """
    one_of("got_r1", "frame", frame, get_args(Frame))
    if not 0 <= threshold < 1:
        raise UserError(f"got_r1: threshold is {threshold}; it is a score, from 0 to below 1")
    detector = context.detector_for("got_r1")
    plans: list[list[tuple[str, Box]]] = []
    for t in trajectories:
        names = () if detector.open_vocabulary else tuple(classes_of(t.record)) or detector.classes
        plans.append(planned_boxes(_plan(t), names))
    drawn = [policy_images(t) for t in trajectories]
    rows = [row for row, plan in enumerate(plans) if plan and drawn[row]]
    images = [drawn[row][-1][1] for row in rows]
    seen = detector.detect(images, [[name for name, _ in plans[row]] for row in rows], [{} for _ in rows])
    values: list[float | None] = [0.0] * len(trajectories)
    for row, image, found in zip(rows, images, seen, strict=True):
        height, width = image.shape[:2]
        x, y = {"thousand": (width / 1000, height / 1000), "unit": (width, height), "pixels": (1.0, 1.0)}[frame]
        planned = [(name, (b[0] * x, b[1] * y, b[2] * x, b[3] * y)) for name, b in plans[row]]
        sure = {name: [item.box for item in items if item.score > threshold] for name, items in found.items()}
        values[row] = reasoning_image(planned, sure)
    if log_metric is not None and trajectories:
        log_metric("planned_boxes", sum(len(plan) for plan in plans) / len(plans))
    return values


def _plan(trajectory: Trajectory) -> str:
    """The policy's words before its last image (all of them where it drew none)."""
    drawn = policy_images(trajectory)
    last = drawn[-1][0] if drawn else len(trajectory.segments)
    return "\n".join(
        s.text for s in trajectory.segments[:last] if s.author is Author.POLICY and s.modality is Modality.TEXT
    )
