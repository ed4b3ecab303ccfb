"""Group-relative credit: judged groups from rewards/ in, advantages for losses.py out. Pure numpy.

Source: GRPO (arXiv:2402.03300, section 4.1.2), with TRL's scaling and its rule for rows that nobody could score;
rewards to go: its process supervision (section 4.1.3), over the segments of both modalities as in UnifiedGRPO
(arXiv:2603.09538).

A baseline is over members that stood in one state: those that began at the prompt, or those that continue from the same
segments of the same parent (rollout/forks.py). The segments that a member has of its parent are not trained in it.

Letters: G members of a group, S segments of a trajectory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from record.trajectory import Trajectory
from rl.config import GrpoConfig
from rl.ledger import FAILED, UNJUDGED, ZERO_VARIANCE, Group, Ledger

EPSILON = 1e-4  # TRL's: added to the standard deviation that advantages are divided by

Worth = Mapping[tuple[int, int], Mapping[int, float]]  # (group, member) -> segment -> what its advantage gains
Centred = list[dict[int, float]]  # one a member: segment -> its score less the baseline


def compute_advantages(
    groups: Sequence[Group], config: GrpoConfig, failed: int | Mapping[str, int] = 0, added: Worth | None = None
) -> Ledger:
    """Fill `advantage_S` of every trajectory and say which groups are worth training on.

    A member without a reward leaves its group's baseline and gets zeros. A group with fewer than two judged members
    in any one state, or whose advantages are all zero, is dropped (its advantages are zeros) and counted in the ledger,
    which is checked.

    Args:
        failed: groups that were asked for and never came back, by reason where there are several; they are in the
            ledger too.
        added: what single segments gain beside that (rl/image_credit.py), in judged members.
    """
    lost = failed if isinstance(failed, Mapping) else {FAILED: failed}
    ledger = Ledger(groups_in=len(groups) + sum(lost.values()))
    for reason, count in lost.items():
        ledger.drop(reason, count)
    credited = _credited({index: group for index, group in enumerate(groups) if _judged(group) >= 2}, groups, config)

    for index, group in enumerate(groups):
        learns = False
        for trajectory, values in zip(group, credited.get(index, [{} for _ in group]), strict=True):
            advantage_S = np.zeros(len(trajectory.segments), np.float32)
            advantage_S[list(values)] = list(values.values())
            if added and trajectory.reward is not None and index in credited:
                for segment, gain in added.get((trajectory.group, trajectory.member), {}).items():
                    advantage_S[segment] += gain if trajectory.segments[segment].trained else 0.0
            trajectory.advantage_S = advantage_S
            learns |= bool(advantage_S.any())
        if learns:
            ledger.trained.append(group)
        else:
            ledger.drop(ZERO_VARIANCE if index in credited else UNJUDGED)
    members = [trajectory for group in groups for trajectory in group]
    ledger.cut_off = sum(trajectory.stop.cut_off for trajectory in members) / len(members) if members else 0.0
    ledger.check()
    return ledger


def _credited(judged: Mapping[int, Group], groups: Sequence[Group], config: GrpoConfig) -> dict[int, Centred]:
    """The advantages of each judged group's members, by its index and their segments."""
    if config.advantage_level == "reward_to_go":
        scales = _batch_scales(groups) if config.scale_rewards == "batch" else {}
        return {index: _to_go(group, config, scales) for index, group in judged.items()}
    centre = _by_segment if config.advantage_level == "segment" else _by_trajectory
    centred = {index: centre(group, config) for index, group in judged.items()}
    scale = _batch_scale(groups, centred, config)
    return {index: _scaled(judged[index], values, config, scale) for index, values in centred.items()}


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


# ---- rewards to go ----


@dataclass(frozen=True)
class _StepRewards:
    """Rewards that are compared with one another: one part's of one place in the group, or the thoughts' own."""

    part: str | None  # None: the thought's reward
    places: list[tuple[int, int]]  # (member, the segment at whose end it is given)
    values: list[float | None]


def _step_rewards(group: Group) -> Iterator[_StepRewards]:
    """A group's rewards by where they are given: parts at the ends of the segments that they credit, the thought's
    reward at the end of its last one. An unjudged member has none."""
    for members in _states(group):
        places = [(member, len(group[member].segments) - 1) for member in members]
        yield _StepRewards(None, places, [group[member].reward for member in members])
    for part in sorted({part for trajectory in group for part in trajectory.segment_rewards}):
        positions: dict[Key, list[tuple[int, int]]] = {}
        for member, trajectory in enumerate(group):
            if trajectory.reward is not None:
                for segment in trajectory.segment_rewards.get(part, {}):
                    positions.setdefault(_key(trajectory, segment), []).append((member, segment))
        for places in positions.values():
            yield _StepRewards(part, places, [group[m].segment_rewards[part][s] for m, s in places])


def _batch_scales(groups: Sequence[Group]) -> dict[str | None, float]:
    """The deviation of each part's rewards, and of the thoughts' own (None), over the batch, dropped groups' too."""
    values: dict[str | None, list[float]] = {}
    for group in groups:
        for rewards in _step_rewards(group):
            values.setdefault(rewards.part, []).extend(value for value in rewards.values if value is not None)
    return {part: _std(given) + EPSILON for part, given in values.items()}


def _to_go(group: Group, config: GrpoConfig, scales: Mapping[str | None, float]) -> Centred:
    """A segment's advantage: the sum of the normalised rewards that are given at its own end or later.

    Each reward is normalised by itself, less its mean over the same (parent state, role, modality, occurrence) and, as
    scale_rewards says, divided by the deviation there or by the batch's; then weighted, and summed. What says nothing
    of a member's segment adds nothing to it, and a lone reward is 0.
    """
    given: list[list[tuple[int, float]]] = [[] for _ in group]  # by member: (segment at whose end, normalised reward)
    for rewards in _step_rewards(group):
        scale = scales.get(rewards.part, 1.0)
        if config.scale_rewards == "group":
            scale = _std([value for value in rewards.values if value is not None]) + EPSILON
        weight = 1.0 if rewards.part is None else config.segment_reward_weights.get(rewards.part, 1.0)
        for (member, end), value in zip(rewards.places, _less_mean(rewards.values), strict=True):
            if value is not None:
                given[member].append((end, weight * value / scale))
    return [
        {segment: sum(value for end, value in own if end >= segment) for segment in _trained_segments(trajectory)}
        if trajectory.reward is not None
        else {}
        for trajectory, own in zip(group, given, strict=True)
    ]
