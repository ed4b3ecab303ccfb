"""The released losses of denoising steps, gradients included, and where the repaired forms part from them."""

from __future__ import annotations

import pytest
import torch
from flow_helpers import differs, every, scored, tensors

from policy.scoring.flow import Sde
from policy.scoring.schedule import uniform_times
from record.trajectory import DecisionKind
from rl.flow_losses import (
    clip_advantages,
    dppo,
    guard_log_ratio,
    guard_weight,
    mean_kl,
    ratio_summary,
    score_steps,
)
from rl.losses import ClipRange, LossSettings, policy_loss

pytestmark = pytest.mark.parity

FILE = "evals/flow/policy_loss.pt"


def clipped(low, high=None, beta=0.0):
    high = low if high is None else high
    return LossSettings(clip={DecisionKind.FLOW: ClipRange(low, high)}, beta=beta, use_bias_correction_kl=False)


def arrays(case):
    """log_prob and mean with gradients; the size of the steps and their whole deviation, one a decision."""
    root = case["sqrt_dt"].reshape(-1)
    leaves = (case[name].clone().requires_grad_() for name in ("log_prob", "mean"))
    return *leaves, root.square(), case["coefficient"].reshape(-1) * root


def gradients(loss, case, log_prob, mean):
    loss.backward()
    wrong = {"log_prob_grad": differs(log_prob.grad, case["log_prob_grad"])}
    if "mean_grad" in case:
        got = torch.zeros_like(mean) if mean.grad is None else mean.grad
        wrong["mean_grad"] = differs(got, case["mean_grad"])
    return wrong


def weights(case):
    size = len(case["log_prob"])
    weight = torch.full((size,), 1 / size)
    return weight if case.get("rollout_weights") is None else weight * case["rollout_weights"]


def test_the_guard_script_is_reproduced():
    """One of its cases stops, as its KL wants latents of four axes. Ours takes any, so there is nothing to compare."""

    def run(case):
        log_prob, mean, size, std = arrays(case)
        plain = log_prob - case["old_log_prob"]
        ratio, weight = plain, weights(case)
        wrong = {}
        if case["rationorm"]:
            ratio = guard_log_ratio(plain, mean, case["old_mean"], std, size, "release")
            weight = guard_weight(weight, size, "release")
        kl = mean_kl(mean, case["reference_mean"], std, size, "release") if case["beta"] else None
        advantage = clip_advantages(case["advantages"], case["adv_clip_max"])
        got = policy_loss(scored(ratio, advantage, weight), clipped(case["clip_range"]))
        # the script's KL is a plain mean, however the policy's part is weighted
        loss = got.loss if kl is None else got.loss + case["beta"] * kl.mean()
        if "raises" in case:
            return {"finite": None if loss.isfinite() else "no loss"}
        shares = ratio_summary(ratio, case["clip_range"], case["clip_range"])
        wrong |= {
            "ratio": differs(ratio.exp(), case["ratio"]),
            "policy_loss": differs(got.policy, case["policy_loss"]),
            "kl_loss": None if kl is None else differs(kl.mean(), case["kl_loss"]),
            "loss": differs(loss, case["loss"]),
            "approx_kl": differs(ratio_summary(plain)["kl_squared"], case["approx_kl"]),
            "clipfrac": differs(shares["clipped"], case["clipfrac"]),
            "clipfrac_gt_one": differs(shares["above"], case["clipfrac_gt_one"]),
            "clipfrac_lt_one": differs(shares["below"], case["clipfrac_lt_one"]),
        }
        if "bias" in case:
            scale = (std / size.sqrt()).mean() * size.sqrt().mean()
            wrong["bias"] = differs((ratio / scale - plain)[0], case["bias"], 1e-3)
        return wrong | gradients(loss, case, log_prob, mean)

    every(tensors(FILE, "guard_release"), run)


def test_repaired_the_guard_tells_samples_apart():
    """One shift a sample, as the script means it. Where all samples are at one time that is our default; where they are
    not, the script and verl-omni share the mean of their scales, and ours does not."""

    def run(case):
        if "ratio_repaired" not in case:
            return {}
        log_prob, mean, size, std = arrays(case)
        plain = log_prob - case["old_log_prob"]
        shared, own = (
            guard_log_ratio(plain, mean, case["old_mean"], std, size, v) for v in ("shared_scale", "repaired")
        )
        advantage = clip_advantages(case["advantages"], case["adv_clip_max"])
        weight = guard_weight(weights(case), size, "shared_scale")
        got = policy_loss(scored(shared, advantage, weight), clipped(case["clip_range"]))
        one_time = bool((std == std[0]).all())
        return {
            "ratio": differs(shared.exp(), case["ratio_repaired"]),
            "policy_loss": differs(got.policy, case["policy_loss_repaired"]),
            "ours": differs(own.exp(), case["ratio_repaired"]) if one_time else None,
        }

    every(tensors(FILE, "guard_release"), run)


