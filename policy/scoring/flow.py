"""One denoising step of a rectified flow: taken with given noise, or replayed for the log-prob of where it led.

A latent at time sigma is x = (1 - sigma) clean + sigma noise, sigma falling from 1 to 0; the velocity estimates
noise - clean, so clean = x - sigma v and noise = x + (1 - sigma) v. With s = sigma, s' = sigma_next and d = s' - s < 0
a stochastic step is x' = mean + std z, z standard normal: a decision, whose log-prob is that of the Gaussian,
averaged over a row's elements (Flow-GRPO, arXiv:2505.05470), so that ratios of large latents stay near 1. A step
of std 0 is no decision and has no density: its log-prob is NaN, and no gradient flows from it.

All is float32, on the tensors' own device, without host synchronisation; rows may be at different times, and some
of them (`stochastic_B`) outside their window.

Letters: B rows; x_B is [B, ...], as are velocities, means and noise; sigma_B is [B] or one time for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from policy.scoring.dpm import History, Updates, clean_updates, noise_updates, noise_updates_release
from policy.scoring.variants import is_release
from runtime.errors import UserError, nearest


class Transition(NamedTuple):
    """What one step is, for rows [B, ...]."""

    x_next_B: Tensor
    mean_B: Tensor  # carries the gradient of the velocity
    noise_std_B: Tensor  # [B], the whole deviation, step size included; 0: a deterministic step, which is no decision
    log_prob_B: Tensor  # [B], carries the gradient of the velocity; NaN where the step is no decision


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """What every sampler has. It is stored beside the decisions (`as_json`) and replayed from there (`sampler_of`).

    Raises UserError, from the constructor, for a value that no step can be taken with.
    """

    constants: bool = True  # keep -log std - log(2 pi) / 2 in the log-prob; without them ratios are the same
    variant: str = "repaired"  # "release": as the authors' code has it, faults included; each sampler names its own

    name: ClassVar[str] = ""
    noiseless_mean_is_ode: ClassVar[bool] = False  # release: the mean that a step outside the window is scored by

    def __post_init__(self) -> None:
        is_release(self.variant)
        if not isinstance(self.constants, bool):
            raise UserError(f"sampler '{self.name}': constants is {self.constants!r}; it is true or false")

    @property
    def release(self) -> bool:
        return is_release(self.variant)

    def updates(self, x_B: Tensor, velocity_B: Tensor, sigma_B: Tensor, next_B: Tensor) -> Updates:
        """The deterministic step and the stochastic one's Gaussian; times are columns [B, 1, ...]."""
        raise NotImplementedError

    def log_prob(self, x_next_B: Tensor, mean_B: Tensor, noise_std_B: Tensor) -> Tensor:
        """The Gaussian's log density, averaged over a row's elements; NaN where the deviation is 0."""
        is_decision_B = noise_std_B > 0
        std_B = torch.where(is_decision_B, noise_std_B, 1.0)
        log_prob_B = row_mean(-0.5 * ((x_next_B - mean_B) / _column(std_B, mean_B)).square())
        if self.constants:
            log_prob_B = log_prob_B - torch.log(std_B) - 0.5 * math.log(2 * math.pi)
        return torch.where(is_decision_B, log_prob_B, torch.nan)

    def as_json(self) -> dict[str, Any]:
        return {"sampler": self.name, **asdict(self)}

    def _check_noise_level(self, noise_level: float, most: float = math.inf) -> None:
        if not _is_number(noise_level) or not (0 <= noise_level <= most and math.isfinite(noise_level)):
            limit = "not negative" if most == math.inf else f"between 0 and {most:g}"
            raise UserError(f"sampler '{self.name}': noise_level is {noise_level!r}; it is a finite number {limit}")


@dataclass(frozen=True, kw_only=True)
class Ode(Sampler):
    """Euler's step of the probability flow, x' = x + v d. It is never a decision."""

    name: ClassVar[str] = "ode"

    def updates(self, x_B: Tensor, velocity_B: Tensor, sigma_B: Tensor, next_B: Tensor) -> Updates:
        euler_B = x_B + velocity_B * (next_B - sigma_B)
        return Updates(euler_B, euler_B, torch.zeros_like(sigma_B))


