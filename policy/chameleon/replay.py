"""From recorded trajectories to one forward: padded rows, and where in them each decision is scored under its law.

Greedy decisions have no density and untrained segments no gradient: both are left out.

Letters: R rows, T ids, N decisions, K guidance branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from policy.chameleon.model import DecisionBatch
from policy.guidance import FULL, branch_weights
from policy.scoring.rows import Row, rows_of
from record.trajectory import DecisionKind, RecordError, Trajectory


@dataclass(frozen=True)
class Replay:
    """What `score` runs. `batch` is None where there is no decision to score."""

    ids_RT: Tensor  # int64, padded on the right
    position_RT: Tensor  # int64
    batch: DecisionBatch | None
    trajectory_N: Tensor  # int64
    segment_N: Tensor  # int64
    kind_N: Tensor  # int64
    behaviour_N: Tensor  # float32

    @property
    def target_count(self) -> int:
        return len(self.trajectory_N)


@dataclass
class _Chosen:
    """The scored decisions of one segment, and the branches that each needs."""

    trajectory: int
    segment: int
    pick_N: np.ndarray  # indices into the segment's decisions
    weights: dict[str, float]  # of the guided ones
    guided_N: np.ndarray  # bool: words are never guided


def plan(trajectories: Sequence[Trajectory], pad: int, entropy: bool, chunk: int, device: torch.device) -> Replay:
    """Raises RecordError for a decision that has nothing before it, or is no token."""
    chosen: list[_Chosen] = []
    rows: list[Row] = []
    row_of: dict[tuple[int, int, str], int] = {}
    for index, trajectory in enumerate(trajectories):
        mine = [
            found
            for segment in range(len(trajectory.segments))
            if (found := _choose(trajectory, index, segment)) is not None
        ]
        wanted = [(item.segment, branch) for item in mine for branch in _branches(item)]
        for row in rows_of(trajectory, index, wanted):
            row_of.update({(index, segment, row.branch): len(rows) for segment in row.offsets})
            rows.append(row)
        chosen += mine
    steps = max((len(row) for row in rows), default=1)
    ids_RT = np.full((len(rows), steps), pad, np.int64)
    position_RT = np.zeros((len(rows), steps), np.int64)
    for position, row in enumerate(rows):
        ids_RT[position, : len(row)] = row.ids_T
        position_RT[position, : len(row)] = row.position_T

    if not chosen:
        none = torch.zeros(0, dtype=torch.long, device=device)
        return Replay(
            torch.from_numpy(ids_RT).to(device),
            torch.from_numpy(position_RT).to(device),
            None,
            none,
            none,
            none,
            torch.zeros(0, device=device),
        )

    branches = list(dict.fromkeys(branch for item in chosen for branch in (FULL, *_branches(item))))
    pieces = [_position(trajectories, item, rows, row_of, steps, branches) for item in chosen]
    index_KN = np.concatenate([index for index, _ in pieces], 1)
    weight_KN = np.concatenate([weight for _, weight in pieces], 1)
    sets: dict[bytes, int] = {}
    ranges: list[np.ndarray] = []
    columns: list[list[np.ndarray]] = [[] for _ in range(5)]
    for item in chosen:
        segment = trajectories[item.trajectory].segments[item.segment]
        decisions = segment.decisions
        assert decisions is not None
        sampling = decisions.sampling
        # One table for the whole call: segments of one role nearly always share their sets.
        position_of = np.full(len(sampling.sets) + 1, -1, np.int64)
        for local, held in enumerate(sampling.sets):
            key = np.ascontiguousarray(held, np.int32).tobytes()
            if key not in sets:
                sets[key] = len(ranges)
                ranges.append(held)
            position_of[local] = sets[key]
        pick = item.pick_N
        for column, values in zip(
            columns,
            (
                segment.ids[decisions.position_N[pick]],
                sampling.temperature_N[pick],
                position_of[sampling.allowed_N[pick]],
                decisions.kind_N[pick],
                decisions.logprob_N[pick],
            ),
            strict=True,
        ):
            column.append(values)
    target, temperature, allowed, kind, behaviour = (np.concatenate(column) for column in columns)

    def tensor(values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, dtype)

    plain = len(branches) == 1
    batch = DecisionBatch(
        tensor(index_KN, torch.long),
        None if plain else tensor(weight_KN, torch.float32),
        tensor(target, torch.long),
        tensor(temperature, torch.float32),
        tensor(allowed, torch.long),
        tuple(ranges),
        entropy,
        chunk,
    )
    sizes = [len(item.pick_N) for item in chosen]
    return Replay(
        torch.from_numpy(ids_RT).to(device),
        torch.from_numpy(position_RT).to(device),
        batch,
        tensor(np.repeat([item.trajectory for item in chosen], sizes), torch.long),
        tensor(np.repeat([item.segment for item in chosen], sizes), torch.long),
        tensor(kind, torch.long),
        tensor(behaviour, torch.float32),
    )


def _choose(trajectory: Trajectory, index: int, number: int) -> _Chosen | None:
    segment = trajectory.segments[number]
    decisions = segment.decisions
    if not segment.trained or decisions is None or not len(decisions):
        return None
    if (decisions.kind_N == DecisionKind.FLOW).any():
        raise RecordError(
            f"trajectory {trajectory.key}: segment {number} ('{segment.role}') has denoising steps; "
            "the family 'chameleon' scores words and codes"
        )
    pick_N = np.flatnonzero(~decisions.sampling.greedy_N)
    if not len(pick_N):
        return None
    guidance = decisions.sampling.guidance
    guided_N = (decisions.kind_N[pick_N] == DecisionKind.CODE) & (guidance is not None)
    return _Chosen(index, number, pick_N, branch_weights(guidance), guided_N)


def _branches(item: _Chosen) -> list[str]:
    needed = [FULL] if not item.guided_N.all() else []
    return list(dict.fromkeys([*needed, *item.weights])) if item.guided_N.any() else [FULL]


def _position(
    trajectories: Sequence[Trajectory],
    item: _Chosen,
    rows: list[Row],
    row_of: dict[tuple[int, int, str], int],
    steps: int,
    branches: list[str],
) -> tuple[np.ndarray, np.ndarray]:
    """index_KN into the flattened rows and weight_KN of one segment's decisions; unused branches weigh 0."""
    trajectory = trajectories[item.trajectory]
    decisions = trajectory.segments[item.segment].decisions
    assert decisions is not None
    position_N = decisions.position_N[item.pick_N].astype(np.int64)
    index_KN = np.zeros((len(branches), len(position_N)), np.int64)
    weight_KN = np.zeros((len(branches), len(position_N)), np.float32)
    for branch in _branches(item):
        number = row_of[item.trajectory, item.segment, branch]
        # A decision is predicted from the id before it.
        before_N = rows[number].offsets[item.segment] + position_N - 1
        weight_N = np.where(item.guided_N, item.weights.get(branch, 0.0), float(branch == FULL))
        if (before_N[weight_N != 0] < 0).any():
            raise RecordError(
                f"trajectory {trajectory.key}: the first id of segment {item.segment} "
                f"('{trajectory.segments[item.segment].role}') is a decision, but nothing precedes it "
                f"in the branch '{branch}'"
            )
        position = branches.index(branch)
        index_KN[position] = number * steps + np.maximum(before_N, 0)
        weight_KN[position] = weight_N
    return index_KN, weight_KN
