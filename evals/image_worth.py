"""What a picture was worth to the thought that it stands in: the reward that the thought earned less the one that it
earns with another picture in that place, everything else the same (rollout/counterfactuals.py).

It is the counterfactual baseline of one action (COMA, arXiv:1705.08926, equation 4), with the rest of the thought under
common noise in place of a critic. Pictures that nothing afterwards depends on are worth exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evals.bootstrap import Interval, paired_bootstrap
from record.trajectory import Author, Modality, Trajectory
from rollout.counterfactuals import OWN, Counterfactual
from rollout.requests import RequestKey, key_of

# Products of other batches differ in their last bits, and so may what is judged of them and drawn.
ROUNDING, PIXEL_ROUNDING = 1e-6, 1


@dataclass(frozen=True)
class Swap:
    """One draw of one arm, beside the same draw with the thought's own picture."""

    group: int
    member: int
    segment: int
    role: str
    occurrence: int  # earlier images of the role
    arm: str
    draw: int
    own: float | None  # reward; None: not judged
    swapped: float | None
    words_changed: bool  # of what was written after the image
    image_changed: bool | None  # of the last image that was drawn after it; None: none was, with either picture

    @property
    def worth(self) -> float | None:
        """None where either was not judged."""
        return None if self.own is None or self.swapped is None else self.own - self.swapped

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "worth": self.worth}


@dataclass(frozen=True)
class PictureWorth:
    """One arm of one role and occurrence, over all prompts."""

    role: str
    occurrence: int
    arm: str
    images: int
    prompts: int  # with a judged image
    worth: float | None  # mean of the prompts' means; None: nothing was judged
    interval: Interval | None  # over prompts; None: fewer than two
    reward_changed: float | None  # share of those with a worth; a sibling's mean worth is near 0 whatever it is
    words_changed: float  # share of the continuations
    image_changed: float | None  # of those that drew; None: none did
    unjudged: int  # continuations without a worth

    def as_json(self) -> dict[str, Any]:
        between = None if self.interval is None else [self.interval.low, self.interval.high]
        return {**asdict(self), "interval": between}


def swaps_of(asked: Sequence[Counterfactual], groups: Sequence[Sequence[Trajectory]]) -> list[Swap]:
    """Each arm's draws beside the own picture's.

    Args:
        groups: those of the requests that came back, judged; an arm that did not, or whose own arm did not, gives
            what can be compared: the first draw has the thought itself beside it.
    """
    found: dict[RequestKey, Sequence[Trajectory]] = {key_of(group[0]): group for group in groups if group}
    swaps = []
    for one in asked:
        if one.arm == OWN or one.request.key not in found:
            continue
        group, parent, _ = one.request.key
        own = [one.trajectory, *found.get((group, parent, OWN), ())]
        for draw, (mine, other) in enumerate(zip(own, found[one.request.key], strict=False)):
            after = one.segment + 1
            swaps.append(
                Swap(
                    group,
                    one.trajectory.member,
                    one.segment,
                    one.trajectory.segments[one.segment].role,
                    one.trajectory.occurrence(one.segment),
                    one.arm,
                    draw,
                    mine.reward,
                    other.reward,
                    _words(mine, after) != _words(other, after),
                    _image_changed(mine, other, after),
                )
            )
    return swaps


def worth_by_image(swaps: Sequence[Swap]) -> dict[tuple[int, int], dict[int, float]]:
    """(group, member) -> segment -> the mean worth over arms and draws. Images of which nothing was judged are left
    out."""
    found: dict[tuple[int, int], dict[int, list[float]]] = {}
    for swap in swaps:
        if swap.worth is not None:
            found.setdefault((swap.group, swap.member), {}).setdefault(swap.segment, []).append(swap.worth)
    return {key: {segment: _mean(worths) for segment, worths in of.items()} for key, of in found.items()}


def summarise(swaps: Sequence[Swap], **bootstrap: Any) -> list[PictureWorth]:
    """By role and occurrence, in the order in which they are drawn, and by arm; `bootstrap` is paired_bootstrap's."""
    places: dict[tuple[str, int], int] = {}  # to the first segment at which one stands
    for swap in swaps:
        place = swap.role, swap.occurrence
        places[place] = min(swap.segment, places.get(place, swap.segment))
    arms = list(dict.fromkeys(swap.arm for swap in swaps))
    rows = []
    for role, occurrence in sorted(places, key=lambda place: (places[place], place)):
        for arm in arms:
            mine = [s for s in swaps if (s.role, s.occurrence, s.arm) == (role, occurrence, arm)]
            if mine:
                rows.append(_row(role, occurrence, arm, mine, bootstrap))
    return rows


def _row(role: str, occurrence: int, arm: str, swaps: Sequence[Swap], bootstrap: Mapping[str, Any]) -> PictureWorth:
    by_prompt: dict[int, list[float]] = {}
    judged = [swap for swap in swaps if swap.worth is not None]
    for swap in judged:
        by_prompt.setdefault(swap.group, []).append(swap.worth or 0.0)
    worth_P = [_mean(worths) for worths in by_prompt.values()]
    interval = None
    if len(worth_P) > 1:
        interval = paired_bootstrap([0.0] * len(worth_P), worth_P, [""] * len(worth_P), **bootstrap)
    drew = [swap.image_changed for swap in swaps if swap.image_changed is not None]
    return PictureWorth(
        role,
        occurrence,
        arm,
        len({(swap.group, swap.member) for swap in swaps}),
        len(worth_P),
        _mean(worth_P) if worth_P else None,
        interval,
        _mean([abs(swap.worth or 0.0) > ROUNDING for swap in judged]) if judged else None,
        _mean([swap.words_changed for swap in swaps]),
        _mean(drew) if drew else None,
        len(swaps) - len(judged),
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _words(trajectory: Trajectory, after: int) -> list[int]:
    """The ids of the words that the policy wrote from a segment on."""
    written = [s for s in trajectory.segments[after:] if s.author is Author.POLICY and s.modality is Modality.TEXT]
    return [int(id) for segment in written for id in segment.ids]


def _image_changed(mine: Trajectory, other: Trajectory, after: int) -> bool | None:
    last = [
        next((s.image for s in reversed(t.segments[after:]) if s.author is Author.POLICY and s.image is not None), None)
        for t in (mine, other)
    ]
    if last[0] is None or last[1] is None:
        return None if last[0] is last[1] else True
    return last[0].shape != last[1].shape or int(np.abs(last[0].astype(int) - last[1]).max()) > PIXEL_ROUNDING
