"""One image latent on its way from noise to time 0, and the record of its stochastic steps.

Velocities come from the policy; sampler, schedule, window and noise are the engine's, from the recipe. A stochastic
step is a decision (policy/scoring/flow.py: its Gaussian, its log-prob). Which steps are stochastic is known before the
first one, so an image's noise goes to the device once, and its latents come back once.

Letters: T steps of the schedule, N stochastic ones, P latents around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from policy.scoring.flow import Ode, step
from policy.scoring.schedule import Window, draw_window, sd3_times, uniform_times, window_draws
from record.trajectory import FlowSteps, Trajectory
from rollout.config import FlowConfig
from rollout.engine.sampling import gaussian, noise_key

FIRST_NOISE = 1 << 40  # index of a latent's first noise, apart from those of its steps
GROUP = -1  # in place of a member: noise that a group shares


class FlowPlan:
    """What a recipe makes of denoising: times, sampler, and which steps are decisions."""

    def __init__(self, config: FlowConfig):
        times = {"uniform": uniform_times, "sd3": sd3_times}[config.schedule]
        self.config = config
        self.time_T = times(config.steps, config.shift)
        self.sampler = config.build_sampler(float(self.time_T[1]) if config.steps > 1 else 0.5)
        self.noisy_T = self._noisy()
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def _noisy(self) -> np.ndarray:
        """bool [T]: the steps to which the sampler gives noise at all. A step whose deviation is 0 is no decision."""
        one = torch.zeros(len(self.time_T) - 1, 1)
        if isinstance(self.sampler, Ode):
            return np.zeros(len(one), bool)
        taken = step(self.sampler, one, one, self.time_T[:-1], self.time_T[1:], one)
        return (taken.noise_std_B > 0).numpy()

    @property
    def decides(self) -> bool:
        """Whether any group's images hold a decision: windows of all groups together cover their whole range."""
        steps = len(self.noisy_T)
        low, high = (0, steps - 1) if self.config.window is None else self.config.window_range or (0, steps)
        return bool(self.noisy_T[low:high].any())

    def stochastic(self, seed: int, group: int) -> np.ndarray:
        """bool [T]: a group's decisions. Its members share the window, so that they can be compared."""
        if not self.noisy_T.any():
            return self.noisy_T  # of which there may be one alone: it needs no window
        key = (seed, group)
        if key not in self._windows:
            steps, size = len(self.noisy_T), self.config.window
            bounds = self.config.window_range or (0, steps)
            window: Window = draw_window(steps, size, bounds, window_draws(seed, group))
            self._windows[key] = np.array(window.noised(steps)) & self.noisy_T
        return self._windows[key]


@dataclass
class Denoising:
    """A latent before step `number`. The lists hold tensors on the device until the image is done."""

    plan: FlowPlan
    x: Tensor  # float32
    stochastic_T: np.ndarray  # bool
    noise_N: Tensor  # float32 [N, ...]
    number: int = 0
    taken: int = 0  # stochastic steps
    points: list[Tensor] = field(default_factory=list)
    point: list[int] = field(default_factory=list)  # index into `points` of where each decision started
    logprob: list[Tensor] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.stochastic_T) - self.number

    @property
    def position_N(self) -> np.ndarray:
        return np.flatnonzero(self.stochastic_T).astype(np.int32)

    def fetch(self) -> tuple[np.ndarray, np.ndarray, FlowSteps]:
        """The latent, the decisions' log-probs [N] and their record, in one copy from the device."""
        parts = [self.x, *self.points, *self.logprob]
        flat = torch.cat([part.reshape(-1).float() for part in parts]).cpu().numpy()
        shape, size, count = tuple(self.x.shape), self.x.numel(), len(self.points)
        latents = flat[: (1 + count) * size].reshape(1 + count, *shape)
        record = FlowSteps(
            self.plan.sampler.as_json(), self.plan.time_T.numpy(), np.array(self.point, np.int32), latents[1:]
        )
        return latents[0], flat[(1 + count) * size :], record