@dataclass(frozen=True, kw_only=True)
class Sde(Sampler):
    """Flow-GRPO's step (arXiv:2505.05470, section 4), with c = noise_level sqrt(s / (1 - s)):

        mean = x + (v + c^2 / (2 s) (x + (1 - s) v)) d        std = c sqrt(-d)

    At s = 1 `sigma_at_one` stands for s in c, which has no bound there; the releases take the schedule's second time.
    Release: MixGRPO (arXiv:2507.21802) scores a step outside the window, an Euler step, by this Gaussian, of which
    it is no sample; BAGEL's form in flow_grpo is `constants=False` with all tokens of an image as one row.
    """

    sigma_at_one: float
    noise_level: float = 0.7

    name: ClassVar[str] = "sde"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_noise_level(self.noise_level)
        if not _is_number(self.sigma_at_one) or not 0 < self.sigma_at_one < 1:
            raise UserError(
                f"sampler 'sde': sigma_at_one is {self.sigma_at_one!r}; it is above 0 and below 1, "
                "as a rule the schedule's second time"
            )

    def updates(self, x_B: Tensor, velocity_B: Tensor, sigma_B: Tensor, next_B: Tensor) -> Updates:
        step_B = next_B - sigma_B
        # c^2 / s, which needs no division by s
        rate_B = self.noise_level**2 / (1 - torch.where(sigma_B >= 1, self.sigma_at_one, sigma_B))
        noise_B = x_B + (1 - sigma_B) * velocity_B
        euler_B = x_B + velocity_B * step_B
        return Updates(euler_B, euler_B + 0.5 * rate_B * noise_B * step_B, torch.sqrt(-rate_B * sigma_B * step_B))


@dataclass(frozen=True, kw_only=True)
class Cps(Sampler):
    """Coefficients-preserving sampling (Flow-CPS, arXiv:2509.05952), with a = noise_level pi / 2:

        mean = (1 - s') clean + s' cos(a) noise               std = s' sin(a)

    The coefficients keep their sum of squares, so the latent has the noise that its time says. Beyond a noise level of
    1 the sine falls again, which is refused. Release: the log-prob is -(x' - mean)^2, not divided by the variance, so
    ratios are those of another deviation (1 / sqrt 2); a step without noise counts as a decision; any noise level.
    """

    noise_level: float = 0.7

    name: ClassVar[str] = "cps"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_noise_level(self.noise_level, most=math.inf if self.release else 1.0)

    def updates(self, x_B: Tensor, velocity_B: Tensor, sigma_B: Tensor, next_B: Tensor) -> Updates:
        angle = self.noise_level * math.pi / 2
        clean_B, noise_B = clean_estimate(x_B, velocity_B, sigma_B), noise_estimate(x_B, velocity_B, sigma_B)
        mean_B = (1 - next_B) * clean_B + next_B * abs(math.cos(angle)) * noise_B
        return Updates(x_B + velocity_B * (next_B - sigma_B), mean_B, next_B * abs(math.sin(angle)))

    def log_prob(self, x_next_B: Tensor, mean_B: Tensor, noise_std_B: Tensor) -> Tensor:
        if self.release:
            return row_mean(-(x_next_B - mean_B).square())
        return super().log_prob(x_next_B, mean_B, noise_std_B)


@dataclass(frozen=True, kw_only=True)
class Dance(Sampler):
    """DanceGRPO's step (arXiv:2505.07818, the reverse SDE of rectified flows), with e = noise_level:

        mean = x + (v - e^2 / 2 score) d                      std = e sqrt(-d)
        score = -(x - (1 - s) clean) / s^2 = -noise / s

    Release: MixGRPO gives a step outside the window, which has no noise, the log-prob of the mean of one that has;
    it also loses the constants (a statement of their own), which is `constants=False`.
    """

    noise_level: float = 0.3

    name: ClassVar[str] = "dance"
    noiseless_mean_is_ode: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_noise_level(self.noise_level)

    def updates(self, x_B: Tensor, velocity_B: Tensor, sigma_B: Tensor, next_B: Tensor) -> Updates:
        step_B = next_B - sigma_B
        euler_B = x_B + velocity_B * step_B
        score_B = -noise_estimate(x_B, velocity_B, sigma_B) / sigma_B
        drift_B = -0.5 * self.noise_level**2 * score_B * step_B
        return Updates(euler_B, euler_B + drift_B, self.noise_level * torch.sqrt(-step_B))


