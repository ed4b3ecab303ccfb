"""policy/scoring/flow.py and dpm.py: numbers worked by hand, closed forms, and what must hold of every sampler."""

from __future__ import annotations

import json
import math

import pytest
import torch
from flow_helpers import MEAN, random_step, rows, variance_at, velocity_of
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.scoring.dpm import History
from policy.scoring.flow import Cps, Dance, Dpm, Ode, Sampler, Sde, clean_estimate, replay, sampler_of, step
from runtime.errors import UserError

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
STOCHASTIC = [
    Sde(noise_level=0.7, sigma_at_one=0.95),
    Sde(noise_level=1.5, sigma_at_one=0.9, constants=False),
    Cps(noise_level=0.6),
    Dance(noise_level=0.3),
    Dpm(order=1),
    Dpm(algorithm="dpmsolver", order=2, solver="heun"),
]
EVERY = [*STOCHASTIC, Ode(), Cps(variant="release"), Dpm(order=3, variant="release")]


def names(sampler):
    return f"{sampler.name}-{sampler.variant}-{getattr(sampler, 'algorithm', sampler.constants)}"


def every_sampler(samplers):
    return pytest.mark.parametrize("sampler", samplers, ids=names)


# ---- by hand -----------------------------------------------------------------------------------------------------

# One row of two elements, from sigma 1/2 to 1/4. The first has x 1 and velocity 2, so its clean latent is 0 and its
# noise 2, and Euler's step leads to 1/2; the second is 0 throughout.
X, VELOCITY, SIGMA, NEXT = rows([1.0, 0.0]), rows([2.0, 0.0]), rows(0.5), rows(0.25)


@pytest.mark.parametrize(
    "sampler, mean, std",
    [
        # c^2 = 1, c^2 / 2s = 1: 1/2 + 2 (-1/4); the root of 1/4
        (Sde(noise_level=1.0, sigma_at_one=0.9), 0.0, 0.5),
        # sin 30 degrees = 1/2: 1/4 cos(30) 2; 1/4 sin(30)
        (Cps(noise_level=1 / 3), math.sqrt(3) / 4, 0.125),
        # score -2 / (1/2): 1/2 - 1/2 (-4) (-1/4); the root of 1/4
        (Dance(noise_level=1.0), 0.0, 0.5),
        # e^h = 3: 1/2 1/3 x + 3/4 8/9 0; 1/4 the root of 8/9
        (Dpm(order=1), 1 / 6, math.sqrt(8 / 9) / 4),
        # 3/2 x - 2 1/4 (3 - 1) 2; 1/4 the root of 9 - 1
        (Dpm(algorithm="dpmsolver", order=1), -0.5, math.sqrt(8) / 4),
        (Ode(), 0.5, 0.0),
    ],
    ids=lambda value: names(value) if isinstance(value, Sampler) else None,
)
def test_mean_deviation_and_density_by_hand(sampler, mean, std):
    got = step(sampler, X, VELOCITY, SIGMA, NEXT, rows([1.0, 2.0]))
    torch.testing.assert_close(got.mean_B, rows([mean, 0.0]))
    torch.testing.assert_close(got.noise_std_B, rows(std))
    torch.testing.assert_close(got.x_next_B, rows([mean + std, 2 * std]))
    # noise 1 and 2: the mean of -1/2 and -4/2, then the constants
    expected = -1.25 - math.log(std) - HALF_LOG_2PI if std else math.nan
    torch.testing.assert_close(got.log_prob_B, rows(expected), equal_nan=True)


def test_without_constants_only_the_square_is_left():
    got = step(Dance(noise_level=1.0, constants=False), X, VELOCITY, SIGMA, NEXT, rows([1.0, 2.0]))
    torch.testing.assert_close(got.log_prob_B, rows(-1.25))


def test_sigma_one_has_the_coefficient_of_the_time_that_stands_for_it():
    # c^2 = 0.49 / (1 - 0.9) = 4.9, whose square root times that of 0.04 is the deviation; at sigma 0.5 c^2 = 0.49
    got = step(
        Sde(noise_level=0.7, sigma_at_one=0.9),
        torch.zeros(3, 1),
        torch.zeros(3, 1),
        rows(1.0, 1.0000001, 0.5),  # 1, missed by a last bit; and a time that is not 1
        rows(0.96, 0.96, 0.46),
        torch.zeros(3, 1),
    )
    at_one = math.sqrt(4.9 * 0.04)
    torch.testing.assert_close(got.noise_std_B, rows(at_one, at_one, math.sqrt(0.49 * 0.04)))


