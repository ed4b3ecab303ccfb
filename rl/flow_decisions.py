"""Denoising steps on their way into the loss: their ratios, divergences and weights, from what the policy scored.

A policy scores a step by its log-prob. What else such a step has (flow_losses.py) needs its mean: `Scored.flows` has
those of the present weights, of `old` and of the reference. The means of the weights that sampled are where each step
led less its noise, which is a function of the trajectory's key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from policy.base import FlowScores, Pass, Scored
from record.trajectory import DecisionKind
from rl.config import FlowLossConfig
from rl.flow_losses import guard_log_ratio, guard_weight, mean_kl, step_log_ratio, velocity_mse
from rl.losses import ScoredDecisions
from rollout.engine.flow import behaviour_mean
from runtime.errors import UserError


def with_flow_terms(
    decisions: ScoredDecisions,
    scored: Scored,
    old: Scored | None,
    reference: Scored | None,
    passes: Sequence[Pass],
    config: FlowLossConfig,
) -> ScoredDecisions:
    """`decisions` with the log-ratios, divergences and weights of denoising steps as `config` says; other kinds as they
    were.

    Args:
        old: what ratios are to; None: the weights that sampled.
        reference: what divergences are from; None: there are none.
        passes: those that were scored.

    Raises:
        UserError: the policy gave no means, and the ratio or the divergence needs them.
    """
    given = sum(len(flow.decision_F) for flow in scored.flows)
    steps = int((decisions.kind_N == DecisionKind.FLOW).sum())
    if given < steps and (config.ratio == "guard" or decisions.divergence_N is not None):
        raise UserError(
            f"the policy scored {steps} denoising steps and gave the means of {given} (Scored.flows), which "
            "grpo.flow.ratio guard and grpo.beta need; a family makes them with policy/scoring/steps.py"
        )
    if not scored.flows:
        return decisions
    olds = _by_place(old)
    references = _by_place(reference)
    log_ratio_N, weight_N = decisions.log_ratio_N.clone(), decisions.weight_N.clone()
    divergence_N = None if decisions.divergence_N is None else decisions.divergence_N.clone()
    for alike in _of_one_shape(scored.flows):
        at_F = _cat([flow.decision_F for flow in alike])
        mean_F, noise_std_F, step_size_F = (
            _cat([getattr(flow, name) for flow in alike]) for name in ("mean_F", "noise_std_F", "step_size_F")
        )
        old_mean_F = _cat(
            [
                behaviour_mean(passes[flow.place[0]].trajectory, flow.place[1], flow.noise_std_F.detach())
                if old is None
                else olds[flow.place].mean_F
                for flow in alike
            ]
        ).float()
        exact_F = step_log_ratio(_cat([flow.x_next_F for flow in alike]), mean_F, old_mean_F, noise_std_F)
        # A release's log-prob is not that of its Gaussian, so only their difference is its ratio.
        released_F = torch.tensor(
            [_released(passes, flow) for flow in alike for _ in range(len(flow.decision_F))], device=exact_F.device
        )
        plain_F = decisions.log_ratio_N[at_F]
        log_ratio_F = torch.where(released_F | (config.variant == "release"), plain_F, exact_F)
        if config.ratio == "guard":
            log_ratio_F = guard_log_ratio(log_ratio_F, mean_F, old_mean_F, noise_std_F, step_size_F, config.variant)
            weight_N[at_F] = guard_weight(weight_N[at_F], step_size_F.to(weight_N.dtype), config.variant)
        log_ratio_N = log_ratio_N.index_copy(0, at_F, log_ratio_F)
        if divergence_N is not None:
            theirs = [references[flow.place] for flow in alike]
            if config.anchor == "velocity_mse":
                divergence_F = velocity_mse(
                    _cat([flow.velocity_F for flow in alike]), _cat([flow.velocity_F for flow in theirs])
                )
            else:
                kl_variant = "release" if config.variant == "release" else "repaired"
                reference_F = _cat([flow.mean_F for flow in theirs])
                divergence_F = mean_kl(mean_F, reference_F, noise_std_F, step_size_F, kl_variant)
            divergence_N = divergence_N.index_copy(0, at_F, divergence_F)
    return replace(decisions, log_ratio_N=log_ratio_N, weight_N=weight_N, divergence_N=divergence_N)


def _by_place(scored: Scored | None) -> dict[tuple[int, int], FlowScores]:
    return {} if scored is None else {flow.place: flow for flow in scored.flows}


def _of_one_shape(flows: Sequence[FlowScores]) -> list[list[FlowScores]]:
    found: dict[torch.Size, list[FlowScores]] = {}
    for flow in flows:
        found.setdefault(flow.mean_F.shape[1:], []).append(flow)
    return list(found.values())


def _released(passes: Sequence[Pass], flow: FlowScores) -> bool:
    recorded = passes[flow.place[0]].trajectory.segments[flow.place[1]].flow
    return recorded is not None and recorded.sampler.get("variant") == "release"


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors))
