"""Multistep DPM-Solver steps over a rectified flow, each row of a call at its own time and of its own order.

Pure: tensors only, no host synchronisation. A latent at time sigma is (1 - sigma) clean + sigma noise, so
lambda = log((1 - sigma) / sigma) is half its log signal-to-noise ratio, and h the growth of lambda over the step.
With an estimate m(u) along the step developed in powers of u / h, m = m_0 + (u / h) D_1 + (u / h)^2 D_2, both solvers
integrate exactly (DPM-Solver, arXiv:2206.00927; DPM-Solver++, arXiv:2211.01095):

    dpmsolver++  m is the clean latent, the kernel exp(-(H - w)), H = h for the ODE and 2h for the SDE
    dpmsolver    m is the noise, the kernel exp(h - u), counted once for the ODE and twice for the SDE

Letters: B rows, K earlier estimates of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHORT_SCHEDULE = 15  # steps below which the last step but one is of second order at most


@dataclass(frozen=True)
class History:
    """What a multistep step reads of the steps before it. Rows that lack an estimate hold any finite number."""

    sigma_KB: Tensor  # float32, newest first: the times of the estimates
    estimate_KB: Tensor  # float32 [K, B, ...], as Dpm.estimate gave them
    order_B: Tensor  # int64, 1 to K + 1: the order of each row's step


def multistep_order(step: int, steps: int, known: int, order: int) -> int:
    """The order that step `step` of `steps` takes when `known` earlier estimates are at hand.

    It grows with what is known, and falls at the end: the last step is of first order, and in a schedule of fewer
    than 15 steps the last but one of second (MixGRPO, arXiv:2507.21802, after DPM-Solver++).
    """
    if step == steps - 1:
        return 1
    if step == steps - 2 and steps < SHORT_SCHEDULE:
        order = min(order, 2)
    return max(1, min(order, known + 1))


@dataclass(frozen=True)
class Updates:
    """One step both ways, for rows [B, ...]."""

    ode_B: Tensor  # where the deterministic step leads
    mean_B: Tensor  # of the stochastic step
    noise_std_B: Tensor  # [B, 1, ...] of the stochastic step


def clean_updates(
    x_B: Tensor, clean_B: Tensor, sigma_B: Tensor, next_B: Tensor, history: History | None, heun: bool, release: bool
) -> Updates:
    """dpmsolver++: x' = (s' / s) e^(h - H) x + (1 - s') (p D_0 + g_1 D_1 + g_2 D_2), p = 1 - e^-H.

    The stochastic step's standard deviation is s' sqrt(1 - e^-2h). `sigma_B` and `next_B` are columns [B, 1, ...].
    `release`: third-order coefficients as in diffusers and MixGRPO, where g_2 is half of what it should be for the
    ODE, and of the wrong sign and size for the SDE.
    """
    h_B = _log_snr(next_B) - _log_snr(sigma_B)
    d1_B, d2_B, order_B = _differences(clean_B, sigma_B, h_B, history)

    def drift(span_B: Tensor, stochastic: bool) -> Tensor:
        p_B = -torch.expm1(-span_B)
        taylor_B = 1 - p_B / span_B
        g1_B = taylor_B if heun else torch.where(order_B >= 3, taylor_B, 0.5 * p_B)
        g2_B = 0.5 - 1 / span_B + p_B / span_B.square()
        g2_B = g2_B - float(stochastic) if release else 2 * g2_B
        return (1 - next_B) * (p_B * clean_B + g1_B * d1_B + g2_B * d2_B)

    scale_B = next_B / sigma_B
    return Updates(
        ode_B=scale_B * x_B + drift(h_B, False),
        mean_B=scale_B * torch.exp(-h_B) * x_B + drift(2 * h_B, True),
        noise_std_B=next_B * torch.sqrt(-torch.expm1(-2 * h_B)),
    )


def noise_updates(
    clean_B: Tensor, noise_B: Tensor, sigma_B: Tensor, next_B: Tensor, history: History | None, heun: bool
) -> Updates:
    """dpmsolver: x' = (1 - s') clean + s' noise - s' (f_1 D_1 + f_2 D_2) for the ODE.

    The stochastic step goes that way twice, -s' (q noise + f_1 D_1 + f_2 D_2) more with q = e^h - 1, and has the
    standard deviation s' sqrt(e^2h - 1). From sigma 1 and to sigma 0 its e^h has no bound: such a step is the
    deterministic one, of standard deviation 0.
    """
    bounded_B = (sigma_B < 1) & (next_B > 0)
    from_B = torch.where(bounded_B, sigma_B, 0.5)
    to_B = torch.where(bounded_B, next_B, 0.25)
    h_B = _log_snr(to_B) - _log_snr(from_B)
    d1_B, d2_B, order_B = _differences(noise_B, sigma_B, torch.where(bounded_B, h_B, torch.inf), history)
    q_B = torch.expm1(h_B)
    taylor_B = q_B / h_B - 1
    f1_B = taylor_B if heun else torch.where(order_B >= 3, taylor_B, 0.5 * q_B)
    f2_B = 2 * ((q_B - h_B) / h_B.square() - 0.5)
    curve_B = next_B * (f1_B * d1_B + f2_B * d2_B)
    ode_B = (1 - next_B) * clean_B + next_B * noise_B - torch.where(bounded_B, curve_B, 0.0)
    again_B = next_B * q_B * noise_B + curve_B
    return Updates(
        ode_B=ode_B,
        mean_B=ode_B - torch.where(bounded_B, again_B, 0.0),
        noise_std_B=torch.where(bounded_B, next_B * torch.sqrt(torch.expm1(2 * h_B)), 0.0),
    )


def noise_updates_release(
    x_B: Tensor, clean_B: Tensor, sigma_B: Tensor, next_B: Tensor, history: History | None, heun: bool
) -> Updates:
    """dpmsolver as MixGRPO ships it: the formula of the noise, fed with the clean latent.

    It is not finite from sigma 1 or to sigma 0, and its third order exists neither for the SDE nor, as the mean that
    the log-probability needs is missing, for the ODE.
    """
    h_B = _log_snr(next_B) - _log_snr(sigma_B)
    d1_B, _, _ = _differences(clean_B, sigma_B, h_B, history)
    q_B = torch.exp(h_B) - 1
    f1_B = q_B / h_B - 1 if heun else 0.5 * q_B
    along_B = next_B * (q_B * clean_B + torch.where(d1_B == 0, 0.0, f1_B * d1_B))
    carried_B = (1 - next_B) / (1 - sigma_B) * x_B
    return Updates(
        ode_B=carried_B - along_B,
        mean_B=carried_B - 2 * along_B,
        noise_std_B=next_B * torch.sqrt(torch.exp(2 * h_B) - 1),
    )


def _log_snr(sigma_B: Tensor) -> Tensor:
    return torch.log(1 - sigma_B) - torch.log(sigma_B)


def _differences(
    newest_B: Tensor, sigma_B: Tensor, h_B: Tensor, history: History | None
) -> tuple[Tensor, Tensor, Tensor]:
    """D_1, D_2 (zero where the row's order does not reach them) and the order as a column.

    Divided differences over the lambdas of the estimates; a step of unbounded h is of first order whatever is asked.
    """
    if history is None:
        zero_B = torch.zeros_like(newest_B)
        return zero_B, zero_B, torch.ones_like(h_B)
    order_B = history.order_B.to(h_B.device).reshape(h_B.shape)
    # Where a difference is not wanted its inputs are harmless ones, so that no gradient is NaN.
    second_B = (order_B >= 2) & torch.isfinite(h_B)
    third_B = (order_B >= 3) & second_B
    lambda_B = _log_snr(torch.where(second_B, sigma_B, 0.5))
    lambda_1B, estimate_1B = _earlier(history, 0, second_B, h_B)
    h_safe_B = torch.where(second_B, h_B, 1.0)
    h0_B = torch.where(second_B, lambda_B - lambda_1B, 1.0)
    first_B = h_safe_B / h0_B * (newest_B - estimate_1B)
    d1_B, d2_B = first_B, torch.zeros_like(first_B)
    if len(history.sigma_KB) > 1:
        lambda_2B, estimate_2B = _earlier(history, 1, third_B, h_B)
        h1_B = torch.where(third_B, lambda_1B - lambda_2B, 1.0)
        slope_B = first_B - h_safe_B / h1_B * (estimate_1B - estimate_2B)
        d1_B = torch.where(third_B, first_B + h0_B / (h0_B + h1_B) * slope_B, first_B)
        d2_B = torch.where(third_B, h_safe_B / (h0_B + h1_B) * slope_B, 0.0)
    return torch.where(second_B, d1_B, 0.0), d2_B, order_B


def _earlier(history: History, index: int, wanted_B: Tensor, like_B: Tensor) -> tuple[Tensor, Tensor]:
    sigma_B = history.sigma_KB[index].to(like_B).reshape(like_B.shape)
    estimate_B = history.estimate_KB[index].to(like_B)
    return _log_snr(torch.where(wanted_B, sigma_B, 0.75)), torch.where(wanted_B, estimate_B, 0.0)
