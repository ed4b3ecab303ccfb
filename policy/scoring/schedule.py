"""When a flow policy denoises, and which of its steps are stochastic and trained.

A schedule of n steps is n + 1 times, float32, from 1 (noise) down to 0. A window is the half-open range of steps that
get noise and are decisions; all others are steps of the ODE. Windows are drawn from a generator that the caller seeds,
so that every process, and a run that is resumed, draws the same ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from policy.scoring.variants import is_release
from runtime.errors import UserError, nearest

Bounds = Sequence[int]  # [low, high]: a window begins at low or later and ends at high or earlier
STRATEGIES = ("progressive", "random", "decay", "exp_decay")
SD3_TRAINING_STEPS = 1000


class Draws(Protocol):
    """random.Random, as far as windows need it."""

    def randint(self, a: int, b: int) -> int:
        """A whole number between both, both included."""
        ...


# ---- times ----


def shift_times(time: Tensor, shift: float) -> Tensor:
    """shift t / (1 + (shift - 1) t): more of the steps at high noise (SD3, arXiv:2403.03206)."""
    return shift * time / (1 + (shift - 1) * time)


def uniform_times(steps: int, shift: float = 1.0) -> Tensor:
    """Equal steps, shifted: BAGEL's schedule (which counts points, one more than steps) and MixGRPO's. [steps + 1].

    Raises UserError where there is no step, or the shift is not above 0.
    """
    _check_schedule(steps, shift)
    times = shift_times(torch.linspace(1, 0, steps + 1), shift)
    times[0] = 1  # which a shift below 1 may miss by its last bit; steps ask whether a time is 1
    return times


def sd3_times(steps: int, shift: float = 3.0) -> Tensor:
    """Diffusers' schedule for SD3 and SD3.5: n points from 1 down to the lowest training time, shifted, then 0.

    The lowest training time, 0.001, is itself shifted before the points are spread and again with them. [steps + 1].
    Raises UserError as uniform_times does.
    """
    _check_schedule(steps, shift)
    lowest = shift_times(torch.tensor(1 / SD3_TRAINING_STEPS, dtype=torch.float64), shift).item()
    points = shift_times(torch.linspace(1, lowest, steps, dtype=torch.float64), shift)
    times = torch.cat([points, points.new_zeros(1)]).float()
    times[0] = 1
    return times


def compressed_times(
    steps: int, shift: float, last_stochastic: int | None, ratio: float, variant: str = "repaired"
) -> Tensor:
    """uniform_times with fewer points after the window, for a solver of higher order (MixGRPO-Flash,
    arXiv:2507.21802): of the points after step `last_stochastic` the share `ratio` is kept, spread equally.

    Release: at least one point is kept, and where it is one the schedule ends at that time and never comes to 0, so
    that the image keeps its noise. Raises UserError where no step is stochastic, or the ratio is not in (0, 1].
    """
    _check_schedule(steps, shift)
    if last_stochastic is None or not 0 <= last_stochastic < steps:
        raise UserError(f"no schedule can be shortened after step {last_stochastic} of {steps}: no step is stochastic")
    if not 0 < ratio <= 1:
        raise UserError(f"the share of points after the window is {ratio}; it is above 0 and at most 1")
    remaining = steps - last_stochastic
    least = 1 if is_release(variant) else min(2, remaining)
    kept = max(int(remaining * ratio), least)
    first = torch.linspace(1, 0, steps + 1)[last_stochastic + 1].item()
    tail = shift_times(torch.linspace(first, 0, kept), shift)
    return torch.cat([uniform_times(steps, shift)[: last_stochastic + 1], tail])


def model_times(times: Tensor, variant: str = "repaired") -> Tensor:
    """The times that the model is told. Release: MixGRPO cuts them off to thousandths, below the latent's own."""
    return (times * 1000).trunc() / 1000 if is_release(variant) else times


def _check_schedule(steps: int, shift: float) -> None:
    if steps < 1:
        raise UserError(f"a schedule of {steps} steps; it has one at least")
    if not (shift > 0 and math.isfinite(shift)):
        raise UserError(f"a schedule shifted by {shift}; the shift is finite and above 0")


# ---- windows ----


@dataclass(frozen=True)
class Window:
    """Steps `start` to `stop`, the last not included."""

    start: int
    stop: int

    def trained(self, steps: int) -> list[int]:
        """The numbers of its steps in a schedule of `steps`."""
        return list(range(self.start, min(self.stop, steps)))

    def noised(self, steps: int, variant: str = "repaired") -> list[bool]:
        """Which steps get noise: those that are trained. Release: flow_grpo gives its first step noise even where the
        window is empty."""
        trained = set(self.trained(steps)) | ({self.start} if is_release(variant) else set())
        return [number in trained for number in range(steps)]


