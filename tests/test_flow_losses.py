"""rl/flow_losses.py: ratios, divergences and masks of denoising steps, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from flow_helpers import random_step, rows, scored

from policy.scoring.dpm import History
from policy.scoring.flow import Cps, Dance, Dpm, Sde, step
from record.trajectory import DecisionKind
from rl.flow_losses import (
    clip_advantages,
    dppo,
    guard_log_ratio,
    guard_weight,
    mean_kl,
    ratio_summary,
    score_steps,
    step_log_ratio,
    velocity_mse,
)
from rl.losses import SUMS, ClipRange, LossSettings, policy_loss, summarise
from runtime.errors import UserError

WORD, FLOW = DecisionKind.WORD, DecisionKind.FLOW


# ---- by hand -----------------------------------------------------------------------------------------------------


def test_ratio_by_hand():
    # deviation 2, old mean 0, new mean 1: at x' = 3 (9 - 4) / 8, at x' = 0 (0 - 1) / 8, averaged over both
    got = step_log_ratio(rows([3.0, 0.0]), rows([1.0, 1.0]), rows([0.0, 0.0]), rows(2.0))
    torch.testing.assert_close(got, rows((5 / 8 - 1 / 8) / 2))


def test_ratio_norm_by_hand():
    # q = 2: the mean of Delta mu^2 / (2 q^2) is 1/8, so 2 (1/4 + 1/8); it is the mean of Delta mu z, z = x' / 2
    new, old, std, size = rows([1.0, 1.0]), rows([0.0, 0.0]), rows(2.0), rows(0.25)
    ratio = step_log_ratio(rows([3.0, 0.0]), new, old, std)
    got = guard_log_ratio(ratio, new, old, std, size)
    torch.testing.assert_close(got, rows(0.75))
    torch.testing.assert_close(got, rows((3 / 2 + 0) / 2))
    # what was recorded is a constant
    old.requires_grad_()
    (guard_log_ratio(step_log_ratio(rows([3.0, 0.0]), new.requires_grad_(), old, std), new, old, std, size)).backward()
    assert old.grad is None and new.grad.abs().sum() > 0
    # the weight is divided by the step's size
    torch.testing.assert_close(guard_weight(rows(0.5), size), rows(2.0))


def test_advantages_are_cut_off_on_both_sides():
    assert clip_advantages(torch.tensor([-7.0, -5.0, 0.5, 9.0]), 5.0).tolist() == [-5, -5, 0.5, 5]


def test_ratio_norm_takes_the_shift_away_and_makes_the_spread_the_same():
    """Under the old policy the log-ratio of a step is below 0 on average, and RatioNorm's is 0: it is linear in the
    noise, 1/2 z averaged over 4 elements, at steps of deviation 0.3 and 1.2 alike."""
    count, std = 20000, rows(0.3, 1.2)
    noise = torch.randn(count, 2, 4, generator=torch.Generator().manual_seed(0))
    old, new = torch.zeros(2 * count, 4), torch.full((2 * count, 4), 0.5)
    std_N = std.repeat(count)
    plain = step_log_ratio((std[:, None] * noise).reshape(-1, 4), new, old, std_N)
    normed = guard_log_ratio(plain, new, old, std_N, torch.full((2 * count,), 0.1))
    torch.testing.assert_close(plain.reshape(-1, 2).mean(0), -0.25 / (2 * std**2), rtol=0.02, atol=0)
    torch.testing.assert_close(normed.reshape(-1, 2).mean(0), rows(0.0, 0.0), rtol=0, atol=0.01)
    torch.testing.assert_close(normed.reshape(-1, 2).std(0), rows(0.25, 0.25), rtol=0.02, atol=0)


def test_one_samples_drift_does_not_move_another_ones_ratio():
    mean, old, std, size = torch.randn(3, 4), torch.randn(3, 4), rows(0.5, 0.5, 0.5), rows(0.1, 0.1, 0.1)
    further = torch.cat([mean[:2], mean[2:] + 3])
    for variant, moved in (("repaired", False), ("shared_scale", False), ("release", True)):
        before, after = (guard_log_ratio(torch.zeros(3), m, old, std, size, variant)[:2] for m in (mean, further))
        assert torch.equal(before, after) is not moved, variant
    # nor does another sample's time, in ours alone
    later = torch.tensor([0.5, 0.5, 1.5])
    for variant, moved in (("repaired", False), ("shared_scale", True), ("release", True)):
        before, after = (guard_log_ratio(torch.zeros(3), mean, old, q, size, variant)[:2] for q in (std, later))
        assert torch.equal(before, after) is not moved, variant


def test_divergences_by_hand():
    mean, reference = rows([1.0, 3.0], [0.0, 0.0]).requires_grad_(), rows([0.0, 1.0], [0.0, 2.0]).requires_grad_()
    # (1 + 4) / 2 / (2 1/4) and (0 + 4) / 2 / (2 1)
    torch.testing.assert_close(mean_kl(mean, reference, rows(0.5, 1.0)), rows(5.0, 1.0))
    # the released scripts' is the step's size times that
    torch.testing.assert_close(mean_kl(mean, reference, rows(0.5, 1.0), rows(0.1, 0.2), "release"), rows(0.5, 0.2))
    torch.testing.assert_close(velocity_mse(mean, reference), rows(2.5, 2.0))
    (mean_kl(mean, reference, rows(0.5, 1.0)) + velocity_mse(mean, reference)).sum().backward()
    assert reference.grad is None and mean.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="needs the sizes"):
        mean_kl(mean, reference, rows(0.5, 1.0), variant="release")


def test_the_kl_is_torchs_own():
    mean, reference = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    std = rows(0.3, 0.7, 1.5)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std[:, None]), normal(reference, std[:, None])).mean(1)
    torch.testing.assert_close(mean_kl(mean, reference, std), expected)


def test_dppo_masks_what_is_far_and_moves_on():
    # advantages +, -, +, -; all far but the last; the first two move on, the third comes back
    log_ratio = torch.tensor([0.5, -0.5, -0.5, -0.5, 0.5]).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    far = torch.tensor([0.3, 0.2, 0.3, 0.1, 0.9])
    given_scored = scored(log_ratio, advantage, torch.ones(5), torch.full((5,), 2.0), [2, 2, 2, 2, 0])
    kept, bounds, masked = dppo(given_scored, LossSettings(beta=0.1, use_bias_correction_kl=False), far, 0.2)
    assert masked.tolist() == [True, True, False, False, False]
    loss = policy_loss(kept, bounds)
    # a ratio of e^-1/2 is far outside any clip range but counts in full; the word is clipped at 1.2 as ever
    e = math.exp(-0.5)
    assert loss.policy.item() == pytest.approx(-e + e - 1.2)
    # masked steps keep their divergence, and count
    assert loss.loss.item() == pytest.approx(-1.2 + 0.1 * 2.0 * 5)
    assert loss.sums_KM[FLOW, SUMS.index("decisions")] == 4
    loss.loss.backward()
    assert log_ratio.grad.tolist() == pytest.approx([0.0, 0.0, -e, e, 0.0])


def test_a_masked_ratio_that_overflows_leaves_no_trace():
    log_ratio = torch.tensor([1000.0, 0.0]).requires_grad_()
    kept, bounds, masked = dppo(scored(log_ratio, torch.ones(2)), LossSettings(), torch.tensor([9.0, 0.0]), 1.0)
    loss = policy_loss(kept, bounds).loss
    loss.backward()
    assert masked.tolist() == [True, False] and loss.item() == -0.5 and log_ratio.grad.tolist() == [0.0, -0.5]


def test_summary_of_ratios_by_hand():
    got = ratio_summary(torch.tensor([0.5, 1.0, 1.5]).log(), low=0.2, high=0.6)
    assert got["mean"] == pytest.approx(1) and got["std"] == pytest.approx(math.sqrt(1 / 6), rel=1e-5)
    assert got["below"] == pytest.approx(1 / 3) and got["above"] == 0 and got["clipped"] == pytest.approx(1 / 3)
    assert got["min"] == pytest.approx(0.5) and got["max"] == pytest.approx(1.5)
    assert got["kl"] == pytest.approx(-math.log(0.75) / 3, rel=1e-5)
    # one ratio has no spread; the release calls that not a number
    assert ratio_summary(torch.zeros(1))["std"] == 0 and math.isnan(
        ratio_summary(torch.zeros(1), variant="release")["std"]
    )


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: guard_weight(rows(1.0), rows(1.0), "guard"), "no variant of RatioNorm 'guard'.*shared_scale"),
        (lambda: score_for(ratio="norm"), "no ratio 'norm'.*guard, plain"),
        (lambda: score_for(anchor="kl"), "no anchor 'kl'.*mean_kl, velocity_mse"),
        (lambda: score_for(variant="released"), "no variant of RatioNorm 'released'; did you mean 'release'"),
        (lambda: mean_kl(rows([1.0]), rows([1.0]), rows(1.0), variant="old"), "no variant 'old'"),
        (lambda: ratio_summary(rows(0.0), variant="old"), "no variant 'old'"),
    ],
)
def test_what_is_not_known_is_named(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


def test_ratio_norm_without_the_old_means_is_refused():
    with pytest.raises(ValueError, match="RatioNorm needs the old means"):
        score_for(ratio="guard")


# ---- one pass over recorded steps --------------------------------------------------------------------------------

SAMPLERS = [Sde(noise_level=0.8, sigma_at_one=0.95), Cps(noise_level=0.6), Dance(noise_level=0.4, constants=False)]
by_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.name)


def recorded(sampler, seed=0):
    x, velocity, noise, sigma, sigma_next = random_step(seed, 4, (3, 2))
    return x, velocity, sigma, sigma_next, step(sampler, x, velocity, sigma, sigma_next, noise)


def score_for(sampler=SAMPLERS[0], moved=0.0, **options):
    x, velocity, sigma, sigma_next, taken = recorded(sampler)
    new = (velocity + moved).requires_grad_()
    return score_steps(sampler, x, taken.x_next_B, new, sigma, sigma_next, taken.log_prob_B, **options), new, taken


@by_sampler
@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_the_same_weights_have_ratio_one(sampler, ratio):
    got, _, taken = score_for(sampler, ratio=ratio, old_mean_N=recorded(sampler)[-1].mean_B)
    assert got.log_ratio_N.eq(0).all()
    torch.testing.assert_close(got.log_prob_N, taken.log_prob_B)
    assert got.divergence_N is None


@by_sampler
def test_ratios_with_and_without_the_old_means_are_one_number(sampler):
    with_means, new, taken = score_for(sampler, 0.2, old_mean_N=recorded(sampler)[-1].mean_B)
    without, other, _ = score_for(sampler, 0.2)
    torch.testing.assert_close(with_means.log_ratio_N, without.log_ratio_N, rtol=1e-4, atol=1e-5)
    with_means.log_ratio_N.sum().backward()
    without.log_ratio_N.sum().backward()
    torch.testing.assert_close(new.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_ratios_of_narrow_steps_are_exact_beyond_the_clip_range():
    """GRPO-Guard clips at 2e-6. Log-probs of a step are of size 1, whose last bit in float32 is 1e-7; the difference of
    two is several bits off, while the ratio made from the means keeps seven digits."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(64, 4096, generator=generator, dtype=torch.float64)
    new = old + 1e-6 * torch.randn(64, 4096, generator=generator, dtype=torch.float64)
    std = torch.full((64,), 0.05, dtype=torch.float64)
    reached = old + 0.05 * torch.randn(64, 4096, generator=generator, dtype=torch.float64)
    x32, new32, old32, std32 = (t.float() for t in (reached, new, old, std))
    exact = step_log_ratio(*(t.double() for t in (x32, new32, old32, std32)))

    def log_prob(mean):
        return (-0.5 * ((x32 - mean) / std32[:, None]).square()).mean(1) - std32.log()

    by_means = (step_log_ratio(x32, new32, old32, std32) - exact).abs().max()
    by_difference = (log_prob(new32) - log_prob(old32) - exact).abs().max()
    assert by_means < 1e-9 and by_difference > 1e-7


