"""rl/losses.py against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from record.trajectory import DecisionKind
from rl.losses import (
    LOSS_TYPES,
    SUMS,
    ClipRange,
    Layout,
    LossSettings,
    ScoredDecisions,
    decision_weights,
    policy_loss,
    summarise,
)

WORD, CODE = DecisionKind.WORD, DecisionKind.CODE


def scored(ratio, advantage, kind=None, weight=None, trajectory=None, divergence=None, behaviour=None, entropy=None):
    size = len(ratio)
    log_ratio_N = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    return ScoredDecisions(
        log_ratio_N=log_ratio_N,
        advantage_N=torch.tensor(advantage, dtype=torch.float64),
        kind_N=torch.tensor([int(k) for k in (kind or [WORD] * size)]),
        weight_N=torch.tensor(weight or [1.0] * size, dtype=torch.float64),
        trajectory_N=torch.tensor(trajectory or [0] * size),
        divergence_N=None if divergence is None else torch.tensor(divergence, dtype=torch.float64),
        behaviour_log_ratio_N=None if behaviour is None else torch.tensor(behaviour, dtype=torch.float64).log(),
        entropy_N=None if entropy is None else torch.tensor(entropy, dtype=torch.float64),
    )


def column(loss, kind, name):
    return float(loss.sums_KM[kind, SUMS.index(name)])


def test_ratio_one_gives_minus_the_advantages():
    loss = policy_loss(scored([1.0, 1.0, 1.0], [1.0, -0.5, 2.0], weight=[0.5, 0.5, 0.25]), LossSettings())
    assert loss.loss.item() == pytest.approx(-(0.5 - 0.25 + 0.5))


def test_clipping_stops_the_gradient_where_the_ratio_has_gone_far_enough():
    # advantage +1: clipped above 1.2 (value -1.2, no gradient), free below. advantage -1: clipped below 0.8.
    given_scored = scored([1.5, 0.5, 1.5, 0.5], [1.0, 1.0, -1.0, -1.0])
    loss = policy_loss(given_scored, LossSettings())
    assert loss.loss.item() == pytest.approx(-1.2 - 0.5 + 1.5 + 0.8)
    loss.loss.backward()
    # d(-ratio * A)/d log ratio = -ratio * A where it flows
    assert given_scored.log_ratio_N.grad.tolist() == pytest.approx([0.0, -0.5, 1.5, 0.0])
    assert column(loss, WORD, "clip_high") == 1 and column(loss, WORD, "clip_low") == 1


def test_clip_range_is_looked_up_by_kind():
    clip = {WORD: ClipRange(0.2, 0.3), CODE: ClipRange(0.05, 0.1)}
    loss = policy_loss(scored([1.5, 1.5], [1.0, 1.0], kind=[WORD, CODE]), LossSettings(clip=clip))
    assert loss.loss.item() == pytest.approx(-1.3 - 1.1)


def test_two_sided_clipping_bounds_what_a_negative_advantage_may_cost():
    unbounded = policy_loss(scored([50.0], [-1.0]), LossSettings())
    bounded = policy_loss(scored([50.0], [-1.0]), LossSettings(clip={WORD: ClipRange(0.2, 0.2, delta=4.0)}))
    assert unbounded.loss.item() == pytest.approx(50.0) and bounded.loss.item() == pytest.approx(4.0)


def test_kl_is_added_with_beta_and_with_the_ratio_when_corrected():
    plain = LossSettings(beta=0.1, use_bias_correction_kl=False)
    corrected = LossSettings(beta=0.1)
    assert policy_loss(scored([0.9], [1.0], divergence=[2.0]), plain).loss.item() == pytest.approx(-0.9 + 0.2)
    assert policy_loss(scored([0.9], [1.0], divergence=[2.0]), corrected).loss.item() == pytest.approx(-0.9 + 0.18)
    with pytest.raises(ValueError, match="no divergence"):
        policy_loss(scored([0.9], [1.0]), plain)


def test_an_older_behaviour_policy_is_weighted_in_and_the_weight_is_capped():
    # The second ratio of 5 is cut off at 2; a divergence is not multiplied by it.
    settings = LossSettings(importance_sampling_cap=2.0, beta=1.0, use_bias_correction_kl=False)
    loss = policy_loss(scored([1.0, 1.0], [1.0, 1.0], behaviour=[0.5, 5.0], divergence=[0.25, 0.25]), settings)
    assert loss.loss.item() == pytest.approx(-0.5 - 2.0 + 0.5)
    assert column(loss, WORD, "importance") == pytest.approx(2.5) and column(loss, WORD, "importance_capped") == 1


def test_an_importance_is_read_only_with_both_a_behaviour_policy_and_a_cap():
    """Without a cap nothing is weighted; without another policy there is nothing to weigh by."""
    for settings, behaviour in ((LossSettings(), [0.5, 5.0]), (LossSettings(importance_sampling_cap=2.0), None)):
        loss = policy_loss(scored([1.0, 1.0], [1.0, 1.0], behaviour=behaviour), settings)
        assert loss.loss.item() == pytest.approx(-2.0) and column(loss, WORD, "importance") == 0


def test_an_importance_at_the_cap_is_not_cut():
    loss = policy_loss(scored([1.0], [1.0], behaviour=[2.0]), LossSettings(importance_sampling_cap=2.0))
    assert loss.loss.item() == pytest.approx(-2.0) and column(loss, WORD, "importance_capped") == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "low", "high"),
    [
        (0.5, -0.5, 1, 0),
        (0.5, 0.5, 0, 0),  # going back is free
        (0.5, 0.0, 0, 0),
        (1.5, 0.5, 0, 1),
        (1.5, -0.5, 0, 0),
        (1.5, 0.0, 0, 0),
        (1.0, 0.5, 0, 0),
    ],
)
def test_clipped_are_those_whose_gradient_stopped(ratio, advantage, low, high):
    given_scored = scored([ratio], [advantage])
    loss = policy_loss(given_scored, LossSettings())
    assert (column(loss, WORD, "clip_low"), column(loss, WORD, "clip_high")) == (low, high)
    loss.loss.backward()
    assert (given_scored.log_ratio_N.grad.item() == 0) == bool(low or high or advantage == 0)


def test_ratio_by_sequence_is_the_geometric_mean_over_what_counts():
    # trajectory 0: sqrt(4 * 1) = 2, clipped to 1.2; its third decision has weight 0. trajectory 1: 0.9.
    loss = policy_loss(
        scored([4.0, 1.0, 100.0, 0.9], [1.0] * 4, weight=[1.0, 1.0, 0.0, 1.0], trajectory=[0, 0, 0, 1]),
        LossSettings(importance_sampling_level="sequence"),
    )
    assert loss.loss.item() == pytest.approx(-1.2 * 2 - 0.9)


def test_a_decision_of_weight_zero_counts_nowhere_even_if_it_overflows():
    given_scored = scored([1.0, 1.0], [1.0, -1.0], weight=[1.0, 0.0])
    overflowing = torch.tensor([0.0, 1000.0], dtype=torch.float64, requires_grad=True)
    loss = policy_loss(ScoredDecisions(**{**vars(given_scored), "log_ratio_N": overflowing}), LossSettings())
    assert loss.loss.item() == -1.0 and column(loss, WORD, "decisions") == 1


def test_summary_is_by_kind_and_over_all():
    loss = policy_loss(
        scored(
            [1.5, 1.0, 1.0],
            [1.0, 1.0, 1.0],
            kind=[WORD, CODE, CODE],
            divergence=[0.3, 0.0, 0.6],
            entropy=[1.0, 2.0, 4.0],
        ),
        LossSettings(),
    )
    metrics = summarise(loss.sums_KM + 0)
    assert metrics["clip/high"] == pytest.approx(1 / 3)
    assert metrics["clip/high/word"] == 1 and metrics["clip/high/code"] == 0
    assert metrics["entropy/word"] == 1 and metrics["entropy/code"] == 3 and metrics["kl"] == pytest.approx(0.3)
    assert metrics["trained/code_decisions"] == 2 and "importance/mean" not in metrics
    assert not any("flow" in name for name in metrics)  # no decision of this kind occurs


# Two trajectories. 0: plan of 2 words, sketch of 4 codes, inspect of 6 words. 1: plan of 3 words.
LAYOUT = Layout(
    trajectory_S=np.array([0, 0, 0, 1]),
    modality_S=np.array([0, 1, 0, 0]),
    count_S=np.array([2, 4, 6, 3]),
    role_weight_S=np.ones(4),
    trajectories=2,
)


@pytest.mark.parametrize(
    "loss_type, expected",
    [
        ("segment", [1 / 4, 1 / 8, 1 / 12, 1 / 6]),
        ("modality", [1 / 16, 1 / 8, 1 / 16, 1 / 6]),  # trajectory 0 has 8 words and 4 codes
        ("token", [1 / 15] * 4),
        ("dapo", [1 / 15] * 4),
        ("grpo", [1 / 24, 1 / 24, 1 / 24, 1 / 6]),
        ("dr_grpo", [1 / 200] * 4),
        ("bnpo", [1 / 15] * 4),
    ],
)
def test_weights(loss_type, expected):
    assert decision_weights(LAYOUT, loss_type, max_completion_length=100).tolist() == pytest.approx(expected)


def test_weights_by_local_batch():
    layout = Layout(**{**vars(LAYOUT), "local_batch_S": np.array([0, 0, 0, 1])})
    assert decision_weights(layout, "bnpo").tolist() == pytest.approx([1 / 24, 1 / 24, 1 / 24, 1 / 6])


def test_role_weight_scales_and_zero_leaves_the_role_out_of_the_count():
    layout = Layout(**{**vars(LAYOUT), "role_weight_S": np.array([2.0, 0.0, 1.0, 1.0])})
    assert decision_weights(layout, "segment").tolist() == pytest.approx([2 / 4, 0, 1 / 12, 1 / 6])
    assert decision_weights(layout, "token").tolist() == pytest.approx([2 / 11, 0, 1 / 11, 1 / 11])


def test_an_unknown_loss_type_is_named():
    with pytest.raises(ValueError, match="no loss type 'gspo'.*dr_grpo"):
        decision_weights(LAYOUT, "gspo")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(0, 9)), min_size=1, max_size=12))
def test_a_batch_of_equal_advantages_weighs_the_same_however_long_its_segments(segments):
    # The point of the two: an image of many codes weighs what a sentence of few words weighs.
    trajectory_S, modality_S, count_S = (np.array(x) for x in zip(*segments, strict=True))
    layout = Layout(trajectory_S, modality_S, count_S, np.ones(len(segments)), trajectories=4)
    by_segment = decision_weights(layout, "segment") * count_S
    assert by_segment.sum() == pytest.approx((count_S > 0).sum() / 4)
    by_modality = decision_weights(layout, "modality") * count_S
    assert by_modality.sum() == pytest.approx(len({(t, m) for t, m, n in segments if n}) / 4)
    for loss_type in ("token", "bnpo"):
        assert (decision_weights(layout, loss_type) * count_S).sum() == pytest.approx(float(count_S.sum() > 0))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up_to_the_batch(loss_type):
    rng = np.random.default_rng(0)
    segment_N = np.repeat(np.arange(4), LAYOUT.count_S)
    weight_N = decision_weights(LAYOUT, loss_type)[segment_N]
    ratio, advantage = np.exp(rng.normal(0, 0.3, 15)), rng.normal(0, 1, 15)

    def loss_of(keep):
        kept = scored(
            ratio[keep].tolist(),
            advantage[keep].tolist(),
            weight=weight_N[keep].tolist(),
            trajectory=LAYOUT.trajectory_S[segment_N][keep].tolist(),
        )
        return policy_loss(kept, LossSettings()).loss.item()

    first, second = segment_N < 3, segment_N == 3
    assert loss_of(first) + loss_of(second) == pytest.approx(loss_of(first | second), abs=1e-12)
    assert math.isfinite(loss_of(first))
