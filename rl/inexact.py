"""Trajectories whose log-probs are another engine's than the scorer's: how far those are off, and what is made of it.

The trainer scores such trajectories anew before an update, so that ratios are of its own weights; a decision's loss is
then multiplied by the ratio of its own probability to the recorded one, truncated or masked (rl/losses.py). What is
measured here bears the names of TRL's GRPOTrainer.

Letters: N decisions of a forward, P its passes, K kinds of decisions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from policy.base import Scored
from record.trajectory import Trajectory
from rl.batches import MicroBatch
from rl.losses import LossSettings, importance_ratio
from runtime.errors import UserError


class SamplingGapError(UserError):
    """More lies between a writer's log-probs and the trainer's than another engine's rounding."""


def any_inexact(trajectories: Sequence[Trajectory]) -> bool:
    return any(not trajectory.exact for trajectory in trajectories)


def mean_gap_by_role(
    accelerator: Accelerator, scored: Sequence[tuple[Sequence[Trajectory], Scored]]
) -> dict[str, float]:
    """Mean |scorer's - recorded log-prob| over the decisions of a role, over all processes. Collective.

    Args:
        scored: this process's forwards, each with the trajectory of every pass. A pass that another process scores too
            counts once.
    """
    local: dict[tuple[str, int], tuple[str, float, int]] = {}
    for trajectories, one in scored:
        gap_N = (one.logprob_N - one.behaviour_N).detach().abs().double().nan_to_num(nan=float("inf")).cpu()
        number_N = torch.stack([one.pass_N, one.segment_N]).cpu()
        for place in number_N.unique(dim=1).T.tolist():
            trajectory, segment = trajectories[place[0]], place[1]
            mine_N = (number_N[0] == place[0]) & (number_N[1] == segment)
            role = trajectory.segments[segment].role
            local[trajectory.key, segment] = (role, float(gap_N[mine_N].sum()), int(mine_N.sum()))
    together: dict[tuple[str, int], tuple[str, float, int]] = {}
    for found in gather_object([local]):
        together |= found
    sums: dict[str, tuple[float, int]] = {}
    for role, total, count in together.values():
        before = sums.get(role, (0.0, 0))
        sums[role] = (before[0] + total, before[1] + count)
    return {role: total / count for role, (total, count) in sums.items()}


def checked_gap(gaps: dict[str, float], tolerance: float) -> float:
    """The largest of the roles' mean gaps. Raises SamplingGapError where it is over the tolerance."""
    role = max(gaps, key=lambda name: gaps[name], default="")
    if gaps and gaps[role] > tolerance:
        raise SamplingGapError(
            f"the writer's log-probs are off the trainer's by {gaps[role]:.3g} on average in the role '{role}', "
            f"over the tolerance of {tolerance:g} (grpo.sampling_tolerance): more than another engine's rounding. "
            "Look for sampling parameters, a context or weights that differ there"
        )
    return gaps.get(role, 0.0)


def sampling_metrics(
    accelerator: Accelerator,
    batches: Sequence[MicroBatch],
    old: Sequence[Scored | None],
    settings: LossSettings,
    kind_weight_K: Tensor,
) -> dict[str, float]:
    """What lies between the writer's log-probs and the trainer's, over the trained decisions of inexact trajectories
    of all processes. Collective. Empty where there are none.

    sampling/sampling_logp_difference/mean and /max are of |trainer's - writer's log-prob|;
    sampling/importance_sampling_ratio/min, /mean and /max of the factor on the loss, truncated or masked, and
    /truncated is the share of decisions at which it was. Without importance_sampling_cap there is no factor.
    """
    sums_4 = torch.zeros(4, dtype=torch.float64, device=accelerator.device)  # decisions, |difference|, ratio, truncated
    most_3 = torch.full((3,), -torch.inf, dtype=torch.float64, device=accelerator.device)  # |difference|, ratio, -ratio
    for batch, scored in zip(batches, old, strict=True):
        if scored is None:
            continue
        counts_N = _counted(batch, scored, kind_weight_K)
        if not counts_N.any():
            continue
        log_ratio_N = (scored.logprob_N - scored.behaviour_N).detach()
        difference_N = log_ratio_N.abs()[counts_N].double()
        sums_4[0] += len(difference_N)
        sums_4[1] += difference_N.sum()
        most_3[0] = torch.maximum(most_3[0], difference_N.max())
        if settings.importance_sampling_cap is None:
            continue
        trajectory_N = batch.trajectory_P.to(log_ratio_N.device)[scored.pass_N]
        ratio_N, cut_N = importance_ratio(log_ratio_N, trajectory_N, counts_N, settings)
        sums_4[2] += ratio_N[counts_N].double().sum()
        sums_4[3] += cut_N[counts_N].sum()
        most_3[1] = torch.maximum(most_3[1], ratio_N[counts_N].max().double())
        most_3[2] = torch.maximum(most_3[2], -ratio_N[counts_N].min().double())
    sums_4 = accelerator.reduce(sums_4, "sum")
    most_3 = accelerator.gather(most_3[None]).max(0).values
    count, difference, ratio, cut = sums_4.tolist()
    if not count:
        return {}
    metrics = {
        "sampling/sampling_logp_difference/mean": difference / count,
        "sampling/sampling_logp_difference/max": float(most_3[0]),
    }
    if settings.importance_sampling_cap is not None:
        metrics |= {
            "sampling/importance_sampling_ratio/min": -float(most_3[2]),
            "sampling/importance_sampling_ratio/mean": ratio / count,
            "sampling/importance_sampling_ratio/max": float(most_3[1]),
            "sampling/importance_sampling_ratio/truncated": cut / count,
        }
    return metrics


def _counted(batch: MicroBatch, scored: Scored, kind_weight_K: Tensor) -> Tensor:
    """bool [N]: decisions of inexact trajectories that count in the loss."""
    device = scored.logprob_N.device
    inexact_P = torch.tensor([not one.trajectory.exact for one in batch.passes], device=device)
    weight_N = batch.weight_PS.to(device)[scored.pass_N, scored.segment_N]
    return inexact_P[scored.pass_N] & (weight_N * kind_weight_K.to(device)[scored.kind_N] != 0)
