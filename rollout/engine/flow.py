"""One image latent on its way from noise to time 0, step by step, and the record of its stochastic steps.

A step with sigma > 0 is a decision: x_next = mean + sigma * noise, its log-prob the Gaussian's averaged over elements
(Flow-GRPO, arXiv:2505.05470, section 4), so that ratios of large latents stay near 1. A step with sigma 0 is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from record.trajectory import FlowSteps
from rollout.engine.sampling import gaussian

FIRST_NOISE = 1 << 40  # index of a latent's first noise, apart from those of its steps


@runtime_checkable
class FlowPolicy(Protocol):
    """What a policy whose images are denoised offers besides policy/base.py."""

    flow_times: Sequence[float]  # from 1 (noise) down to 0: one more than there are steps
    latent_shape: tuple[int, ...]


@dataclass
class Denoising:
    """A latent at `step`. The lists grow by one a stochastic step."""

    x: Tensor  # float32
    step: int = 0
    position: list[int] = field(default_factory=list)
    time: list[float] = field(default_factory=list)
    time_next: list[float] = field(default_factory=list)
    x_before: list[np.ndarray] = field(default_factory=list)
    x_after: list[np.ndarray] = field(default_factory=list)
    mean: list[np.ndarray] = field(default_factory=list)
    sigma: list[float] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)

    def latent(self) -> np.ndarray:
        return self.x.cpu().numpy().astype(np.float32)

    def steps(self) -> FlowSteps:
        def array(many: list[np.ndarray]) -> np.ndarray:
            return np.stack(many).astype(np.float32) if many else np.empty((0, *self.x.shape), np.float32)

        return FlowSteps(
            np.array(self.time, np.float32),
            np.array(self.time_next, np.float32),
            array(self.x_before),
            array(self.x_after),
            array(self.mean),
            np.array(self.sigma, np.float32),
        )


def begin(key: int, decision: int, shape: Sequence[int], device: torch.device) -> Denoising:
    """Pure noise, a function of the trajectory's key and of how many decisions it has taken."""
    return Denoising(gaussian(key, FIRST_NOISE + decision, shape).to(device))


def stack(flows: Sequence[Denoising], times: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x_B, time_B and time_next_B of latents that may be at different steps."""
    return (
        torch.stack([flow.x for flow in flows]),
        torch.tensor([times[flow.step] for flow in flows], dtype=torch.float32, device=device),
        torch.tensor([times[flow.step + 1] for flow in flows], dtype=torch.float32, device=device),
    )


def advance(flow: Denoising, mean: Tensor, sigma: float, times: Sequence[float], key: int, decision: int) -> bool:
    """Take the step from the policy's mean and sigma. True: it was stochastic, a decision."""
    before, mean = flow.x, mean.float()
    stochastic = sigma > 0
    flow.x = mean
    if stochastic:
        noise = gaussian(key, decision, before.shape).to(before.device)
        flow.x = mean + sigma * noise
        off = ((flow.x - mean) / sigma).square().mean()
        flow.logprob.append(float(-0.5 * off) - math.log(sigma) - 0.5 * math.log(2 * math.pi))
        flow.position.append(flow.step)
        flow.time.append(float(times[flow.step]))
        flow.time_next.append(float(times[flow.step + 1]))
        flow.x_before.append(before.cpu().numpy())
        flow.x_after.append(flow.x.cpu().numpy())
        flow.mean.append(mean.cpu().numpy())
        flow.sigma.append(sigma)
    flow.step += 1
    return stochastic