def window_draws(seed: int, iteration: int) -> random.Random:
    """The generator of one iteration's window: the same on every process, another at every iteration.

    flow_grpo's BAGEL seeds `random.Random(process_index)` anew at each call, so a process keeps its window for good.
    """
    return random.Random(f"window {seed} {iteration}")


def draw_window(steps: int, size: int | None, bounds: Bounds, draws: Draws, variant: str = "repaired") -> Window:
    """A window of `size` steps, equally likely at every place within the bounds (Flow-GRPO-Fast; BAGEL's is the same).

    Without a size it is every step but the last, whose Gaussian is too narrow for ratios near 1. Raises UserError where
    the window does not fit the bounds, or the bounds the schedule.
    Release: a window that runs past the schedule is cut off, to nothing if need be; a size of 0 or less counts as none;
    a single step gets noise but is not trained.
    """
    release = is_release(variant)
    if size is None or (release and size <= 0):
        return _all_but_last(steps, release)
    low, high = _checked_bounds(size, bounds, None if release else steps)
    start = draws.randint(low, high - size)
    return Window(start, start + size)


def pick_window(size: int | None, bounds: Bounds | None, seed: int, variant: str = "repaired") -> Window | None:
    """verl-omni's window for BAGEL, from random.Random(seed); None: no window. Without bounds it begins at step 0.

    Raises UserError where it does not fit. Release: it then begins at the lower bound and runs past the upper one.
    """
    if size is None or size <= 0:
        return None
    if bounds is None:
        return Window(0, size)
    if is_release(variant) and bounds[1] - size < bounds[0]:
        return Window(bounds[0], bounds[0] + size)
    low, high = _checked_bounds(size, bounds, None)
    start = random.Random(seed).randint(low, high - size)
    return Window(start, start + size)


def windows_of_batch(
    size: int | None,
    bounds: Bounds,
    steps: int,
    batch: int,
    generators: torch.Generator | Sequence[torch.Generator],
    variant: str = "repaired",
) -> list[Window]:
    """verl-omni's windows of a batch: one each from its row's generator, or one for all from a single generator.

    Without a size each is every step but the last. Raises UserError where a window does not fit, or there are more or
    fewer generators than rows. Release: bounds that run past the schedule are not noticed.
    """
    release = is_release(variant)
    if size is None:
        return [_all_but_last(steps, release)] * batch
    low, high = _checked_bounds(size, bounds, None if release else steps)

    def one(generator: torch.Generator) -> Window:
        start = int(torch.randint(low, high - size + 1, (1,), generator=generator, device=generator.device).item())
        return Window(start, start + size)

    if isinstance(generators, torch.Generator):
        return [one(generators)] * batch
    if len(generators) != batch:
        raise UserError(f"{len(generators)} generators for the windows of {batch} rows; each row has its own")
    return [one(generator) for generator in generators]


