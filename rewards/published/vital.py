"""VITAL: answers about long videos and where in them, each scaled by how hard its task is.

    R = accuracy + format + tool
    accuracy of a stretch of time:  clamp((IoU - low) / (high - low), 0, 1), with low and high of the record's task
    accuracy of an answer:          right or not
    format:                         1 for turns that think and then call a tool or, the last one, answer
    tool:                           1 if at least one call worked
    weight of a sample:             0.5 + 0.5 clamp(2 - mean R of its group, 0, 1)

Zhang et al., arXiv:2508.04416 (DGRPO). No code of it was available: this is the formula alone, and the bounds of each
task are the recipe's to give (without them the IoU is paid as it is).

The weight multiplies a sample's advantage. As a reward it scales its group's rewards, `vital * vital_weight`, which
comes to the same where advantages are not divided by the group's own standard deviation (grpo.scale_rewards: none or
batch). With the default, group, it has no effect: the division takes the factor out, and a recipe that pays it is
refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from record.trajectory import Trajectory
from rewards.contract import groups_of
from rewards.functions.answers import COMPARISONS, answer_of, best, references
from rewards.functions.overlap import spans_in, temporal_iou
from rewards.functions.text import balanced, blocks, count, policy_turns, without_chat_marks
from rewards.functions.tool_use import tool_calls
from rewards.published.judge_helpers import log_parts, one_of, totals
from runtime.errors import UserError

TAGS = ("think", "tool_call", "answer")


# ---- formulas ------------------------------------------------------------------------------------------------------


def scaled_iou(iou: float, low: float = 0.0, high: float = 1.0) -> float:
    """clamp((IoU - low) / (high - low), 0, 1): `low` earns nothing yet, `high` all."""
    return min(1.0, max(0.0, (iou - low) / (high - low)))


def sample_weight(mean_reward: float) -> float:
    """0.5 + 0.5 clamp(2 - mean R, 0, 1): 1 up to a mean of 1, one half from 2 on. R is at most 3."""
    return 0.5 + 0.5 * min(1.0, max(0.0, 2 - mean_reward))


def well_formed(turns: Sequence[str]) -> bool:
    """Every turn is one think block and then, in all but the last, one tool_call block, in the last one answer block;
    nothing stands outside them."""
    for index, turn in enumerate(turns):
        action = "answer" if index == len(turns) - 1 else "tool_call"
        if any(max(count(turn, tag)) > 1 for tag in TAGS) or not all(balanced(turn, tag) for tag in TAGS):
            return False
        if not re.fullmatch(rf"\s*<think>.*</think>\s*<{action}>.*</{action}>\s*", turn, re.DOTALL):
            return False
    return bool(turns)


# ---- rewards -------------------------------------------------------------------------------------------------------


def vital(
    trajectories: Sequence[Trajectory],
    context: Any = None,
    log_metric: Any = None,
    log_extra: Any = None,
    gold: str = "ground_truth",
    task: str = "task",
    bounds: Mapping[str, Sequence[float]] | None = None,
    compare: str = "choice",
    accuracy: float = 1.0,
    format: float = 1.0,
    tool: float = 1.0,
    **columns: Any,
) -> list[float | None]:
    """R = accuracy + format + tool, in [0, 3]; None without a reference.

    Args:
        gold: column of the true [start, end] in seconds (or several), or of the answer, or answers.
        task: column that names the record's task.
        bounds: {task: [low, high]} of its scaled IoU; 0 and 1 for a task that is not named.
        compare: how answers are compared: choice, exact, f1, math ... (rewards/functions/answers.py).
        accuracy, format, tool: weights.
    """
    scales = _bounds("vital", bounds)
    one_of("vital", "comparison", compare, tuple(COMPARISONS))
    rows = [
        _score(t, gold, scales.get(str(t.record.get(task)), (0.0, 1.0)), compare, (accuracy, format, tool))
        for t in trajectories
    ]
    log_parts(rows, log_metric, log_extra)
    return totals(rows)


def vital_weight(
    trajectories: Sequence[Trajectory],
    context: Any = None,
    gold: str = "ground_truth",
    task: str = "task",
    bounds: Mapping[str, Sequence[float]] | None = None,
    compare: str = "choice",
    accuracy: float = 1.0,
    format: float = 1.0,
    tool: float = 1.0,
    **columns: Any,
) -> list[float | None]:
    """0.5 + 0.5 clamp(2 - mean R, 0, 1) over the judged members of the group, the same for all of them; None where none
    was judged. Options are those of `vital`, and must be given alike.

    Write `vital * vital_weight` and set grpo.scale_rewards: none or batch: with group, the default, advantages are
    divided by the group's own standard deviation, which takes a factor of the whole group out again."""
    values = vital(
        trajectories, gold=gold, task=task, bounds=bounds, compare=compare, accuracy=accuracy, format=format, tool=tool
    )
    weights: list[float | None] = [None] * len(trajectories)
    for rows in groups_of(trajectories):
        judged = [value for row in rows if (value := values[row]) is not None]
        for row in rows if judged else ():
            weights[row] = sample_weight(math.fsum(judged) / len(judged))
    return weights


def _score(
    t: Trajectory, gold: str, bounds: tuple[float, float], compare: str, weights: tuple[float, float, float]
) -> dict[str, float] | None:
    golds = references(t.record, gold)
    if not golds:
        return None
    spans = _spans(t.record[gold])
    turns = [without_chat_marks(turn) for turn in policy_turns(t)]
    if spans is None:
        said = answer_of(t)
        right = 0.0 if said is None else best(COMPARISONS[compare], said, golds)
    else:
        found = blocks("".join(turns[-1:]), "answer")
        right = scaled_iou(temporal_iou(spans_in(found[-1]) if found else [], spans), *bounds)
    if right is None:
        return None
    formed, used = float(well_formed(turns)), float(any(call.ok for call in tool_calls(t)))
    total = weights[0] * right + weights[1] * formed + weights[2] * used
    return {"total": total, "accuracy": right, "format": formed, "tool": used}


def _spans(value: Any) -> list[tuple[float, float]] | None:
    """The reference as stretches of time, or None where it is no such thing."""
    several = value if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple) else [value]
    if not all(
        isinstance(span, list | tuple)
        and len(span) == 2
        and all(isinstance(end, int | float) and not isinstance(end, bool) for end in span)
        for span in several
    ):
        return None
    return [(float(start), float(end)) for start, end in several]


def _bounds(reward: str, bounds: Mapping[str, Sequence[float]] | None) -> dict[str, tuple[float, float]]:
    """Raises UserError for bounds between which nothing lies."""
    scales: dict[str, tuple[float, float]] = {}
    for task, ends in (bounds or {}).items():
        try:
            low, high = (float(end) for end in ends)
        except (TypeError, ValueError):
            raise UserError(f"{reward}: bounds.{task} is {ends!r}; it must be [low, high]") from None
        if not 0 <= low < high <= 1:
            raise UserError(
                f"{reward}: bounds.{task} is [{low}, {high}]; low is at least 0, below high, and high at most 1"
            )
        scales[task] = low, high
    return scales