@dataclass(frozen=True, kw_only=True)
class Dpm(Sampler):
    """Multistep DPM-Solver steps, as MixGRPO (arXiv:2507.21802) takes them; policy/scoring/dpm.py has the formulas.

    `order` is the highest; each row's own stands in the History, whose earlier estimates are conditions: they are
    recorded and replayed as constants. Release: third-order coefficients that do not converge at third order;
    dpmsolver fed with the clean latent in place of the noise; a deterministic step scored by the stochastic mean.
    """

    algorithm: str = "dpmsolver++"
    order: int = 2
    solver: str = "midpoint"

    name: ClassVar[str] = "dpm"
    ALGORITHMS: ClassVar[tuple[str, ...]] = ("dpmsolver++", "dpmsolver")
    SOLVERS: ClassVar[tuple[str, ...]] = ("midpoint", "heun")

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value, known in (
            ("algorithm", self.algorithm, self.ALGORITHMS),
            ("solver", self.solver, self.SOLVERS),
        ):
            if value not in known:
                raise UserError(f"sampler 'dpm': no {key} '{value}'; {nearest(str(value), known)}")
        if self.order not in (1, 2, 3) or isinstance(self.order, bool):
            raise UserError(f"sampler 'dpm': order is {self.order}; it is 1, 2 or 3")

    def estimate(self, x_B: Tensor, velocity_B: Tensor, sigma_B: Tensor) -> Tensor:
        """What later steps read of this one, float32 [B, ...]: the clean latent, or for dpmsolver the noise."""
        x_B, velocity_B, sigma_B = x_B.float(), velocity_B.float(), _column(sigma_B.float(), x_B)
        if self.algorithm == "dpmsolver" and not self.release:
            return noise_estimate(x_B, velocity_B, sigma_B)
        return clean_estimate(x_B, velocity_B, sigma_B)

    def updates(
        self, x_B: Tensor, velocity_B: Tensor, sigma_B: Tensor, next_B: Tensor, history: History | None = None
    ) -> Updates:
        clean_B, heun = clean_estimate(x_B, velocity_B, sigma_B), self.solver == "heun"
        if self.algorithm == "dpmsolver++":
            return clean_updates(x_B, clean_B, sigma_B, next_B, history, heun, self.release)
        if not self.release:
            noise_B = noise_estimate(x_B, velocity_B, sigma_B)
            return noise_updates(clean_B, noise_B, sigma_B, next_B, history, heun)
        # The one look at a tensor's values in this file: the released code stops here.
        if history is not None and bool((history.order_B >= 3).any()):
            raise UserError("sampler 'dpm': the release's dpmsolver has no third-order step; order is 1 or 2")
        return noise_updates_release(x_B, clean_B, sigma_B, next_B, history, heun)


SAMPLERS: dict[str, type[Sampler]] = {kind.name: kind for kind in (Sde, Cps, Dance, Dpm, Ode)}


