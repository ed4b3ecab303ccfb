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

MODALITIES = list(Modality)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward scores. P passes, S segments of the longest trajectory."""

    passes: list[Pass]
    trajectory_P: Tensor  # int64: which passes are of one trajectory, counted within the batch
    weight_PS: Tensor  # float32: what one decision of the segment counts for; all 0 in a padding pass
    advantage_PS: Tensor  # float32

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

    Every process makes equally many, over equal modules: collective operations inside a module (FSDP) wait for all.
    Where a process has none left of a kind, it scores another's cheapest with weight 0.
    """
    passes = policy.passes(trajectories, _divisible(config))
    packs = _packs(passes, config.tokens_per_micro_batch, processes, config.by_sequence)
    number_of = {id(trajectory): number for number, trajectory in enumerate(trajectories)}
    local = [np.full(len(t.segments), -1) for t in trajectories]
    for number, rows in enumerate(packs):
        for row in rows:
            local[number_of[id(passes[row].trajectory)]][list(passes[row].segments)] = number
    weights = _weights(trajectories, local, config)
    by_modules: dict[frozenset[str], list[list[int]]] = {}
    for rows in packs:
        by_modules.setdefault(passes[rows[0]].modules, []).append(rows)
    batches: list[MicroBatch] = []
    for modules in sorted(by_modules, key=sorted):
        alike = by_modules[modules]
        for rows in alike[rank::processes]:
            mine = [passes[row] for row in rows]
            batches.append(_micro_batch(mine, [weights[number_of[id(p.trajectory)]] for p in mine]))
        if len(alike) % processes and rank >= len(alike) % processes:
            cheapest = min((passes[row] for rows in alike for row in rows), key=lambda p: p.cost)
            batches.append(_micro_batch([cheapest], [np.zeros(len(cheapest.trajectory.segments))]))
    return batches


def share(
    policy: Policy, trajectories: Sequence[Trajectory], config: GrpoConfig, processes: int, rank: int
) -> list[list[Pass]]:
    """This process's passes over `trajectories`, by forward, where no gradient and no weight is wanted."""
    passes = policy.passes(trajectories, config.tokens_per_micro_batch)
    by_modules: dict[frozenset[str], list[list[int]]] = {}
    for rows in _packs(passes, config.tokens_per_micro_batch, processes, together=False):
        by_modules.setdefault(passes[rows[0]].modules, []).append(rows)
    mine: list[list[Pass]] = []
    for modules in sorted(by_modules, key=sorted):
        alike = by_modules[modules]
        # Processes without a forward left make the last one again: all make equally many.
        for start in range(0, len(alike), processes):
            mine.append([passes[row] for row in alike[min(start + rank, len(alike) - 1)]])
    return mine


def _divisible(config: GrpoConfig) -> int | None:
    """A ratio over a whole trajectory wants all of its decisions in one forward."""
    return None if config.by_sequence else config.tokens_per_micro_batch


def _packs(passes: Sequence[Pass], budget: int, processes: int, together: bool) -> list[list[int]]:
    """Passes over equal modules by falling cost, so that a forward pads little. `together`: a trajectory's passes are
    never parted."""
    units = [[number] for number in range(len(passes))]
    if together:
        of: dict[int, list[int]] = {}
        for number, one in enumerate(passes):
            of.setdefault(id(one.trajectory), []).append(number)
        units = list(of.values())
    by_modules: dict[frozenset[str], list[list[int]]] = {}
    for unit in units:
        by_modules.setdefault(passes[unit[0]].modules, []).append(unit)
    packs: list[list[int]] = []
    for alike in by_modules.values():
        costs = [sum(passes[number].cost for number in unit) for unit in alike]
        packs += [[number for row in rows for number in alike[row]] for rows in pack(costs, budget, processes)]
    return packs


def pack(lengths: Sequence[int], budget: int, processes: int = 1) -> list[list[int]]:
    """Rows by falling length, so that a forward pads little: rows times longest row stays within the budget.

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


def _weights(trajectories: Sequence[Trajectory], local: Sequence[np.ndarray], config: GrpoConfig) -> list[np.ndarray]:
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


def _micro_batch(passes: list[Pass], weights: Sequence[np.ndarray]) -> MicroBatch:
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
    return MicroBatch(passes, torch.tensor([number[id(p.trajectory)] for p in passes]), weight_PS, advantage_PS)
