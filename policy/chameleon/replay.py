"""From recorded trajectories to one forward: rows, and where in them each decision is scored under its law.

Rows lie end to end in one line where the model's attention can tell them apart (policy/scoring/row_attention.py); else
each is a line of its own, padded to the longest. Greedy decisions have no density and untrained segments no gradient:
both are left out.

Letters: L lines, T ids of a line, N decisions, K guidance branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy.base import Pass, forwarded
from policy.chameleon.model import DecisionBatch
from policy.guidance import FULL, branch_weights
from policy.scoring.rows import Row, rows_of
from record.trajectory import DecisionKind, RecordError, Trajectory


@dataclass(frozen=True)
class Replay:
    """What `score` runs. `batch` is None where there is no decision to score."""

    ids_LT: Tensor  # int64, padded on the right
    position_LT: Tensor  # int64
    row_lengths: tuple[int, ...] | None  # of the rows in the one line; None: a row a line
    batch: DecisionBatch | None
    pass_N: Tensor  # int64
    segment_N: Tensor  # int64
    kind_N: Tensor  # int64
    behaviour_N: Tensor  # float32

    @property
    def target_count(self) -> int:
        return len(self.pass_N)


@dataclass(frozen=True)
class _Chosen:
    """The scored decisions of one segment, and the branches that each needs."""

    segment: int
    pick_N: np.ndarray  # indices into the segment's decisions
    weights: dict[str, float]  # of the guided ones
    guided_N: np.ndarray  # bool: words are never guided


@dataclass(frozen=True)
class _Plan:
    """A pass of this family: rows, and the decisions in them."""

    rows: tuple[Row, ...]
    chosen: tuple[_Chosen, ...]


def divide(trajectory: Trajectory, budget: int | None, packed: bool = True) -> list[Pass]:
    """A trajectory's passes: one forward each, divided at segments where all of it would take more than `budget`.

    Segments whose rows are their own (a planner that sees its last frame alone) are passes of their own. Segments that
    share rows stay together up to the budget or, where one of them takes more than that by itself, up to what that one
    takes: each pass repeats the rows before it, and smaller ones would not lower the peak. `packed`: rows are not
    padded.

    Raises RecordError for a decision that is no token, or a context that is not recorded.
    """
    chosen = [found for segment in range(len(trajectory.segments)) if (found := _choose(trajectory, segment))]
    if not chosen:
        return []
    passes: list[Pass] = []
    for together in _connected(trajectory, chosen):
        whole = _pass(trajectory, together, packed)
        if budget is None or forwarded([whole]) <= budget:
            passes.append(whole)
            continue
        limit = max(budget, *(forwarded([_pass(trajectory, [item], packed)]) for item in together))
        taken: list[_Chosen] = []
        for item in together:
            if taken and forwarded([_pass(trajectory, [*taken, item], packed)]) > limit:
                passes.append(_pass(trajectory, taken, packed))
                taken = []
            taken.append(item)
        passes.append(_pass(trajectory, taken, packed))
    return passes


def _connected(trajectory: Trajectory, chosen: Sequence[_Chosen]) -> list[list[_Chosen]]:
    """Segments that share a row belong together; the others can be scored apart at no cost."""
    parts: list[tuple[set[int], list[_Chosen]]] = []
    row_of = {
        (segment, row.branch): number
        for number, row in enumerate(rows_of(trajectory, 0, _wanted(chosen)))
        for segment in row.offsets
    }
    for item in chosen:
        rows = {row_of[item.segment, branch] for branch in _branches(item)}
        members = [item]
        for other in [part for part in parts if part[0] & rows]:
            rows |= other[0]
            members = [*other[1], *members]
            parts.remove(other)
        parts.append((rows, members))
    return [sorted(members, key=lambda item: item.segment) for _, members in parts]


def _wanted(chosen: Sequence[_Chosen]) -> list[tuple[int, str]]:
    return [(item.segment, branch) for item in chosen for branch in _branches(item)]


def _pass(trajectory: Trajectory, chosen: Sequence[_Chosen], packed: bool) -> Pass:
    rows = tuple(rows_of(trajectory, 0, _wanted(chosen)))
    return Pass(
        trajectory,
        tuple(item.segment for item in chosen),
        sum(map(len, rows)),
        frozenset({"decoder"}),
        sum(len(item.pick_N) for item in chosen),
        _Plan(rows, tuple(chosen)),
        () if packed else tuple(map(len, rows)),
    )


def plan(
    passes: Sequence[Pass], pad: int, entropy: bool, chunk: int, device: torch.device, packed: bool = False
) -> Replay:
    """One forward of all passes. Raises RecordError for a decision that has nothing before it."""
    rows: list[Row] = []
    row_of: dict[tuple[int, int, str], int] = {}
    chosen: list[tuple[int, _Chosen]] = []
    for number, one in enumerate(passes):
        planned: _Plan = one.plan
        for row in planned.rows:
            row_of.update({(number, segment, row.branch): len(rows) for segment in row.offsets})
            rows.append(row)
        chosen += [(number, item) for item in planned.chosen]
    lengths = [len(row) for row in rows]
    if packed:
        shape = (1, sum(lengths))
        # Rows of one length are neighbours, so that attention computes them together.
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        start_R = [0] * len(rows)
        for number, start in zip(order, accumulate((lengths[number] for number in order), initial=0), strict=False):
            start_R[number] = start
    else:
        shape = (len(rows), max(lengths, default=1))
        start_R = [number * shape[1] for number in range(len(rows))]
    ids_LT, position_LT = np.full(shape, pad, np.int64), np.zeros(shape, np.int64)
    for row, start in zip(rows, start_R, strict=True):
        ids_LT.reshape(-1)[start : start + len(row)] = row.ids_T
        position_LT.reshape(-1)[start : start + len(row)] = row.position_T

    def tensor(values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, dtype)

    lines = (tensor(ids_LT, torch.long), tensor(position_LT, torch.long), tuple(sorted(lengths)) if packed else None)
    if not chosen:
        none = torch.zeros(0, dtype=torch.long, device=device)
        return Replay(*lines, None, none, none, none, torch.zeros(0, device=device))

    branches = list(dict.fromkeys(branch for _, item in chosen for branch in (FULL, *_branches(item))))
    pieces = [
        _position(passes[number].trajectory, number, item, rows, row_of, start_R, branches) for number, item in chosen
    ]
    index_KN = np.concatenate([index for index, _ in pieces], 1)
    weight_KN = np.concatenate([weight for _, weight in pieces], 1)
    sets: dict[bytes, int] = {}
    ranges: list[np.ndarray] = []
    columns: list[list[np.ndarray]] = [[] for _ in range(5)]
    for number, item in chosen:
        segment = passes[number].trajectory.segments[item.segment]
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
    sizes = [len(item.pick_N) for _, item in chosen]
    return Replay(
        *lines,
        batch,
        tensor(np.repeat([number for number, _ in chosen], sizes), torch.long),
        tensor(np.repeat([item.segment for _, item in chosen], sizes), torch.long),
        tensor(kind, torch.long),
        tensor(behaviour, torch.float32),
    )


def _choose(trajectory: Trajectory, number: int) -> _Chosen | None:
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
    return _Chosen(number, pick_N, branch_weights(guidance), guided_N)


def _branches(item: _Chosen) -> list[str]:
    needed = [FULL] if not item.guided_N.all() else []
    return list(dict.fromkeys([*needed, *item.weights])) if item.guided_N.any() else [FULL]


def _position(
    trajectory: Trajectory,
    of: int,
    item: _Chosen,
    rows: list[Row],
    row_of: dict[tuple[int, int, str], int],
    start_R: Sequence[int],
    branches: list[str],
) -> tuple[np.ndarray, np.ndarray]:
    """index_KN into the flattened lines and weight_KN of one segment's decisions; unused branches weigh 0."""
    decisions = trajectory.segments[item.segment].decisions
    assert decisions is not None
    position_N = decisions.position_N[item.pick_N].astype(np.int64)
    index_KN = np.zeros((len(branches), len(position_N)), np.int64)
    weight_KN = np.zeros((len(branches), len(position_N)), np.float32)
    for branch in _branches(item):
        number = row_of[of, item.segment, branch]
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
        index_KN[position] = start_R[number] + np.maximum(before_N, 0)
        weight_KN[position] = weight_N
    return index_KN, weight_KN


def undecided(trajectory: Trajectory) -> Any:
    """A plan of all ids of a trajectory in one row, with nothing to score in it."""
    ids_T = np.concatenate([segment.ids for segment in trajectory.segments]).astype(np.int32)
    return _Plan((Row(0, FULL, ids_T, np.arange(len(ids_T), dtype=np.int32), {}),), ())