@by_sampler
def test_anchors_are_to_the_references_flow(sampler):
    velocity = recorded(sampler)[1]
    for anchor in ("mean_kl", "velocity_mse"):
        got, new, _ = score_for(sampler, 0.5, anchor=anchor, reference_velocity_N=velocity)
        if anchor == "velocity_mse":
            torch.testing.assert_close(got.divergence_N, torch.full((4,), 0.25))
        assert (got.divergence_N > 0).all()
        got.divergence_N.sum().backward()
        assert new.grad.abs().sum() > 0
        same, _, _ = score_for(sampler, anchor=anchor, reference_velocity_N=velocity)
        assert same.divergence_N.eq(0).all()


def test_a_multistep_step_is_scored_under_what_it_was_conditioned_on():
    x, velocity, noise, sigma, sigma_next = random_step(1)
    sampler = Dpm(order=2)
    history = History((sigma + 0.01)[None], torch.randn(1, *x.shape), torch.tensor([2, 1, 2]))
    taken = step(sampler, x, velocity, sigma, sigma_next, noise, history=history)
    arguments = (sampler, x, taken.x_next_B, velocity, sigma, sigma_next, taken.log_prob_B)
    options = {"old_mean_N": taken.mean_B, "reference_velocity_N": velocity}
    got = score_steps(*arguments, **options, history=history)
    assert got.log_ratio_N.eq(0).all() and got.divergence_N.eq(0).all()
    forgotten = score_steps(*arguments, **options).log_ratio_N
    assert forgotten[1] == 0 and (forgotten[[0, 2]] != 0).all()


def test_a_pass_of_words_and_steps_is_one_loss():
    """Denoising steps have their own clip range beside words, and their own line in the log."""
    got, new, _ = score_for(SAMPLERS[0], 0.2, old_mean_N=recorded(SAMPLERS[0])[-1].mean_B)
    log_ratio = torch.cat([torch.tensor([0.1]), got.log_ratio_N])
    advantage = torch.ones(5)
    loss = policy_loss(
        scored(log_ratio, advantage, torch.ones(5), kind=[WORD, FLOW, FLOW, FLOW, FLOW]),
        LossSettings(clip={WORD: ClipRange(0.2, 0.2), FLOW: ClipRange(1e-4, 1e-4)}),
    )
    ratio = got.log_ratio_N.exp().detach()
    expected = -math.exp(0.1) - torch.minimum(ratio, ratio.clamp(1 - 1e-4, 1 + 1e-4)).sum()
    assert loss.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert summarise(loss.sums_KM)["trained/flow_decisions"] == 4
    loss.loss.backward()
    above = ratio > 1 + 1e-4
    assert new.grad[above].eq(0).all() and new.grad[~above].abs().sum() > 0
