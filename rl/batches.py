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

from record.trajectory import Modality, Trajectory
from rl.config import GrpoConfig
from rl.ledger import CUT_OFF, GREEDY, Group, Ledger
from rl.losses import Layout, decision_weights

MODALITIES = list(Modality)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass scores. B trajectories, S of the longest."""

    trajectories: list[Trajectory]
    weight_BS: Tensor  # float32: what one decision of the segment counts for; all 0 in a padding pass
    advantage_BS: Tensor  # float32

    @property
    def decisions(self) -> int:
        return sum(int(counts_S.sum()) for counts_S in map(scored_decisions, self.trajectories))


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
    ledger.check()


def plan(trajectories: Sequence[Trajectory], config: GrpoConfig, processes: int, rank: int) -> list[MicroBatch]:
    """This process's micro-batches of one optimiser step over `trajectories`."""
    packs = pack([t.num_tokens() for t in trajectories], config.tokens_per_micro_batch, processes)
    local = np.zeros(len(trajectories), int)
    for number, rows in enumerate(packs):
        local[rows] = number
    weights = _weights(trajectories, local, config)
    batches = [
        _micro_batch([trajectories[row] for row in rows], [weights[row] for row in rows])
        for rows in packs[rank::processes]
    ]
    if len(packs) % processes and rank >= len(packs) % processes:
        shortest = min(trajectories, key=Trajectory.num_tokens)
        batches.append(_micro_batch([shortest], [np.zeros(len(shortest.segments))]))
    return batches


def pack(lengths: Sequence[int], budget: int, processes: int = 1) -> list[list[int]]:
    """Rows by falling length, so that a pass pads little: rows times longest row stays within the budget.

    The budget is lowered to a process's fair share, so that a small batch is divided among all of them.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    rows_each = -(-len(lengths) // processes)
    packs: list[list[int]] = []
    for row in order:
        full = not packs or (len(packs[-1]) + 1) * lengths[packs[-1][0]] > budget or len(packs[-1]) >= rows_each
        if full:
            packs.append([])
        packs[-1].append(row)
    return packs


def _weights(trajectories: Sequence[Trajectory], local: np.ndarray, config: GrpoConfig) -> list[np.ndarray]:
    segments = [(number, segment) for number, t in enumerate(trajectories) for segment in t.segments]
    trajectory_S = np.array([number for number, _ in segments])
    layout = Layout(
        trajectory_S=trajectory_S,
        modality_S=np.array([MODALITIES.index(segment.modality) for _, segment in segments]),
        count_S=np.concatenate([scored_decisions(t) for t in trajectories]),
        role_weight_S=np.array([config.role_weights.get(segment.role, 1.0) for _, segment in segments]),
        trajectories=len(trajectories),
        local_batch_S=local[trajectory_S],
    )
    weight_S = decision_weights(layout, config.loss_type, config.max_completion_length)
    return np.split(weight_S, np.cumsum([len(t.segments) for t in trajectories])[:-1])


def _micro_batch(trajectories: list[Trajectory], weights: Sequence[np.ndarray]) -> MicroBatch:
    shape = (len(trajectories), max(len(t.segments) for t in trajectories))
    weight_BS, advantage_BS = torch.zeros(shape), torch.zeros(shape)
    for row, (trajectory, weight_S) in enumerate(zip(trajectories, weights, strict=True)):
        if trajectory.advantage_S is None:
            raise ValueError(f"trajectory {trajectory.key} has no advantages; credit() comes before update()")
        weight_BS[row, : len(weight_S)] = torch.from_numpy(weight_S)
        advantage_BS[row, : len(weight_S)] = torch.from_numpy(trajectory.advantage_S)
    return MicroBatch(trajectories, weight_BS, advantage_BS)
