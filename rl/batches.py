"""From credited groups to the forward passes of one optimiser step, the same plan on every process.

Every process holds all groups, so weights are computed from the counts of the whole batch without a collective, and
each process is given equally many micro-batches: where there are none left, one of weight 0, so that no process waits
in a collective that another never enters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from policy.base import Pass, Policy
from record.trajectory import Modality, Trajectory
from rl.config import GrpoConfig
from rl.ledger import CUT_OFF, GREEDY, Group, Ledger
from rl.losses import Layout, decision_weights
from rl.packing import deal

MODALITIES = list(Modality)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward scores. P passes, S segments of the longest trajectory."""

    passes: list[Pass]
    trajectory_P: Tensor  # int64: which passes are of one trajectory, counted within the batch
    weight_PS: Tensor  # float32: what one decision of the segment counts for; all 0 in a padding pass
    advantage_PS: Tensor  # float32
    padding: bool = False  # made for the other processes' sake

    @property
    def decisions(self) -> int:
        """By the record, whatever the policy says."""
        return sum(int(scored_decisions(one.trajectory)[list(one.segments)].sum()) for one in self.passes)


def scored_decisions(trajectory: Trajectory) -> np.ndarray:
    """count_S: the decisions that a policy scores, which leaves out greedy ones and untrained segments."""
    return np.array(
        [
            int((~segment.decisions.sampling.greedy_N).sum()) if segment.trained and segment.decisions else 0
            for segment in trajectory.segments
        ]
    )


def trainable(groups: Sequence[Group], config: GrpoConfig) -> list[Trajectory]:
    """The judged members that have something to train."""
    return [
        t
        for group in groups
        for t in group
        if t.reward is not None
        and scored_decisions(t).any()
        and not (config.mask_truncated_completions and t.stop.cut_off)
    ]


def drop_untrainable(ledger: Ledger, config: GrpoConfig) -> None:
    """Move credited groups of which no member has a decision to train to the dropped ones; their advantages are zeros.

    What is left as trained takes part in the update, so that the ledger says no more than was done.
    """
    credited, ledger.trained = ledger.trained, []
    for group in credited:
        if trainable([group], config):
            ledger.trained.append(group)
            continue
        sampled = any(scored_decisions(t).any() for t in group if t.reward is not None)
        ledger.drop(CUT_OFF if sampled else GREEDY)
        for trajectory in group:
            trajectory.advantage_S = np.zeros(len(trajectory.segments), np.float32)
    ledger.rescored = sum(not t.exact for t in trainable(ledger.trained, config))
    ledger.corrected = ledger.rescored if config.importance_sampling_cap is not None else 0
    ledger.check()


def plan(
    policy: Policy, trajectories: Sequence[Trajectory], config: GrpoConfig, processes: int, rank: int
) -> list[MicroBatch]:
    """This process's micro-batches of one optimiser step over `trajectories`.

    Every process makes equally many, over equal modules (packing.py). Where it has none left of a kind, it scores
    another's with weight 0.
    """
    passes = policy.passes(trajectories, _divisible(config))
    dealt = deal(passes, config.tokens_per_micro_batch, processes, config.by_sequence)
    number_of = {id(trajectory): number for number, trajectory in enumerate(trajectories)}
    local = [np.full(len(t.segments), -1) for t in trajectories]
    for number, forward in enumerate(forward for mine in dealt for forward in mine if not forward.padding):
        for row in forward.passes:
            local[number_of[id(passes[row].trajectory)]][list(passes[row].segments)] = number
    weights = segment_weights(trajectories, local, config)
    batches: list[MicroBatch] = []
    for forward in dealt[rank]:
        mine = [passes[row] for row in forward.passes]
        counts = 0.0 if forward.padding else 1.0
        weights_P = [counts * weights[number_of[id(p.trajectory)]] for p in mine]
        batches.append(_micro_batch(mine, weights_P, forward.padding))
    return batches


def share(
    policy: Policy, trajectories: Sequence[Trajectory], config: GrpoConfig, processes: int, rank: int
) -> list[list[Pass]]:
    """This process's passes over `trajectories`, by forward, where no gradient and no weight is wanted. Some passes may
    be several processes'."""
    passes = policy.passes(trajectories, config.tokens_per_micro_batch)
    mine = deal(passes, config.tokens_per_micro_batch, processes)[rank]
    return [[passes[row] for row in forward.passes] for forward in mine]


def _divisible(config: GrpoConfig) -> int | None:
    """A ratio over a whole trajectory wants all of its decisions in one forward."""
    return None if config.by_sequence else config.tokens_per_micro_batch


def segment_weights(
    trajectories: Sequence[Trajectory], local: Sequence[np.ndarray], config: GrpoConfig
) -> list[np.ndarray]:
    """weight_S of each trajectory of one optimiser step: what one decision of a segment counts for, float64.

    Args:
        local: local_S of each: the number of the forward that scores the segment, -1 where none does.
    """
    segments = [(number, segment) for number, t in enumerate(trajectories) for segment in t.segments]
    trajectory_S = np.array([number for number, _ in segments])
    layout = Layout(
        trajectory_S=trajectory_S,
        modality_S=np.array([MODALITIES.index(segment.modality) for _, segment in segments]),
        count_S=np.concatenate([scored_decisions(t) for t in trajectories]),
        role_weight_S=np.array([config.role_weights.get(segment.role, 1.0) for _, segment in segments]),
        trajectories=len(trajectories),
        local_batch_S=np.concatenate(local),
    )
    weight_S = decision_weights(layout, config.loss_type, config.max_completion_length)
    return np.split(weight_S, np.cumsum([len(t.segments) for t in trajectories])[:-1])


def _micro_batch(passes: list[Pass], weights: Sequence[np.ndarray], padding: bool) -> MicroBatch:
    shape = (len(passes), max(len(p.trajectory.segments) for p in passes))
    weight_PS, advantage_PS = torch.zeros(shape), torch.zeros(shape)
    number: dict[int, int] = {}
    for row, (one, weight_S) in enumerate(zip(passes, weights, strict=True)):
        advantage_S = one.trajectory.advantage_S
        if advantage_S is None:
            raise ValueError(f"trajectory {one.trajectory.key} has no advantages: compute_advantages() comes first")
        number.setdefault(id(one.trajectory), len(number))
        weight_PS[row, : len(weight_S)] = torch.from_numpy(weight_S)
        advantage_PS[row, : len(weight_S)] = torch.from_numpy(advantage_S)
    trajectory_P = torch.tensor([number[id(p.trajectory)] for p in passes])
    return MicroBatch(passes, trajectory_P, weight_PS, advantage_PS, padding)
