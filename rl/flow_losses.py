"""What a denoising step's log-ratio, divergence and weight are; losses.py adds them up. Pure: tensors only.

A denoising step is one decision of a Gaussian whose deviation q the policy does not choose, so the ratio of new to
old weights and the divergence between them are known exactly. `score_steps` makes both from what a rollout recorded,
and `policy_loss` clips and sums them like those of any other decision. The releases' clip ranges are 1e-4
(Flow-GRPO), 1e-5 (its Fast form) and 2e-6 (GRPO-Guard): log-probs are means over elements, so ratios stay near 1.
A divergence made here is the exact one: LossSettings.use_bias_correction_kl is for estimates, and off for it.

Letters: N decisions; means, velocities and latents are [N, ...].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from policy.scoring.dpm import History
from policy.scoring.flow import Sampler, replay, row_mean
from policy.scoring.variants import is_release
from record.trajectory import DecisionKind
from rl.losses import ClipRange, LossSettings, ScoredDecisions
from runtime.errors import UserError, nearest

GUARD_VARIANTS = ("repaired", "shared_scale", "release")
RATIOS = ("plain", "guard")
ANCHORS = ("mean_kl", "velocity_mse")
UNCLIPPED = ClipRange(float("inf"), float("inf"))


# ---- ratios ----


def step_log_ratio(x_next_N: Tensor, mean_N: Tensor, old_mean_N: Tensor, noise_std_N: Tensor) -> Tensor:
    """log p(x') - log p_old(x'), averaged over elements: mean((mu - mu_old) (2 x' - mu - mu_old)) / (2 q^2).

    It is the difference of the two log-probs without their cancellation, which in float32 leaves errors as large as
    GRPO-Guard's clip range. [N].
    """
    old_mean_N = old_mean_N.detach()
    product_N = (mean_N - old_mean_N) * (2 * x_next_N.detach() - mean_N - old_mean_N)
    return row_mean(product_N) / (2 * noise_std_N.square())


def guard_log_ratio(
    log_ratio_N: Tensor,
    mean_N: Tensor,
    old_mean_N: Tensor,
    noise_std_N: Tensor,
    step_size_N: Tensor,
    variant: str = "repaired",
) -> Tensor:
    """RatioNorm of GRPO-Guard (arXiv:2510.22319): q (log r + mean((mu - mu_old)^2) / (2 q^2)), each decision by itself.

    The term in brackets takes away the shift that makes ratios smaller than 1 on average; q makes their spread the same
    at every step. `guard_weight` is the other half of the method. `step_size_N` is s - s' > 0.
    shared_scale: verl-omni's, one q for all, the mean coefficient times the mean root of the step. release: flow_grpo's
    script, one shift for all as well, so that samples are not told apart. Raises UserError for another variant.
    """
    _known("variant of RatioNorm", variant, GUARD_VARIANTS)
    shift_N = row_mean((mean_N - old_mean_N.detach()).square())
    if variant == "repaired":
        scale_N = noise_std_N
    else:
        root_N = step_size_N.sqrt()
        scale_N = (noise_std_N / root_N).mean() * root_N.mean()
    if variant == "release":
        shift_N = shift_N.mean()
    return scale_N * (log_ratio_N + shift_N / (2 * scale_N.square()))


def guard_weight(weight_N: Tensor, step_size_N: Tensor, variant: str = "repaired") -> Tensor:
    """GRPO-Guard's weights: divided by the step's size, so that every step's gradient has the same scale.

    shared_scale, release: by the squared mean of the roots, one number for all. Raises UserError for another variant.
    """
    _known("variant of RatioNorm", variant, GUARD_VARIANTS)
    return weight_N / (step_size_N if variant == "repaired" else step_size_N.sqrt().mean().square())


# ---- divergences ----


def mean_kl(
    mean_N: Tensor,
    reference_mean_N: Tensor,
    noise_std_N: Tensor,
    step_size_N: Tensor | None = None,
    variant: str = "repaired",
) -> Tensor:
    """KL between two Gaussians of one deviation, averaged over elements: mean((mu - mu_ref)^2) / (2 q^2). [N].

    Flow-GRPO, arXiv:2505.05470, section 4. Release: its scripts divide by the squared coefficient without the step, so
    that the KL is `step_size_N` (s - s' > 0) times what it should be; raises ValueError if that is not given.
    """
    release = is_release(variant)
    divergence_N = row_mean((mean_N - reference_mean_N.detach()).square()) / (2 * noise_std_N.square())
    if not release:
        return divergence_N
    if step_size_N is None:
        raise ValueError("the release's KL needs the sizes of the steps")
    return divergence_N * step_size_N


def velocity_mse(velocity_N: Tensor, reference_velocity_N: Tensor) -> Tensor:
    """mean((v - v_ref)^2): UniGRPO's anchor on BAGEL, which holds the flow itself at every noise level alike. [N]."""
    return row_mean((velocity_N - reference_velocity_N.detach()).square())


# ---- one pass over recorded steps ----


@dataclass(frozen=True)
class StepScores:
    """What the current weights say of recorded steps."""

    log_prob_N: Tensor  # carries the gradient; NaN where the step was no decision
    log_ratio_N: Tensor  # carries the gradient
    divergence_N: Tensor | None  # from the reference; carries the gradient. None: no reference was given
    mean_N: Tensor  # [N, ...], carries the gradient
    noise_std_N: Tensor


def score_steps(
    sampler: Sampler,
    x_N: Tensor,
    x_next_N: Tensor,
    velocity_N: Tensor,
    sigma_N: Tensor,
    sigma_next_N: Tensor,
    old_log_prob_N: Tensor,
    *,
    old_mean_N: Tensor | None = None,
    reference_velocity_N: Tensor | None = None,
    ratio: str = "plain",
    anchor: str = "mean_kl",
    variant: str = "repaired",
    history: History | None = None,
) -> StepScores:
    """Replay recorded steps with the current velocities: the learning pass of Flow-GRPO and of its BAGEL form.

    Args:
        old_log_prob_N: of the weights that the ratio is against.
        old_mean_N: their means [N, ...]; the ratio is then made without cancellation. RatioNorm needs it.
        reference_velocity_N: of the reference [N, ...]; None: no divergence.
        ratio: plain, or guard for RatioNorm, which `guard_weight` belongs to.
        anchor: the divergence from the reference, mean_kl or velocity_mse.
        variant: of RatioNorm (guard_log_ratio) and of mean_kl; release also takes plain ratios from the log-probs.
        history: what a multistep sampler's steps were conditioned on.

    Raises UserError for another ratio, anchor or variant, and ValueError where RatioNorm lacks the old means.
    """
    _known("ratio", ratio, RATIOS)
    _known("anchor", anchor, ANCHORS)
    _known("variant of RatioNorm", variant, GUARD_VARIANTS)
    now = replay(sampler, x_N, velocity_N, sigma_N, sigma_next_N, x_next_N, history=history)
    step_size_N = (sigma_N - sigma_next_N).float()
    log_ratio_N = now.log_prob_B - old_log_prob_N.detach()
    if old_mean_N is not None and variant != "release" and not sampler.release:
        log_ratio_N = step_log_ratio(x_next_N.float(), now.mean_B, old_mean_N.float(), now.noise_std_B)
    if ratio == "guard":
        if old_mean_N is None:
            raise ValueError("RatioNorm needs the old means of the steps")
        log_ratio_N = guard_log_ratio(
            log_ratio_N, now.mean_B, old_mean_N.float(), now.noise_std_B, step_size_N, variant
        )
    divergence_N = None
    if reference_velocity_N is not None and anchor == "velocity_mse":
        divergence_N = velocity_mse(velocity_N.float(), reference_velocity_N.float())
    elif reference_velocity_N is not None:
        reference = replay(sampler, x_N, reference_velocity_N, sigma_N, sigma_next_N, x_next_N, history=history)
        kl_variant = "release" if variant == "release" else "repaired"
        divergence_N = mean_kl(now.mean_B, reference.mean_B, now.noise_std_B, step_size_N, kl_variant)
    return StepScores(now.log_prob_B, log_ratio_N, divergence_N, now.mean_B, now.noise_std_B)


# ---- what goes into policy_loss ----


def clip_advantages(advantage_N: Tensor, limit: float) -> Tensor:
    """Advantages between -limit and limit: 5 in Flow-GRPO's recipes."""
    return advantage_N.clamp(-limit, limit)


def dppo(
    scored: ScoredDecisions, settings: LossSettings, divergence_from_old_N: Tensor, threshold: float
) -> tuple[ScoredDecisions, LossSettings, Tensor]:
    """DPPO's trust region for denoising steps: what `policy_loss` is to be called with, and which steps it masked.

    A step is not clipped. It is masked, which leaves its surrogate without value and gradient, where it has moved
    `threshold` or more from the old policy and would move on: ratio above 1 with a positive advantage, or below 1 with
    a negative one. It still counts, and keeps its divergence from the reference. Other kinds of decision are as before.
    `divergence_from_old_N` is mean_kl of new against old means; verl-omni's form without the variance is that of
    deviation 1.
    """
    flow_N = scored.kind_N == DecisionKind.FLOW
    log_ratio_N = scored.log_ratio_N.detach()
    away_N = ((log_ratio_N > 0) & (scored.advantage_N > 0)) | ((log_ratio_N < 0) & (scored.advantage_N < 0))
    masked_N = flow_N & away_N & (divergence_from_old_N.detach() >= threshold)
    kept = replace(
        scored,
        log_ratio_N=torch.where(masked_N, 0.0, scored.log_ratio_N),
        advantage_N=torch.where(masked_N, 0.0, scored.advantage_N),
    )
    return kept, replace(settings, clip={**settings.clip, DecisionKind.FLOW: UNCLIPPED}), masked_N


def ratio_summary(
    log_ratio_N: Tensor, low: float = 0.0, high: float = 0.0, variant: str = "repaired"
) -> dict[str, float]:
    """Moments of the ratios and the shares outside [1 - low, 1 + high], whatever the advantage. Numbers for a log.

    `std` is that of the ratios at hand, 0 for a single one. Release: the sample's, which for a single one is NaN.
    """
    sample = is_release(variant)
    log_ratio_N = log_ratio_N.detach().float()
    ratio_N = torch.exp(log_ratio_N)
    above_N, below_N = ratio_N - 1 > high, 1 - ratio_N > low
    std = float("nan") if sample and len(ratio_N) < 2 else ratio_N.std(correction=int(sample)).item()
    return {
        "mean": ratio_N.mean().item(),
        "std": std,
        "min": ratio_N.min().item(),
        "max": ratio_N.max().item(),
        "clipped": (above_N | below_N).float().mean().item(),
        "above": above_N.float().mean().item(),
        "below": below_N.float().mean().item(),
        "kl": -log_ratio_N.mean().item(),
        "kl_squared": 0.5 * log_ratio_N.square().mean().item(),
    }


def _known(what: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise UserError(f"no {what} '{name}'; {nearest(str(name), names)}")
