"""What thinking bought: the final image's graded score less the first sketch's.

Both come from geneval.py's rules, so that the part agrees with the result it explains. A policy can raise it by
spoiling its first sketch, so a recipe pays it beside the final image's own score and with a smaller weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from record.trajectory import Trajectory
from rewards.contract import RewardContext, policy_images
from rewards.functions.geneval import Mode, check_mode, score_images
from runtime.errors import UserError


def improvement(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    log_metric: Any = None,
    mode: Mode = "graded",
    credit: Literal["trajectory", "segments"] = "trajectory",
    **columns: Any,
) -> list[float | dict[int, float] | None]:
    """Final less first, in [-1, 1]; 0 for a thought with one image; None without images or without `include`.

    credit "segments": every image after the first is credited with its own score less that of the image before
    it, so the values of a thought add up to the difference; a thought with one image credits nothing (None).
    """
    check_mode(mode, "improvement")
    if credit not in ("trajectory", "segments"):
        raise UserError(f"improvement: no credit '{credit}'. Known: trajectory, segments")
    drawn = [policy_images(t) if t.record.get("include") else [] for t in trajectories]
    if credit == "trajectory":
        drawn = [[images[0], images[-1]] if len(images) > 1 else images for images in drawn]
    flat = [image for images in drawn for _, image in images]
    records = [t.record for t, images in zip(trajectories, drawn, strict=True) for _ in images]
    scored = iter([float(score) for score, _ in score_images(flat, records, context, mode, "improvement")])
    rows: list[float | dict[int, float] | None] = []
    gains: list[float] = []
    for images in drawn:
        scores = [next(scored) for _ in images]
        if not scores:
            rows.append(None)
            continue
        gains.append(scores[-1] - scores[0])
        steps = {images[i][0]: scores[i] - scores[i - 1] for i in range(1, len(scores))}
        rows.append(gains[-1] if credit == "trajectory" else steps or None)
    if log_metric is not None and gains:
        log_metric("better", sum(gain > 0 for gain in gains) / len(gains))
        log_metric("worse", sum(gain < 0 for gain in gains) / len(gains))
    return rows
