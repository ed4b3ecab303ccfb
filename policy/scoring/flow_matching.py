"""The velocity loss of flow matching: what a family that denoises learns of an image that somebody drew.

With a clean latent x_0 and standard normal noise e, a rectified flow passes x_t = (1 - t) x_0 + t e at the time t, and
its velocity there is e - x_0 (Flow Matching, arXiv:2210.02747; Rectified Flow, arXiv:2209.03003). The loss is the mean
squared error of the policy's velocity at one drawn time an image.

Letters: B images; latents are [B, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from policy.extra_losses import FlowLossConfig
from record.trajectory import Author, Trajectory

Image = tuple[Trajectory, int]  # a trajectory and the number of its segment
VelocityOf = Callable[[Sequence[Image], Tensor, Tensor], Tensor]


def interpolate(clean_B: Tensor, noise_B: Tensor, time_B: Tensor) -> tuple[Tensor, Tensor]:
    """Latents at their times, from 0 (clean) to 1 (noise), and the velocity there; both [B, ...]."""
    time = time_B.reshape(-1, *[1] * (clean_B.ndim - 1))
    return (1 - time) * clean_B + time * noise_B, noise_B - clean_B


def draw_times(config: FlowLossConfig, count: int) -> Tensor:
    """Times in (0, 1), float32 [B], from torch's default generator on the CPU.

    `logit_normal` is SD3's (arXiv:2403.03206, equation 19), the shift that of its section 5.3.2.
    """
    if config.times == "uniform":
        time_B = torch.rand(count)
    else:
        time_B = torch.sigmoid(config.mean + config.std * torch.randn(count))
    return config.shift * time_B / (1 + (config.shift - 1) * time_B)


def drawn_latents(trajectories: Sequence[Trajectory]) -> list[Image]:
    """The images that are to be learned: drawn in the policy's place, trained, with their latent."""
    return [
        (trajectory, number)
        for trajectory in trajectories
        for number, segment in enumerate(trajectory.segments)
        if segment.trained and segment.author is Author.POLICY and segment.latent is not None
    ]


class FlowMatching:
    """policy.extra_losses.ExtraLoss, given what the family makes of latents at their times.

    Times and noise come from torch's generator, whose state a checkpoint holds, so a run that goes on draws what it
    would have drawn.

    Args:
        velocity_of: the velocities [B, ...] of images at x_B and time_B under their recorded contexts, with gradient.
        device: of the policy's weights.
    """

    name = "flow"

    def __init__(self, config: FlowLossConfig, velocity_of: VelocityOf, device: torch.device) -> None:
        self.config, self.velocity_of, self.device = config, velocity_of, device
        self.weight = config.weight
        self.form = config.times

    def attach(self) -> None:
        """It trains nothing of its own."""

    def detach(self) -> None:
        """It trained nothing of its own."""

    def loss(self, trajectories: Sequence[Trajectory]) -> Tensor | None:
        """The mean over images and their elements. None: nothing was drawn."""
        images = drawn_latents(trajectories)
        if not images:
            return None
        clean_B = torch.stack(
            [torch.from_numpy(trajectory.segments[number].latent).float() for trajectory, number in images]
        )
        time_B, noise_B = draw_times(self.config, len(images)), torch.randn(clean_B.shape)
        x_B, wanted_B = interpolate(clean_B, noise_B, time_B)
        found_B = self.velocity_of(images, x_B.to(self.device), time_B.to(self.device))
        return (found_B.float() - wanted_B.to(self.device)).square().mean()

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """There is nothing to take up."""
