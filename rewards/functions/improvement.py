"""What thinking bought: the final picture's graded score less the first sketch's.

Both come from geneval.py's rules, so that the part agrees with the result it explains. A policy can raise it by
spoiling its first sketch, so a recipe pays it beside the final picture's own score and with a smaller weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from record.trajectory import Trajectory
from rewards.contract import Setting, policy_pictures
from rewards.functions.geneval import Mode, check_mode, score_pictures
from runtime.errors import UserError


def improvement(
    trajectories: Sequence[Trajectory],
    setting: Setting,
    log_metric: Any = None,
    mode: Mode = "graded",
    credit: Literal["trajectory", "segments"] = "trajectory",
    **columns: Any,
) -> list[float | dict[int, float] | None]:
    """Final less first, in [-1, 1]; 0 for a thought with one picture; None without pictures or without `include`.

    credit "segments": every picture after the first is credited with its own score less that of the picture before
    it, so the values of a thought add up to the difference; a thought with one picture credits nothing (None).
    """
    check_mode(mode, "improvement")
    if credit not in ("trajectory", "segments"):
        raise UserError(f"improvement: no credit '{credit}'. Known: trajectory, segments")
    drawn = [policy_pictures(t) if t.record.get("include") else [] for t in trajectories]
    if credit == "trajectory":
        drawn = [[pictures[0], pictures[-1]] if len(pictures) > 1 else pictures for pictures in drawn]
    flat = [picture for pictures in drawn for _, picture in pictures]
    records = [t.record for t, pictures in zip(trajectories, drawn, strict=True) for _ in pictures]
    scored = iter([float(score) for score, _ in score_pictures(flat, records, setting, mode, "improvement")])
    rows: list[float | dict[int, float] | None] = []
    gains: list[float] = []
    for pictures in drawn:
        scores = [next(scored) for _ in pictures]
        if not scores:
            rows.append(None)
            continue
        gains.append(scores[-1] - scores[0])
        steps = {pictures[i][0]: scores[i] - scores[i - 1] for i in range(1, len(scores))}
        rows.append(gains[-1] if credit == "trajectory" else steps or None)
    if log_metric is not None and gains:
        log_metric("better", sum(gain > 0 for gain in gains) / len(gains))
        log_metric("worse", sum(gain < 0 for gain in gains) / len(gains))
    return rows
