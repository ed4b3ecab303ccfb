"""Whether a thought is a sentence of its format, as the format itself judges it.

A constant, and refused by the recipe, where decoding is fully constrained (config.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from formats.base import Format
from record.trajectory import Author, Trajectory
from rewards.contract import RewardContext
from runtime.errors import UserError


def format_reward(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    log_extra: Any = None,
    mode: Literal["strict", "graded"] = "strict",
    **columns: Any,
) -> list[float]:
    """strict: 1 without a violation, else 0. graded: the share of the policy's segments without one, in [0, 1],
    where the thought as a whole counts as one segment more (a missing part belongs to none)."""
    if mode not in ("strict", "graded"):
        raise UserError(f"format: no mode '{mode}'. Known: strict, graded")
    found = [_format_of(t, context).violations(t) for t in trajectories]
    if log_extra is not None:
        log_extra("violations", [[v.message for v in violations] for violations in found])
    if mode == "strict":
        return [float(not violations) for violations in found]
    values = []
    for trajectory, violations in zip(trajectories, found, strict=True):
        own = {
            i
            for i, s in enumerate(trajectory.segments)
            if s.author is Author.POLICY and (s.image is not None or s.text.strip())
        }
        at_fault = {v.segment if v.segment in own else None for v in violations}
        values.append(1 - len(at_fault) / (len(own) + 1))
    return values


def _format_of(trajectory: Trajectory, context: RewardContext) -> Format:
    if context.fmt is not None and context.fmt.name == trajectory.format:
        return context.fmt
    from formats.registry import get_format  # a judge given its format needs no registry

    return get_format(trajectory.format)
