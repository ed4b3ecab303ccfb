"""policy/scoring/dpm.py against closed forms, and where the released multistep solver parts from them."""

from __future__ import annotations

import math

import pytest
import torch
from flow_helpers import MEAN, random_step, rows, variance_at, velocity_of

from policy.scoring.dpm import History, multistep_order
from policy.scoring.flow import Dpm, Ode, step


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
def test_a_first_order_dpm_step_is_eulers_from_one_and_to_zero_too(algorithm):
    x, velocity, _, _, _ = random_step(4)
    sigma, sigma_next = rows(1.0, 0.6, 0.3), rows(0.9, 0.2, 0.0)
    got = step(Dpm(algorithm=algorithm, order=1), x, velocity, sigma, sigma_next).x_next_B
    torch.testing.assert_close(got, step(Ode(), x, velocity, sigma, sigma_next).x_next_B, rtol=1e-5, atol=1e-6)


def primitive(power, rate, at):
    """The integral of e^(rate u) u^power at `at`, by parts."""
    if power == 0:
        return math.exp(rate * at) / rate
    return math.exp(rate * at) * at**power / rate - power / rate * primitive(power - 1, rate, at)


def integral(coefficients, rate, first, last):
    return sum(c * (primitive(k, rate, last) - primitive(k, rate, first)) for k, c in enumerate(coefficients))


def lambda_of(sigma):
    return math.log((1 - sigma) / sigma)


def polynomial_step(sampler, coefficients, times=(0.8, 0.7, 0.55, 0.35), noise=False, known=2):
    """Step from times[2] to times[3] where the estimate is a polynomial of lambda, and what the exact solution is."""

    def estimate(sigma):
        return sum(c * lambda_of(sigma) ** k for k, c in enumerate(coefficients))

    x, (at, to) = 0.7, times[2:]
    by_noise = sampler.algorithm == "dpmsolver"
    m = estimate(at)
    velocity = (m - x) / (1 - at) if by_noise else (x - m) / at
    earlier = times[1::-1][:known]
    history = History(
        rows(*[[s] for s in earlier]),
        rows(*[[[estimate(s)]] for s in earlier]),
        torch.tensor([multistep_order(4, 9, known, sampler.order)]),
    )
    got = step(
        sampler, rows([x]), rows([velocity]), rows(at), rows(to), torch.zeros(1, 1) if noise else None, history=history
    )
    first, last = lambda_of(at), lambda_of(to)
    if by_noise:  # x (a' / a) - a' (1 or 2) the integral of e^-lambda m
        exact = (1 - to) * (x / (1 - at) - (1 + noise) * integral(coefficients, -1, first, last))
    elif noise:  # x (s' / s) e^-h + 2 a' the integral of e^(2 (lambda - lambda')) m
        exact = to / at * math.exp(first - last) * x
        exact += 2 * (1 - to) * math.exp(-2 * last) * integral(coefficients, 2, first, last)
    else:  # x (s' / s) + s' the integral of e^lambda m
        exact = to * (x / at + integral(coefficients, 1, first, last))
    return got.x_next_B.item(), exact


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
def test_a_dpm_step_is_exact_where_the_estimate_is_a_polynomial_of_its_order(algorithm, noise):
    for order, coefficients in ((1, [0.4]), (2, [0.4, -0.9]), (3, [0.4, -0.9, 1.3])):
        sampler = Dpm(algorithm=algorithm, order=order, solver="heun")
        got, exact = polynomial_step(sampler, coefficients, noise=noise)
        assert got == pytest.approx(exact, rel=2e-5), (order, coefficients)
        # and not where it has one power more
        got, exact = polynomial_step(sampler, [*coefficients, 1.7], noise=noise)
        assert abs(got - exact) > 1e-3


@pytest.mark.parametrize("noise", [False, True])
def test_the_released_third_order_is_not_of_third_order(noise):
    got, exact = polynomial_step(Dpm(order=3, variant="release"), [0.4, -0.9, 1.3], noise=noise)
    assert abs(got - exact) > 1e-2
    # up to the second order the two are one
    for order in (1, 2):
        pair = [
            polynomial_step(Dpm(order=order, variant=v), [0.4, 2.0], noise=noise)[0] for v in ("repaired", "release")
        ]
        assert pair[0] == pytest.approx(pair[1], rel=1e-5)