def window_of_step(
    strategy: str,
    size: int | None,
    bounds: Bounds | None,
    global_step: int = 0,
    iterations_per_window: int = 1,
    seed: int | None = None,
    variant: str = "repaired",
) -> tuple[int, int] | None:
    """verl-omni's MixGRPO: the bounds that are left of `bounds` (None: 0 to 5) at one step of training.

    progressive: the window moves by its own size every `iterations_per_window` steps, and stays at the last place.
    random: drawn from `seed` and the step. Without size or seed: the bounds as they are, to draw from at each call.
    Raises UserError where the window does not fit, or for another strategy; the release leaves the bounds as they are.
    """
    if strategy not in ("progressive", "random") and not is_release(variant):
        raise UserError(f"no strategy '{strategy}' of a window; {nearest(strategy, ('progressive', 'random'))}")
    unchanged = None if bounds is None else (bounds[0], bounds[1])
    if not size or strategy not in ("progressive", "random") or (strategy == "random" and seed is None):
        return unchanged
    low, high = _checked_bounds(size, bounds or (0, 5), None)
    if strategy == "random":
        start = random.Random(int(seed or 0) + global_step).randint(low, high - size)
    else:
        start = min(low + max(0, global_step) // max(1, iterations_per_window) * size, high - size)
    return start, start + size


def _all_but_last(steps: int, release: bool) -> Window:
    if steps < 2 and not release:
        raise UserError(f"a schedule of {steps} step has none to train: the last one is left to the ODE")
    return Window(0, steps - 1)


def _checked_bounds(size: int, bounds: Bounds, steps: int | None) -> tuple[int, int]:
    if len(bounds) != 2:
        raise UserError(f"a window lies between two steps, not {list(bounds)}")
    low, high = bounds
    if size < 1:
        raise UserError(f"a window of {size} steps; it has one at least, or no size for every step but the last")
    if high - size < low:
        raise UserError(f"a window of {size} steps does not fit between steps {low} and {high}")
    if low < 0 or (steps is not None and high > steps):
        raise UserError(f"the window lies between steps {low} and {high}, but the schedule has steps 0 to {steps}")
    return low, high


# ---- MixGRPO's sliding window ----


def trainable_steps(steps: int, variant: str = "repaired") -> int:
    """How many steps a sliding window may cover: all but the last. Release: MixGRPO leaves out the last two."""
    return steps - (2 if is_release(variant) else 1)


@dataclass(frozen=True)
class WindowState:
    """Where a sliding window stands: three plain values, for a checkpoint."""

    position: int
    iteration: int = 0  # how many it has had at this position
    complete: bool = False  # it has passed its last place and does not go back


@dataclass(frozen=True)
class SlidingWindow:
    """MixGRPO's window over the steps (arXiv:2507.21802): where it begins, how long it stays, how it moves.

    progressive: `iterations` at each place, then on by `stride`. decay: as many as fall evenly from `iterations` to
    `least_iterations` over the steps. exp_decay: ceil(iterations exp(-decay_rate max(0, position - decay_after))).
    random: a new place at every iteration. A last window may be shorter than `size`.
    Release: beyond its last place the window is empty, for as long as any other if it goes back and for good if not;
    exp_decay never reports that it is complete. Raises UserError, from the constructor, for what cannot slide.
    """

    steps: int  # that it may cover
    size: int
    iterations: int
    strategy: str = "progressive"
    stride: int | None = None  # None: the size, so that windows do not overlap
    roll_back: bool = False  # to `start`, after the last place
    start: int = 0
    least_iterations: int | None = None  # None: a quarter of `iterations`
    decay_after: int = 13
    decay_rate: float = 0.1
    variant: str = "repaired"

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise UserError(f"no strategy '{self.strategy}' of a window; {nearest(self.strategy, STRATEGIES)}")
        release = is_release(self.variant)
        too_long = self.size > self.steps and (not release or self.strategy == "random")
        if self.size < 1 or too_long:
            raise UserError(f"a window of {self.size} steps does not slide over {self.steps}")
        if self.start < 0 or (self.start >= self.steps and not release):
            raise UserError(f"a window cannot start at step {self.start} of {self.steps}")
        if self.iterations < 1 or (self.stride is not None and self.stride < 1):
            raise UserError(f"a window that stays for {self.iterations} iterations and moves by {self.stride} steps")

    def first(self) -> WindowState:
        return WindowState(self.start, complete=self._is_over(self.start))

    def window(self, state: WindowState) -> Window:
        return Window(state.position, min(state.position + self.size, self.steps))

    def advance(self, state: WindowState, seed: int | None = None) -> WindowState:
        """The state after one more iteration. `seed`: of this iteration's draw, which only random reads; it raises
        ValueError without one."""
        if self.strategy == "random":
            if seed is None:
                raise ValueError("a random window needs a seed for every iteration")
            return WindowState(int(np.random.default_rng(seed).integers(0, self.steps - self.size + 1)))
        release = is_release(self.variant)
        if state.complete and not release:
            return state
        position, iteration = state.position, state.iteration + 1
        if iteration >= self._iterations_at(position):
            position, iteration = position + (self.size if self.stride is None else self.stride), 0
        if position > self.steps or (position == self.steps and not release):
            if self.roll_back:
                position, iteration = self.start, 0
            elif release:
                position = self.steps
            else:
                return WindowState(state.position, 0, complete=True)
        return WindowState(position, iteration, self._is_over(position))

    def _is_over(self, position: int) -> bool:
        """The release's word for it: at the upper end, unless the strategy is one that never says so."""
        return is_release(self.variant) and self.strategy in ("progressive", "decay") and position >= self.steps

    def _iterations_at(self, position: int) -> int:
        if self.strategy == "decay":
            least = max(1, self.iterations // 4) if self.least_iterations is None else self.least_iterations
            progress = position / self.steps
            return max(least, int(self.iterations * (1 - progress) + least * progress))
        if self.strategy == "exp_decay":
            return math.ceil(self.iterations * math.exp(-self.decay_rate * max(0, position - self.decay_after)))
        return self.iterations
