"""Our loss and our advantages against TRL's own code, on the same text-only tensors."""

from __future__ import annotations

import itertools
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import nanstd

from record.trajectory import Author, DecisionKind, Modality, Segment, Trajectory
from rl.advantages import compute_advantages
from rl.config import GrpoConfig
from rl.losses import (
    IMPORTANCE_MODES,
    ClipRange,
    Layout,
    LossSettings,
    ScoredDecisions,
    decision_weights,
    policy_loss,
    summarise,
)

ROWS, LENGTH, MAX_COMPLETION_LENGTH = 5, 9, 32


def batch(seed: int = 0):
    """Log-probs around each other, ragged completions, one of them empty of neither sign."""
    generator = torch.Generator().manual_seed(seed)
    logps_BT = -torch.rand(ROWS, LENGTH, generator=generator, dtype=torch.float64) * 3
    old_BT = logps_BT + torch.randn(ROWS, LENGTH, generator=generator, dtype=torch.float64) * 0.4
    reference_BT = logps_BT + torch.randn(ROWS, LENGTH, generator=generator, dtype=torch.float64) * 0.3
    lengths_B = torch.tensor([9, 4, 7, 1, 6])
    mask_BT = (torch.arange(LENGTH) < lengths_B[:, None]).long()
    advantage_B = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    return logps_BT, old_BT, reference_BT, mask_BT, advantage_B


def trl_loss(
    logps_BT,
    old_BT,
    reference_BT,
    mask_BT,
    advantage_B,
    *,
    loss_type,
    epsilon_high,
    delta,
    beta,
    bias_correction,
    level,
    importance_BT=None,
):
    """GRPOTrainer._compute_loss itself, on an object that has only what that method reads."""
    trainer = object.__new__(GRPOTrainer)
    accelerator = SimpleNamespace(
        num_processes=1, reduce=lambda t, reduction=None: t, gather=lambda t: t, sync_gradients=True
    )
    trainer.__dict__.update(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=epsilon_high,
        use_vllm=importance_BT is not None,
        vllm_importance_sampling_correction=importance_BT is not None,
        max_completion_length=MAX_COMPLETION_LENGTH,
        current_gradient_accumulation_steps=1,
        accelerator=accelerator,
        _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=bias_correction, steps_per_generation=1),
    )
    entropies_BT = torch.zeros_like(logps_BT)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logps_BT, entropies_BT, None)
    ids_BT = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    inputs = {
        "prompt_ids": ids_BT[:, :1],
        "prompt_mask": ids_BT[:, :1] + 1,
        "completion_ids": ids_BT,
        "completion_mask": mask_BT,
        "advantages": advantage_B,
        "old_per_token_logps": old_BT,
        "ref_per_token_logps": reference_BT,
        "num_items_in_batch": mask_BT.sum(),
        "importance_sampling_ratio": importance_BT,
    }
    return trainer._compute_loss(trainer.model, inputs), trainer._metrics["train"]


def our_loss(
    logps_BT,
    old_BT,
    reference_BT,
    mask_BT,
    advantage_B,
    *,
    loss_type,
    epsilon_high,
    delta,
    beta,
    bias_correction,
    level,
    behaviour_BT=None,
    cap=None,
    mode="token_truncate",
):
    """The same rows as trajectories of one text segment."""
    layout = Layout(np.arange(ROWS), np.zeros(ROWS, int), mask_BT.sum(-1).numpy(), np.ones(ROWS), ROWS)
    weight_B = torch.from_numpy(decision_weights(layout, loss_type, MAX_COMPLETION_LENGTH))
    row_N, column_N = mask_BT.nonzero(as_tuple=True)
    new_N, reference_N = logps_BT[row_N, column_N], reference_BT[row_N, column_N]
    settings = LossSettings(
        clip={DecisionKind.WORD: ClipRange(0.2, epsilon_high, delta)},
        beta=beta,
        use_bias_correction_kl=bias_correction,
        importance_sampling_level=level,
        importance_sampling_cap=cap,
        importance_sampling_mode=mode,
    )
    scored = ScoredDecisions(
        log_ratio_N=new_N - old_BT[row_N, column_N],
        advantage_N=advantage_B[row_N],
        kind_N=torch.zeros_like(row_N),
        weight_N=weight_B[row_N],
        trajectory_N=row_N,
        divergence_N=torch.exp(reference_N - new_N) - (reference_N - new_N) - 1,
        behaviour_log_ratio_N=None if behaviour_BT is None else (old_BT - behaviour_BT)[row_N, column_N],
    )
    return policy_loss(scored, settings)


CASES = itertools.product(
    ["grpo", "dr_grpo", "dapo", "bnpo"],
    [0.2, 0.28],
    [None, 1.5],
    [(0.0, True), (0.04, True), (0.04, False)],
    ["token", "sequence"],
)