def test_the_released_dpmsolver_leads_astray():
    """It takes the clean latent for the noise, so the flow of the data is not followed, however fine the steps."""

    def end(sampler, steps):
        lambdas = torch.linspace(lambda_of(0.9), lambda_of(0.1), steps + 1)
        times, x = torch.sigmoid(-lambdas), torch.tensor([[0.1 * MEAN + math.sqrt(variance_at(0.9))]])
        for at, to in zip(times[:-1], times[1:], strict=True):
            x = step(sampler, x, velocity_of(x, at), at, to).x_next_B
        return abs(x.item() - (0.9 * MEAN + math.sqrt(variance_at(0.1))))  # one deviation from the mean throughout

    repaired, release = (Dpm(algorithm="dpmsolver", order=1, variant=v) for v in ("repaired", "release"))
    assert end(repaired, 200) < 0.003 and end(release, 200) > 1


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
def test_rows_of_different_order_are_what_they_are_alone(algorithm, solver):
    x, velocity, noise, sigma, sigma_next = random_step(12, 4)
    sampler = Dpm(algorithm=algorithm, order=3, solver=solver)
    earlier = torch.stack([sigma + 0.01, sigma + 0.015])
    estimates = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([1, 2, 3, 2])
    together = step(sampler, x, velocity, sigma, sigma_next, noise, history=History(earlier, estimates, order))
    for row in range(4):
        one, known = slice(row, row + 1), int(order[row]) - 1
        # what the row's order does not reach is never read
        history = History(earlier[:known, one], estimates[:known, one], order[one]) if known else None
        alone = step(sampler, x[one], velocity[one], sigma[one], sigma_next[one], noise[one], history=history)
        torch.testing.assert_close(alone.x_next_B, together.x_next_B[one])
        torch.testing.assert_close(alone.log_prob_B, together.log_prob_B[one])


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
def test_where_a_step_has_no_bound_it_is_of_first_order_whatever_is_asked(algorithm):
    """From sigma 1 and to sigma 0 the step is infinitely long in lambda. Nothing of it is NaN, gradients included."""
    x, velocity, noise, _, _ = random_step(14)
    velocity.requires_grad_()
    sigma, sigma_next = rows(1.0, 0.4, 0.5), rows(0.9, 0.0, 0.4)
    history = History(rows([1.0, 0.6, 0.7], [1.0, 0.8, 1.0]), torch.randn(2, *x.shape), torch.tensor([3, 3, 1]))
    sampler = Dpm(algorithm=algorithm, order=3)
    got = step(sampler, x, velocity, sigma, sigma_next, history=history)
    euler = step(Ode(), x, velocity, sigma, sigma_next).x_next_B
    torch.testing.assert_close(got.x_next_B, euler, rtol=1e-5, atol=1e-6)
    for result in (got, step(sampler, x, velocity, sigma, sigma_next, noise, history=history)):
        velocity.grad = None
        result.x_next_B.sum().backward()
        assert result.x_next_B.isfinite().all() and velocity.grad.isfinite().all()


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
def test_twice_as_many_second_order_steps_leave_a_quarter_of_the_error(algorithm, solver):
    sampler = Dpm(algorithm=algorithm, order=2, solver=solver)
    first, last = 0.9, 0.1
    deviations = rows([-1.5], [0.7], [2.0])  # from the mean, which the flow keeps

    def error(steps):
        times = torch.sigmoid(-torch.linspace(lambda_of(first), lambda_of(last), steps + 1))
        x, known = (1 - first) * MEAN + math.sqrt(variance_at(first)) * deviations, None
        for at, to in zip(times[:-1], times[1:], strict=True):
            velocity = velocity_of(x, at)
            history = known and History(known[0].expand(1, 3), known[1][None], torch.full((3,), 2))
            known = (at, sampler.estimate(x, velocity, at))
            x = step(sampler, x, velocity, at, to, history=history).x_next_B
        return (x - (1 - last) * MEAN - math.sqrt(variance_at(last)) * deviations).abs().max().item()

    assert error(40) < error(20) / 3 and error(40) < 1.5e-3


def test_the_order_grows_with_what_is_known_and_falls_at_the_end():
    orders = [multistep_order(i, 9, min(i, 3), 3) for i in range(9)]
    assert orders == [1, 2, 3, 3, 3, 3, 3, 2, 1]
    assert [multistep_order(i, 16, min(i, 3), 3) for i in range(12, 16)] == [3, 3, 3, 1]
    assert [multistep_order(i, 9, min(i, 3), 2) for i in range(9)] == [1, 2, 2, 2, 2, 2, 2, 2, 1]
