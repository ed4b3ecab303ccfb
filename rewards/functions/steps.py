"""Keeps a thought to a sensible number of images and turns: full pay inside the limits, less for each one outside.

What bounds a rollout is the format's own limit; this part says where inside it a thought should stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from record.trajectory import Author, Trajectory
from runtime.errors import UserError


def steps(
    trajectories: Sequence[Trajectory],
    min_images: int = 1,
    max_images: int | None = None,
    min_turns: int = 0,
    max_turns: int | None = None,
    penalty: float = 0.5,
    per_image: float = 0.0,
    cut_off: float = 0.5,
    **columns: Any,
) -> list[float]:
    """max(0, 1 - penalty * outside - per_image * (images - min_images)+ - cut_off * [hit a limit]), in [0, 1].

    Args:
        min_images, max_images: images that the policy should draw; `outside` counts those missing or in excess.
        min_turns, max_turns: the same for its text segments.
        per_image: price of each image above min_images, where shorter thoughts are wanted.
        cut_off: price of ending at a limit of tokens, images or context instead of ending by itself.
    """
    for name, low, high in (("images", min_images, max_images), ("turns", min_turns, max_turns)):
        if high is not None and high < low:
            raise UserError(f"steps: max_{name} is {high}, below min_{name} = {low}")
    values = []
    for trajectory in trajectories:
        own = [s for s in trajectory.segments if s.author is Author.POLICY]
        images = sum(s.image is not None for s in own)
        turns = sum(s.image is None and bool(s.text) for s in own)
        outside = _outside(images, min_images, max_images) + _outside(turns, min_turns, max_turns)
        price = penalty * outside + per_image * max(images - min_images, 0) + cut_off * trajectory.stop.cut_off
        values.append(max(0.0, 1 - price))
    return values


def _outside(count: int, low: int, high: int | None) -> int:
    return max(low - count, 0) + (max(count - high, 0) if high is not None else 0)