def sampler_of(data: Mapping[str, Any]) -> Sampler:
    """The sampler that `as_json` described. Raises UserError that names an unknown or missing key, or a wrong value."""
    name = data.get("sampler")
    if not isinstance(name, str) or name not in SAMPLERS:
        raise UserError(f"no sampler '{name}'; {nearest(str(name), SAMPLERS)}")
    kind, values = SAMPLERS[name], {key: value for key, value in data.items() if key != "sampler"}
    known = {field.name for field in fields(kind)}
    for key in values:
        if key not in known:
            raise UserError(f"sampler '{name}': no key '{key}'; {nearest(key, known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"sampler '{name}': {error}; its keys are {', '.join(sorted(known))}") from error


def clean_estimate(x_B: Tensor, velocity_B: Tensor, sigma_B: Tensor) -> Tensor:
    """x - s v, the clean latent that the velocity points from; `sigma_B` is a column [B, 1, ...]."""
    return x_B - sigma_B * velocity_B


def noise_estimate(x_B: Tensor, velocity_B: Tensor, sigma_B: Tensor) -> Tensor:
    """x + (1 - s) v, the noise that the velocity points to; `sigma_B` is a column [B, 1, ...]."""
    return x_B + (1 - sigma_B) * velocity_B


def step(
    sampler: Sampler,
    x_B: Tensor,
    velocity_B: Tensor,
    sigma_B: Tensor,
    sigma_next_B: Tensor,
    noise_B: Tensor | None = None,
    *,
    stochastic_B: Tensor | None = None,
    history: History | None = None,
) -> Transition:
    """Take one step of every row.

    Args:
        noise_B: standard normal [B, ...]; None: every row's step is deterministic.
        stochastic_B: bool [B], the rows that are in their window; None: all.
        history: read by Dpm alone; None: its steps are of first order.

    Raises ValueError where shapes differ.
    """
    return _transition(sampler, x_B, velocity_B, sigma_B, sigma_next_B, noise_B, None, stochastic_B, history)


def replay(
    sampler: Sampler,
    x_B: Tensor,
    velocity_B: Tensor,
    sigma_B: Tensor,
    sigma_next_B: Tensor,
    x_next_B: Tensor,
    *,
    stochastic_B: Tensor | None = None,
    history: History | None = None,
) -> Transition:
    """Score where each row's step led. Arguments are those of `step`, with x_next_B [B, ...] in place of the noise;
    mean, deviation and log-prob are what `step` gave for the same velocity. Raises ValueError where shapes differ."""
    return _transition(sampler, x_B, velocity_B, sigma_B, sigma_next_B, None, x_next_B, stochastic_B, history)


def _transition(
    sampler: Sampler,
    x_B: Tensor,
    velocity_B: Tensor,
    sigma_B: Tensor,
    sigma_next_B: Tensor,
    noise_B: Tensor | None,
    x_next_B: Tensor | None,
    stochastic_B: Tensor | None,
    history: History | None,
) -> Transition:
    for what, tensor in (("velocity", velocity_B), ("noise", noise_B), ("x_next", x_next_B)):
        if tensor is not None and tensor.shape != x_B.shape:
            raise ValueError(f"{what} is {list(tensor.shape)}, but x is {list(x_B.shape)}")
    x_B, velocity_B = x_B.float(), velocity_B.float()
    times = (_column(sigma_B.float(), x_B), _column(sigma_next_B.float(), x_B))
    if isinstance(sampler, Dpm):
        updates = sampler.updates(x_B, velocity_B, *times, history)
    else:
        updates = sampler.updates(x_B, velocity_B, *times)
    ode_B, mean_B, std_B = updates.ode_B, updates.mean_B, updates.noise_std_B

    stochastic_column_B = std_B > 0
    if noise_B is None and x_next_B is None:
        stochastic_column_B = torch.zeros_like(stochastic_column_B)
    elif stochastic_B is not None:
        stochastic_column_B = stochastic_column_B & _column(stochastic_B, x_B)
    if x_next_B is not None:
        reached_B = x_next_B.float()
    elif noise_B is None:
        reached_B = ode_B
    else:
        reached_B = torch.where(stochastic_column_B, mean_B + std_B * noise_B.float(), ode_B)

    if sampler.release:
        if sampler.noiseless_mean_is_ode:
            mean_B = torch.where(stochastic_column_B, mean_B, ode_B)
    else:
        mean_B = torch.where(stochastic_column_B, mean_B, ode_B)
        std_B = torch.where(stochastic_column_B, std_B, 0.0)
    noise_std_B = std_B.reshape(len(x_B))
    log_prob_B = sampler.log_prob(reached_B.detach(), mean_B, noise_std_B)
    return Transition(reached_B, mean_B, noise_std_B, log_prob_B)


def _column(value_B: Tensor, x_B: Tensor) -> Tensor:
    """[B], or one value for all rows, as [B, 1, ...] on x's device. Raises ValueError for another number of rows."""
    rows = len(x_B)
    if value_B.numel() not in (1, rows):
        raise ValueError(f"{value_B.numel()} times or marks for {rows} rows")
    return value_B.to(x_B.device).reshape(-1).expand(rows).reshape(rows, *[1] * (x_B.ndim - 1))


def row_mean(value_B: Tensor) -> Tensor:
    """The mean over each row's elements, [B]."""
    return value_B.reshape(len(value_B), -1).mean(-1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