def test_the_released_cps_density_is_that_of_another_deviation():
    # -(x' - mean)^2 in place of -(x' - mean)^2 / (2 / 64): a log-ratio is a 32nd of what it is
    noise = rows([1.0, 2.0])
    old, new = VELOCITY, VELOCITY + 0.1

    def log_ratio(sampler):
        there = step(sampler, X, old, SIGMA, NEXT, noise)
        return replay(sampler, X, new, SIGMA, NEXT, there.x_next_B).log_prob_B - there.log_prob_B

    repaired, release = (log_ratio(Cps(noise_level=1 / 3, variant=v)) for v in ("repaired", "release"))
    torch.testing.assert_close(release * 32, repaired, rtol=1e-4, atol=1e-6)
    # and a step without noise, which could lead nowhere else, is given a density
    assert replay(Cps(noise_level=0.0, variant="release"), X, old, SIGMA, NEXT, X).log_prob_B.isfinite().all()
    assert replay(Cps(noise_level=0.0), X, old, SIGMA, NEXT, X).log_prob_B.isnan().all()


# ---- what holds of every sampler ---------------------------------------------------------------------------------


@every_sampler(EVERY)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 4), shape=st.sampled_from([(), (3,), (2, 1, 3)]))
def test_what_is_sampled_is_replayed_with_the_same_log_prob(sampler, seed, count, shape):
    x, velocity, noise, sigma, sigma_next = random_step(seed, count, shape)
    taken = step(sampler, x, velocity, sigma, sigma_next, noise)
    again = replay(sampler, x, velocity, sigma, sigma_next, taken.x_next_B)
    torch.testing.assert_close(again.log_prob_B, taken.log_prob_B, rtol=0, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(again.mean_B, taken.mean_B)
    torch.testing.assert_close(again.noise_std_B, taken.noise_std_B)


@every_sampler(EVERY)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_rows_at_different_times_are_what_they_are_alone(sampler, seed):
    x, velocity, noise, sigma, sigma_next = random_step(seed)
    together = step(sampler, x, velocity, sigma, sigma_next, noise)
    for row in range(len(x)):
        one = slice(row, row + 1)
        alone = step(sampler, x[one], velocity[one], sigma[row], sigma_next[row], noise[one])
        for ours, theirs in zip(alone, together, strict=True):
            torch.testing.assert_close(ours, theirs[one], equal_nan=True)


@pytest.mark.parametrize("kind", [Sde, Cps, Dance])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), level=st.sampled_from([0.0, 1e-4, 1e-3]))
def test_as_the_noise_goes_the_step_becomes_eulers(kind, seed, level):
    x, velocity, noise, sigma, sigma_next = random_step(seed)
    sampler = Sde(noise_level=level, sigma_at_one=0.95) if kind is Sde else kind(noise_level=level)
    got = step(sampler, x, velocity, sigma, sigma_next, noise)
    euler = step(Ode(), x, velocity, sigma, sigma_next).x_next_B
    # noise of at most level sqrt(0.98 / 0.02) and 5 deviations
    torch.testing.assert_close(got.x_next_B, euler, rtol=1e-5, atol=40 * level + 1e-5)
    assert torch.equal(got.noise_std_B > 0, torch.full_like(sigma, level, dtype=torch.float64) > 0)


@every_sampler(STOCHASTIC)
def test_the_gradient_is_the_slope(sampler):
    # The log-prob is quadratic in the velocity, so central differences of any width are exact but for rounding.
    x, velocity, noise, sigma, sigma_next = random_step(7, 2, (3,))
    there = step(sampler, x, velocity, sigma, sigma_next, noise).x_next_B
    moved = (velocity + 0.3).requires_grad_()

    def total(at):
        return replay(sampler, x, at, sigma, sigma_next, there).log_prob_B.sum()

    total(moved).backward()
    for row, element in ((0, 0), (1, 2)):
        width = torch.zeros_like(velocity)
        width[row, element] = 0.5
        slope = (total(moved.detach() + width) - total(moved.detach() - width)).item()
        assert moved.grad[row, element].item() == pytest.approx(slope, rel=1e-3, abs=1e-4)


@every_sampler(STOCHASTIC)
def test_where_a_step_led_is_a_constant_of_its_log_prob(sampler):
    # Else mean and next latent would move together, and the log-prob would have no gradient at all.
    x, velocity, noise, sigma, sigma_next = random_step(13)
    grads = []
    for taken in (True, False):
        at = velocity.clone().requires_grad_()
        there = step(sampler, x, at, sigma, sigma_next, noise)
        scored = there if taken else replay(sampler, x, at, sigma, sigma_next, there.x_next_B.detach())
        scored.log_prob_B.sum().backward()
        grads.append(at.grad)
    torch.testing.assert_close(*grads)
    assert grads[0].abs().sum() > 0