def verl_omni(case, log_ratio, loss, plain):
    shares = ratio_summary(log_ratio, case["clip_range"], case["clip_range"], "release")
    return {
        "loss": differs(loss, case["loss"]),
        "ppo_kl": differs(ratio_summary(plain)["kl"], case["ppo_kl"]),
        "pg_clipfrac": differs(shares["clipped"], case["pg_clipfrac"]),
        "pg_clipfrac_higher": differs(shares["above"], case["pg_clipfrac_higher"]),
        "pg_clipfrac_lower": differs(shares["below"], case["pg_clipfrac_lower"]),
        "ratio_mean": differs(shares["mean"], case["ratio_mean"]),
        "ratio_std": differs(shares["std"], case["ratio_std"], 1e-3),
    }


@pytest.mark.parametrize("kind", ["guard_per_sample", "clip"])
def test_verl_omnis_clipped_losses_are_reproduced(kind):
    def run(case):
        log_prob, mean, size, std = arrays(case)
        plain = log_prob - case["old_log_prob"]
        ratio, weight = plain, weights(case)
        if kind == "guard_per_sample":
            ratio = guard_log_ratio(plain, mean, case["old_mean"], std, size, "shared_scale")
            weight = guard_weight(weight, size, "shared_scale")
        advantage = clip_advantages(case["advantages"], case["adv_clip_max"])
        loss = policy_loss(scored(ratio, advantage, weight), clipped(case["clip_range"])).loss
        return verl_omni(case, ratio, loss, plain) | gradients(loss, case, log_prob, mean)

    every(tensors(FILE, kind), run)


def test_verl_omnis_dppo_is_reproduced():
    def run(case):
        log_prob, mean, _, std = arrays(case)
        plain, advantage = log_prob - case["old_log_prob"], case["advantages"]
        deviation = std if case["kl_with_variance"] else torch.ones_like(std)
        kl = mean_kl(mean, case["old_mean"], deviation)
        given_scored = scored(plain, advantage, weights(case))
        kept, bounds, masked = dppo(given_scored, LossSettings(), kl, case["kl_mask_threshold"])
        loss, shares = policy_loss(kept, bounds).loss, ratio_summary(plain)
        got = {
            "loss": loss,
            "ppo_kl": shares["kl"],
            "approx_kl": shares["kl_squared"],
            "ratio_mean": shares["mean"],
            "ratio_std": shares["std"],
            "ratio_min": shares["min"],
            "ratio_max": shares["max"],
            "kl_new_old_mean": kl.mean(),
            "kl_new_old_max": kl.max(),
            "kl_mask_fraction": (kl >= case["kl_mask_threshold"]).float().mean(),
            "pos_rm_fraction": (masked & (advantage > 0)).float().mean(),
            "neg_rm_fraction": (masked & (advantage < 0)).float().mean(),
            "masked_fraction": masked.float().mean(),
            "unmasked_fraction": (~masked).float().mean(),
        }
        wrong = {name: differs(value, case[name]) for name, value in got.items()}
        return wrong | gradients(loss, case, log_prob, mean)

    every(tensors(FILE, "dppo"), run)


def bagel_pass(case, **options):
    times = uniform_times(case["schedule_points"] - 1, case["shift"])
    first, count = case["first_step"], len(case["times"])
    at, to = times[first : first + count], times[first + 1 : first + 1 + count]
    sampler = Sde(noise_level=case["noise_level"], sigma_at_one=float(times[1]), constants=False)
    velocity = case["velocity"].clone().requires_grad_()
    got = score_steps(
        sampler,
        case["latents"],
        case["next_latents"],
        velocity,
        at,
        to,
        case["old_log_probs"],
        reference_velocity_N=case["reference_velocity"] if case["beta"] else None,
        **options,
    )
    return got, velocity, at, to


def test_bagels_learning_pass_is_reproduced():
    """The release steps the optimiser after every step of the window, so its gradients are those of a sum, though it
    reports means. Without a KL it reports one of -1, which is no number of ours."""

    def run(case):
        got, velocity, at, _ = bagel_pass(case, variant="release")
        count = len(at)
        advantage = clip_advantages(torch.full((count,), case["advantage"]), case["adv_clip_max"])
        bounds = clipped(case["clip_lower"], case["clip_upper"], case["beta"])
        loss = policy_loss(scored(got.log_ratio_N, advantage, divergence=got.divergence_N), bounds)
        shares = ratio_summary(got.log_ratio_N, case["clip_lower"], case["clip_upper"])
        (loss.loss * count).backward()
        return {
            "times": differs(at, case["times"]),
            "policy_loss": differs(loss.policy, case["policy_loss"]),
            "kl_loss": differs(got.divergence_N.mean(), case["kl_loss"]) if case["beta"] else None,
            "loss": differs(loss.loss, case["loss"]),
            "clipped": differs(shares["clipped"], case["clipped"]),
            "clipped_above": differs(shares["above"], case["clipped_above"]),
            "clipped_below": differs(shares["below"], case["clipped_below"]),
            "velocity_grad": differs(velocity.grad, case["velocity_grad"]),
        }

    every(tensors(FILE, "bagel_learn"), run)


def test_repaired_bagels_kl_has_the_step_in_it():
    """The release divides by the coefficient's square without the step, so its KL is the true one times the step."""

    def run(case):
        if not case["beta"]:
            return {}
        (release, _, at, to), repaired = bagel_pass(case, variant="release"), bagel_pass(case)[0]
        return {"kl": differs(repaired.divergence_N * (at - to), release.divergence_N)}

    every(tensors(FILE, "bagel_learn"), run)
