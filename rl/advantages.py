"""Group-relative credit: judged groups from rewards/ in, advantages for losses.py out. Pure numpy.

Source: GRPO (arXiv:2402.03300, section 4.1.2), with TRL's scaling and its rule for rows that nobody could score.

A baseline is over members that stood in one state: those that began at the prompt, or those that continue from the same
segments of the same parent (rollout/forks.py). The segments that a member has of its parent are not trained in it.

Letters: G members of a group, S segments of a trajectory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from record.trajectory import Trajectory
from rl.config import GrpoConfig
from rl.ledger import FAILED, UNJUDGED, ZERO_VARIANCE, Group, Ledger

EPSILON = 1e-4  # TRL's: added to the standard deviation that advantages are divided by

Centred = list[dict[int, float]]  # one a member: segment -> its score less the baseline


def compute_advantages(groups: Sequence[Group], config: GrpoConfig, failed: int | Mapping[str, int] = 0) -> Ledger:
    """Fill `advantage_S` of every trajectory and say which groups are worth training on.

    A member without a reward leaves its group's baseline and gets zeros. A group with fewer than two judged members
    in any one state, or whose advantages are all zero, is dropped (its advantages are zeros) and counted in the ledger,
    which is checked.
    `failed`: groups that were asked for and never came back, by reason where there are several; they are in the ledger
    too.
    """
    lost = failed if isinstance(failed, Mapping) else {FAILED: failed}
    ledger = Ledger(groups_in=len(groups) + sum(lost.values()))
    for reason, count in lost.items():
        ledger.drop(reason, count)
    centre = _by_segment if config.advantage_level == "segment" else _by_trajectory
    centred = {index: centre(group, config) for index, group in enumerate(groups) if _judged(group) >= 2}
    scale = _batch_scale(groups, centred, config)

    for index, group in enumerate(groups):
        scaled = _scaled(group, centred[index], config, scale) if index in centred else [{} for _ in group]
        learns = False
        for trajectory, values in zip(group, scaled, strict=True):
            advantage_S = np.zeros(len(trajectory.segments), np.float32)
            advantage_S[list(values)] = list(values.values())
            trajectory.advantage_S = advantage_S
            learns |= bool(advantage_S.any())
        if learns:
            ledger.trained.append(group)
        else:
            ledger.drop(ZERO_VARIANCE if index in centred else UNJUDGED)
    members = [trajectory for group in groups for trajectory in group]
    ledger.cut_off = sum(trajectory.stop.cut_off for trajectory in members) / len(members) if members else 0.0
    ledger.check()
    return ledger


def _judged(group: Group) -> int:
    """Judged members of the state that has the most of them."""
    return max((sum(group[m].reward is not None for m in members) for members in _states(group)), default=0)


def _states(group: Group) -> list[list[int]]:
    """The members of a group (by their place in it) that began in one state, for each of its states."""
    states: dict[tuple[int, int] | None, list[int]] = {}
    for place, trajectory in enumerate(group):
        states.setdefault(trajectory.parent, []).append(place)
    return list(states.values())


def _trained_segments(trajectory: Trajectory) -> list[int]:
    return [index for index, segment in enumerate(trajectory.segments) if segment.trained]


Key = tuple[tuple[int, int] | None, str, str, int]


def _key(trajectory: Trajectory, segment: int) -> Key:
    """Parent state, role, modality, occurrence."""
    this = trajectory.segments[segment]
    return trajectory.parent, this.role, this.modality, trajectory.occurrence(segment)


def _by_trajectory(group: Group, config: GrpoConfig) -> Centred:
    centred: Centred = [{} for _ in group]
    for members in _states(group):
        for member, value in zip(members, _less_mean([group[member].reward for member in members]), strict=True):
            if value is not None:
                centred[member] = dict.fromkeys(_trained_segments(group[member]), value)
    return centred


def _by_segment(group: Group, config: GrpoConfig) -> Centred:
    """A segment's score is the trajectory's reward plus the parts that credit it, each less its own mean over the same
    (parent state, role, modality, occurrence): a part that says nothing of a member's segment leaves it as it was, not
    at 0."""
    centred: Centred = [{} for _ in group]
    positions: dict[Key, list[tuple[int, int]]] = {}
    for member, trajectory in enumerate(group):
        if trajectory.reward is not None:
            for segment in _trained_segments(trajectory):
                positions.setdefault(_key(trajectory, segment), []).append((member, segment))
    parts = sorted({part for trajectory in group for part in trajectory.segment_rewards})
    for members in positions.values():
        sources = [(1.0, [group[member].reward for member, _ in members])]
        for part in parts:
            values = [group[member].segment_rewards.get(part, {}).get(segment) for member, segment in members]
            sources.append((config.segment_reward_weights.get(part, 1.0), values))
        for weight, values in sources:
            for (member, segment), value in zip(members, _less_mean(values), strict=True):
                if value is not None:
                    centred[member][segment] = centred[member].get(segment, 0.0) + weight * value
    return centred


def _less_mean(values: Sequence[float | None]) -> list[float | None]:
    """Values less the mean of those that are there. A lone value has no baseline: 0. Equal values give exactly 0."""
    present = [value for value in values if value is not None]
    if len(present) < 2 or min(present) == max(present):
        return [None if value is None else 0.0 for value in values]
    mean = float(np.mean(present))
    return [None if value is None else value - mean for value in values]


def _std(values: Sequence[float]) -> float:
    """Sample standard deviation, as TRL's (divisor n - 1); 0 for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _batch_scale(groups: Sequence[Group], centred: dict[int, Centred], config: GrpoConfig) -> float:
    if config.scale_rewards != "batch":
        return 1.0
    if config.advantage_level == "trajectory":  # TRL's: of the rewards themselves, dropped groups' too
        return _std([t.reward for group in groups for t in group if t.reward is not None]) + EPSILON
    return _std([value for group in centred.values() for member in group for value in member.values()]) + EPSILON


def _scaled(group: Group, centred: Centred, config: GrpoConfig, batch_scale: float) -> Centred:
    if config.scale_rewards != "group":
        return [{segment: value / batch_scale for segment, value in member.items()} for member in centred]
    if config.advantage_level == "trajectory":
        scaled: Centred = [{} for _ in group]
        for members in _states(group):
            scale = _std([r for place in members if (r := group[place].reward) is not None]) + EPSILON
            for place in members:
                scaled[place] = {segment: value / scale for segment, value in centred[place].items()}
        return scaled
    scores: dict[Key, list[float]] = {}
    for trajectory, member in zip(group, centred, strict=True):
        for segment, value in member.items():
            scores.setdefault(_key(trajectory, segment), []).append(value)
    return [
        {segment: value / (_std(scores[_key(trajectory, segment)]) + EPSILON) for segment, value in member.items()}
        for trajectory, member in zip(group, centred, strict=True)
    ]