@every_sampler([s for s in EVERY if not s.release])
def test_a_step_that_is_no_decision_has_no_density_and_no_gradient(sampler):
    # from sigma 1, within, and to 0; the middle row alone is in its window, and the last one has a window that is empty
    x, velocity, noise, _, _ = random_step(8)
    sigma, sigma_next = rows(1.0, 0.6, 0.4), rows(0.9, 0.4, 0.0)
    mark = torch.tensor([False, True, False])
    velocity.requires_grad_()
    got = step(sampler, x, velocity, sigma, sigma_next, noise, stochastic_B=mark)
    decided = mark & torch.tensor(not isinstance(sampler, Ode))
    assert torch.equal(got.noise_std_B > 0, decided) and torch.equal(got.log_prob_B.isnan(), ~decided)
    torch.testing.assert_close(got.x_next_B[~mark], got.mean_B[~mark])
    ode = step(sampler, x, velocity, sigma, sigma_next)
    torch.testing.assert_close(got.x_next_B[~mark], ode.x_next_B[~mark])
    assert ode.noise_std_B.eq(0).all() and ode.log_prob_B.isnan().all()

    # Counting it would be noticed; leaving it out leaves no NaN behind.
    torch.where(got.log_prob_B.isnan(), 0.0, got.log_prob_B).sum().backward()
    assert velocity.grad.isfinite().all() and velocity.grad[~decided].eq(0).all()


def test_the_last_cps_step_is_no_decision():
    x, velocity, noise, sigma, _ = random_step(9)
    got = step(Cps(noise_level=0.7), x, velocity, sigma, rows(0.0), noise)
    assert got.noise_std_B.eq(0).all() and got.log_prob_B.isnan().all()
    torch.testing.assert_close(got.x_next_B, clean_estimate(x, velocity, sigma[:, None, None]))


def test_the_released_step_outside_its_window_is_scored_by_a_gaussian_it_is_no_sample_of():
    mark = torch.tensor([False])
    released = step(
        Sde(noise_level=1.0, sigma_at_one=0.9, variant="release"), X, VELOCITY, SIGMA, NEXT, X, stochastic_B=mark
    )
    # it leads to Euler's 1/2, which is one deviation from the mean 0 of the stochastic step
    torch.testing.assert_close(released.x_next_B, rows([0.5, 0.0]))
    torch.testing.assert_close(released.log_prob_B, rows(-0.25 - math.log(0.5) - HALF_LOG_2PI))
    dance = step(Dance(noise_level=1.0, variant="release"), X, VELOCITY, SIGMA, NEXT, X, stochastic_B=mark)
    torch.testing.assert_close(dance.log_prob_B, rows(-math.log(0.5) - HALF_LOG_2PI))


@every_sampler([s for s in EVERY if not s.release])
def test_nothing_asks_the_device_for_a_number(sampler):
    # A tensor on the meta device has no values: reading one, which on a GPU waits for it, raises.
    x, velocity, noise = (torch.empty(3, 4, device="meta", requires_grad=True) for _ in range(3))
    sigma, sigma_next = (torch.empty(3, device="meta") for _ in range(2))
    mark = torch.empty(3, dtype=torch.bool, device="meta")
    order = torch.empty(3, dtype=torch.int64, device="meta")
    history = History(torch.empty(2, 3, device="meta"), torch.empty(2, 3, 4, device="meta"), order)
    got = step(sampler, x, velocity, sigma, sigma_next, noise, stochastic_B=mark, history=history)
    again = replay(sampler, x, velocity, sigma, sigma_next, got.x_next_B, stochastic_B=mark, history=history)
    again.log_prob_B.sum().backward()
    assert again.log_prob_B.shape == (3,) and got.x_next_B.device.type == "meta"