@pytest.mark.parametrize("loss_type, epsilon_high, delta, kl, level", CASES)
def test_loss_and_gradient_equal_trl(loss_type, epsilon_high, delta, kl, level):
    options = dict(
        loss_type=loss_type, epsilon_high=epsilon_high, delta=delta, beta=kl[0], bias_correction=kl[1], level=level
    )
    logps_BT, *rest = batch()
    theirs_BT, ours_BT = logps_BT.clone().requires_grad_(), logps_BT.clone().requires_grad_()
    theirs, _ = trl_loss(theirs_BT, *rest, **options)
    ours = our_loss(ours_BT, *rest, **options).loss
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    theirs.backward()
    ours.backward()
    torch.testing.assert_close(ours_BT.grad, theirs_BT.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", IMPORTANCE_MODES)
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_importance_sampling_equals_trl(loss_type, mode):
    logps_BT, old_BT, reference_BT, mask_BT, advantage_B = batch(seed=1)
    behaviour_BT = old_BT + torch.randn(ROWS, LENGTH, generator=torch.Generator().manual_seed(2)).double()
    difference_BT = (old_BT - behaviour_BT) * mask_BT
    if mode.startswith("sequence"):
        difference_BT = difference_BT.sum(-1, keepdim=True)
    importance_BT = torch.exp(difference_BT)
    over_BT = importance_BT > 1.5
    assert over_BT.any() and not over_BT.all()
    importance_BT = importance_BT.masked_fill(over_BT, 0.0 if mode.endswith("mask") else 1.5)
    options = dict(loss_type=loss_type, epsilon_high=0.2, delta=None, beta=0.04, bias_correction=True, level="token")
    args = (logps_BT, old_BT, reference_BT, mask_BT, advantage_B)
    theirs, _ = trl_loss(*args, **options, importance_BT=importance_BT)
    ours = our_loss(*args, **options, behaviour_BT=behaviour_BT, cap=1.5, mode=mode).loss
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


def test_clip_fractions_and_kl_equal_trl():
    options = dict(loss_type="dapo", epsilon_high=0.28, delta=None, beta=0.04, bias_correction=True, level="token")
    _, theirs = trl_loss(*batch(), **options)
    ours = summarise(our_loss(*batch(), **{**options, "bias_correction": False}).sums_KM)
    assert ours["clip/low"] == pytest.approx(theirs["clip_ratio/low_mean"][0])
    assert ours["clip/high"] == pytest.approx(theirs["clip_ratio/high_mean"][0])
    _, plain = trl_loss(*batch(), **{**options, "bias_correction": False})
    assert ours["kl"] == pytest.approx(plain["kl"][0])


def trl_advantages(rewards_BG: torch.Tensor, scale: str) -> torch.Tensor:
    """TRL 1.16 GRPOTrainer._generate_and_score_completions, sum_then_normalize: its lines, on its nanstd."""
    mean_B1 = torch.nanmean(rewards_BG, dim=1, keepdim=True)
    advantages_BG = rewards_BG - mean_B1
    if scale == "group":
        advantages_BG = advantages_BG / (nanstd(rewards_BG, dim=1, keepdim=True) + 1e-4)
    elif scale == "batch":
        advantages_BG = advantages_BG / (nanstd(rewards_BG.reshape(-1)) + 1e-4)
    return torch.nan_to_num(advantages_BG, nan=0.0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trl(scale):
    rewards_BG = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rewards_BG[1, 2] = rewards_BG[3, 0] = rewards_BG[3, 1] = float("nan")
    groups = [
        [
            Trajectory(
                "",
                {},
                "",
                [Segment("answer", Author.POLICY, Modality.TEXT, True)],
                group=g,
                member=m,
                reward=None if np.isnan(reward) else float(reward),
            )
            for m, reward in enumerate(row)
        ]
        for g, row in enumerate(rewards_BG.tolist())
    ]
    compute_advantages(groups, GrpoConfig(scale_rewards=scale))
    ours_BG = torch.tensor([[t.advantage_S[0] for t in group] for group in groups], dtype=torch.float64)
    torch.testing.assert_close(ours_BG, trl_advantages(rewards_BG, scale), atol=1e-6, rtol=1e-6)


def test_shared_defaults_are_those_of_trl():
    from dataclasses import fields

    from trl import GRPOConfig

    theirs = {field.name: field.default for field in fields(GRPOConfig)}
    departures = {"loss_type", "lr_scheduler_type", "warmup_steps", "max_grad_norm"}  # the last two: base classes'
    for name, info in GrpoConfig.model_fields.items():
        if name in theirs and name not in departures:
            assert info.default == theirs[name], name
