"""The recorded denoising steps of one image, scored under new velocities. For the `score` of families that denoise.

Letters: F decisions of an image.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from policy.base import FlowScores
from policy.scoring.flow import replay, sampler_of
from record.trajectory import DecisionKind, RecordError, Segment


def recorded_steps(segment: Segment, device: torch.device) -> tuple[Tensor, Tensor]:
    """At which latents and times a policy's velocities are asked for: x_F [F, ...] and time_F, float32.

    Raises RecordError where the segment has denoising steps among its decisions and no record of them.
    """
    flow = segment.flow
    if flow is None:
        raise RecordError(f"segment '{segment.role}' has denoising steps among its decisions, but no record of them")
    step_F = _steps(segment)
    return torch.from_numpy(flow.x_N).to(device), torch.from_numpy(flow.time_M[step_F]).to(device)


def score_recorded(
    segment: Segment, velocity_F: Tensor, place: tuple[int, int], decision_F: Tensor
) -> tuple[Tensor, Tensor, FlowScores]:
    """The decisions' log-probs under the recorded sampler, their entropies (detached), and what else is known of them.

    Args:
        velocity_F: [F, ...], of the policy at `recorded_steps`, guided as recorded.
        place: pass and segment, and
        decision_F: the decisions' indices, as FlowScores has them.
    """
    flow = segment.flow
    assert flow is not None
    velocity_F = velocity_F.float()
    device, step_F = velocity_F.device, _steps(segment)
    x_F, x_next_F = (torch.from_numpy(x).to(device) for x in (flow.x_N, flow.x_next_N))
    time_F, next_F = (torch.from_numpy(flow.time_M[step]).to(device) for step in (step_F, step_F + 1))
    now = replay(sampler_of(flow.sampler), x_F, velocity_F, time_F, next_F, x_next_F)
    # Of one element, as the log-prob is a mean over them: 1/2 log(2 pi e q^2).
    entropy_F = 0.5 * torch.log(2 * torch.pi * torch.e * now.noise_std_B.detach().square())
    scores = FlowScores(place, decision_F, x_next_F, now.mean_B, velocity_F, now.noise_std_B, time_F - next_F)
    return now.log_prob_B, entropy_F, scores


def _steps(segment: Segment) -> np.ndarray:
    """int64 [F]: the number of each decision's step in the schedule."""
    decisions = segment.decisions
    assert decisions is not None
    return decisions.position_N[decisions.kind_N == DecisionKind.FLOW].astype(np.int64)