@every_sampler(EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_everything_is_computed_in_float32(sampler, dtype):
    x, velocity, noise, sigma, sigma_next = random_step(10)
    x, velocity, noise = x.to(dtype), velocity.to(dtype), noise.to(dtype)
    half = step(sampler, x, velocity, sigma, sigma_next, noise)
    full = step(sampler, x.float(), velocity.float(), sigma, sigma_next, noise.float())
    for ours, theirs in zip(half, full, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_shapes_that_would_broadcast_are_refused():
    x, velocity, noise, sigma, sigma_next = random_step(11)
    with pytest.raises(ValueError, match=r"velocity is \[1, 2, 5\], but x is \[3, 2, 5\]"):
        step(Ode(), x, velocity[:1], sigma, sigma_next)
    with pytest.raises(ValueError, match="x_next is"):
        replay(Ode(), x, velocity, sigma, sigma_next, noise[..., :1])
    with pytest.raises(ValueError, match="2 times or marks for 3 rows"):
        step(Ode(), x, velocity, sigma[:2], sigma_next)


# ---- closed forms ------------------------------------------------------------------------------------------------


@every_sampler(
    [Sde(noise_level=0.7, sigma_at_one=0.9), Dance(noise_level=0.3), Dpm(), Dpm(algorithm="dpmsolver"), Ode()]
)
def test_fine_steps_keep_the_distribution_of_the_data(sampler):
    """Mean and variance are carried through exactly, as a step is affine in x: no sampling. The error is of first
    order, so four times as many steps leave a quarter of it."""

    def errors(steps, first=0.95, last=0.05):
        times = torch.linspace(first, last, steps + 1)
        mean, variance = (1 - first) * MEAN, variance_at(first)
        for at, to in zip(times[:-1], times[1:], strict=True):
            x = rows([0.0], [1.0])
            got = step(sampler, x, velocity_of(x, at), at, to, torch.zeros(2, 1))
            offset, slope = got.mean_B[0].item(), (got.mean_B[1] - got.mean_B[0]).item()
            mean, variance = offset + slope * mean, slope**2 * variance + got.noise_std_B[0].item() ** 2
        return abs(mean - (1 - last) * MEAN), abs(variance - variance_at(last))

    coarse, fine = errors(50), errors(200)
    assert max(coarse[0], fine[0]) < 1e-5
    assert fine[1] < 0.35 * coarse[1] and fine[1] < 0.04 * variance_at(0.05)


def test_cps_leaves_as_much_noise_as_the_time_says():
    # With estimates that are right, the latent at s' has coefficients 1 - s' and s', however much of s' is fresh.
    for level in (0.0, 0.3, 1.0):
        x, velocity = rows([0.3 * 2.0 + 0.7 * -1.0]), rows([-1.0 - 2.0])  # clean 2, noise -1, sigma 0.7
        got = step(Cps(noise_level=level), x, velocity, rows(0.7), rows(0.4), torch.zeros(1, 1))
        kept = (got.mean_B.item() - 0.6 * 2.0) / -1.0
        assert kept**2 + got.noise_std_B.item() ** 2 == pytest.approx(0.4**2, abs=1e-6)


# ---- stored beside the decisions ---------------------------------------------------------------------------------


@every_sampler(EVERY)
def test_a_sampler_comes_back_from_json(sampler):
    assert sampler_of(json.loads(json.dumps(sampler.as_json()))) == sampler


@pytest.mark.parametrize(
    "data, sentence",
    [
        ({"sampler": "sde2"}, "no sampler 'sde2'; did you mean 'sde'"),
        ({}, "no sampler 'None'"),
        ({"sampler": ["sde"]}, "no sampler"),
        ({"sampler": "cps", "noise_level": "0.7"}, "noise_level is '0.7'; it is a finite number"),
        ({"sampler": "sde", "sigma_at_one": True}, "sigma_at_one is True"),
        ({"sampler": "dance", "constants": "no"}, "constants is 'no'; it is true or false"),
        ({"sampler": "cps", "noise": 0.7}, "sampler 'cps': no key 'noise'; did you mean 'noise_level'"),
        ({"sampler": "sde", "noise_level": 0.7}, "sampler 'sde': .*sigma_at_one"),
        ({"sampler": "sde", "sigma_at_one": 1.0}, "sigma_at_one is 1.0; it is above 0 and below 1"),
        ({"sampler": "dance", "noise_level": -0.1}, "noise_level is -0.1; it is a finite number not negative"),
        ({"sampler": "dance", "noise_level": math.nan}, "noise_level is nan"),
        ({"sampler": "cps", "noise_level": 1.5}, "noise_level is 1.5; it is a finite number between 0 and 1"),
        ({"sampler": "dpm", "algorithm": "dpm++"}, "no algorithm 'dpm\\+\\+'; did you mean 'dpmsolver\\+\\+'"),
        ({"sampler": "dpm", "solver": "euler"}, "no solver 'euler'"),
        ({"sampler": "dpm", "order": 4}, "order is 4; it is 1, 2 or 3"),
        ({"sampler": "ode", "variant": "released"}, "no variant 'released'; did you mean 'release'"),
    ],
)
def test_what_is_wrong_with_a_sampler_is_one_sentence(data, sentence):
    with pytest.raises(UserError, match=sentence):
        sampler_of(data)


def test_cps_noise_falls_beyond_one_which_only_the_release_allows():
    at = [
        step(Cps(noise_level=n, variant="release"), X, VELOCITY, SIGMA, NEXT, X).noise_std_B.item() for n in (1.0, 1.5)
    ]
    assert at[0] == pytest.approx(0.25) and at[1] == pytest.approx(0.25 * math.sin(0.75 * math.pi))