def begin(
    plan: FlowPlan, trajectory: Trajectory, image: int, decision: int, shape: Sequence[int], device: torch.device
) -> Denoising:
    """Pure noise, and the noise of the steps: functions of (seed, group, member) and of the decisions taken so far.

    With shared noise a group's images of the same number begin alike.
    """
    seed, group = trajectory.seed, trajectory.group
    own = noise_key(seed, group, trajectory.member)
    if plan.config.initial_noise == "shared":
        first = gaussian(noise_key(seed, group, GROUP), FIRST_NOISE + image, shape)
    else:
        first = gaussian(own, FIRST_NOISE + decision, shape)
    stochastic_T = plan.stochastic(seed, group)
    noise_N = step_noise(own, decision, int(stochastic_T.sum()), shape)
    return Denoising(plan, first.to(device), stochastic_T, noise_N.to(device))


def step_noise(key: int, decision: int, count: int, shape: Sequence[int]) -> Tensor:
    """The noise of `count` stochastic steps, of which the first is the trajectory's decision number `decision`."""
    if not count:
        return torch.empty(0, *shape)
    return torch.stack([gaussian(key, decision + n, shape) for n in range(count)])


def inputs(flows: Sequence[Denoising], device: torch.device) -> tuple[Tensor, Tensor]:
    """x_B and time_B of latents that may be at different steps, and of different plans."""
    time_B = torch.stack([flow.plan.time_T[flow.number] for flow in flows])
    return torch.stack([flow.x for flow in flows]), time_B.to(device)


def advance(flows: Sequence[Denoising], x_B: Tensor, velocity_B: Tensor) -> None:
    """Take one step of every latent, without waiting for the device."""
    plans = {id(flow.plan): flow.plan for flow in flows}
    for plan in plans.values():
        mine = [b for b, flow in enumerate(flows) if flow.plan is plan]
        every = len(mine) == len(flows)
        _advance(
            plan,
            flows if every else [flows[b] for b in mine],
            x_B if every else x_B[mine],
            velocity_B if every else velocity_B[mine],
        )


def _advance(plan: FlowPlan, flows: Sequence[Denoising], x_B: Tensor, velocity_B: Tensor) -> None:
    at = np.array([flow.number for flow in flows])
    stochastic_B = np.array([flow.stochastic_T[flow.number] for flow in flows])
    noise_B = torch.zeros_like(x_B)
    for b, flow in enumerate(flows):
        if stochastic_B[b]:
            noise_B[b] = flow.noise_N[flow.taken]
    taken = step(
        plan.sampler,
        x_B,
        velocity_B,
        plan.time_T[at].to(x_B.device),
        plan.time_T[at + 1].to(x_B.device),
        noise_B,
        stochastic_B=torch.from_numpy(stochastic_B).to(x_B.device),
    )
    for b, flow in enumerate(flows):
        if stochastic_B[b]:
            # Neighbouring decisions share a latent: where one led is where the next one starts.
            if not flow.point or flow.points[-1] is not flow.x:
                flow.points.append(flow.x)
            flow.point.append(len(flow.points) - 1)
            flow.x = taken.x_next_B[b]
            flow.points.append(flow.x)
            flow.logprob.append(taken.log_prob_B[b])
            flow.taken += 1
        else:
            flow.x = taken.x_next_B[b]
        flow.number += 1


def behaviour_mean(trajectory: Trajectory, segment: int, noise_std_N: Tensor) -> Tensor:
    """The means of the policy that sampled an image's decisions, [N, ...]: where each led, less its noise.

    They are not recorded: `noise_std_N` is the sampler's, and the noise a function of the trajectory's key.
    """
    image = trajectory.segments[segment]
    flow = image.flow
    assert flow is not None and image.decisions is not None
    before = sum(len(s.decisions) for s in trajectory.segments[:segment] if s.decisions is not None)
    words = len(image.decisions) - len(flow.point_N)
    key = noise_key(trajectory.seed, trajectory.group, trajectory.member)
    noise_N = step_noise(key, before + words, len(flow.point_N), flow.x_P.shape[1:]).to(noise_std_N.device)
    x_next_N = torch.from_numpy(flow.x_next_N).to(noise_std_N.device)
    return x_next_N - noise_std_N.reshape(-1, *[1] * (x_next_N.ndim - 1)) * noise_N
