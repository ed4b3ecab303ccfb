"""Padding that is learned, as the released code of Thinking with Generated Images (arXiv:2505.22525) does it: rows are
padded to the longest, padding has labels and goes on in the row's positions, and nothing attends to it.

Letters: R rows, T ids, N decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from policy.base import Pass
from policy.chameleon.model import DecisionBatch
from policy.chameleon.replay import Replay, plan, undecided
from record.trajectory import DecisionKind, Trajectory

NO_SEGMENT = -1  # Scored.segment_N of padding


class Scorer(Protocol):
    """Of the family's policy, what says whether `score` plans with padding."""

    learns_padding: bool


class LearnedPadding:
    """policy.extra_losses.ExtraLoss: while it is attached, `score` holds the padding's log-probs too, as words of the
    segment -1. It has no loss of its own."""

    name, weight, form = "padding", 1.0, "release"

    def __init__(self, policy: Scorer) -> None:
        self.policy = policy

    def attach(self) -> None:
        self.policy.learns_padding = True

    def detach(self) -> None:
        self.policy.learns_padding = False

    def loss(self, trajectories: Sequence[Trajectory]) -> Tensor | None:
        return None

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """There is nothing to take up."""


def plan_with_padding(
    passes: Sequence[Pass], pad: int, entropy: bool, chunk: int, device: torch.device
) -> tuple[Replay, Tensor]:
    """One row a pass: `replay.plan` with the padding of every row among the decisions, and the mask of what is seen,
    int64 [R, T]: 0 on padding. A pass without a plan is a whole trajectory, of which the padding alone is learned.

    Raises ValueError for a pass of several rows, of which padding would be learned more than once.
    """
    passes = [one if one.plan is not None else replace(one, plan=undecided(one.trajectory)) for one in passes]
    replay = plan(passes, pad, entropy, chunk, device)
    lengths = [len(row) for one in passes for row in one.plan.rows]
    if len(lengths) != len(passes):
        raise ValueError("padding is learned at the end of a trajectory's one row, and a pass here has several")
    length_R = torch.tensor(lengths, device=device)
    column_T = torch.arange(replay.ids_LT.shape[1], device=device)
    padding_RT = column_T >= length_R[:, None]
    row_N, at_N = padding_RT.nonzero(as_tuple=True)
    count = len(row_N)

    def more(values: Tensor, new: Tensor | float) -> Tensor:
        return torch.cat([values, torch.as_tensor(new, device=device).to(values.dtype).expand(count)])

    none = torch.zeros(0, dtype=torch.int64, device=device)
    batch = replay.batch or DecisionBatch(none[None], None, none, none.float(), none, (), entropy, chunk)
    position_LT = torch.where(padding_RT, column_T, replay.position_LT)
    learned = replace(
        batch,
        index_KN=more(batch.index_KN[0], row_N * len(column_T) + at_N - 1)[None],
        target_N=more(batch.target_N, float(pad)),
        temperature_N=more(batch.temperature_N, 1.0),
        allowed_N=more(batch.allowed_N, -1.0),
    )
    replay = replace(
        replay,
        position_LT=position_LT,
        batch=learned,
        pass_N=more(replay.pass_N, row_N),
        segment_N=more(replay.segment_N, float(NO_SEGMENT)),
        kind_N=more(replay.kind_N, float(DecisionKind.WORD)),
        behaviour_N=more(replay.behaviour_N, float("nan")),
    )
    return replay, (~padding_RT).long()
