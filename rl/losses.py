"""The clipped policy-gradient loss: scored decisions in, one scalar and its sums out. Pure: tensors only.

A loss type is a weighting. `decision_weights` says what one decision of a segment counts for, from the counts of
the whole batch, and `policy_loss` is a weighted sum; so micro-batches and processes add up to the batch.
The trainer (trainer.py) brings the two together. Names and meanings: TRL's GRPOTrainer, to which
tests/test_trl_parity.py holds this file.

Letters: N decisions of one call, S segments of a batch (of all its trajectories, one after another), K kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from record.trajectory import DecisionKind

LOSS_TYPES = ("segment", "modality", "token", "grpo", "dr_grpo", "dapo", "bnpo")

# What is done with a ratio to the behaviour policy that is over the cap, and over what it is taken.
IMPORTANCE_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

# Columns of Loss.sums_KM: each is a sum over the decisions of one kind.
SUMS = ("decisions", "kl", "entropy", "clip_low", "clip_high", "importance", "importance_capped")


@dataclass(frozen=True)
class ClipRange:
    """Ratios are clipped to [1 - low, 1 + high]; `delta` bounds the unclipped term too (INTELLECT-2)."""

    low: float = 0.2
    high: float = 0.2
    delta: float | None = None  # None: one-sided, as in PPO


@dataclass(frozen=True)
class LossSettings:
    clip: Mapping[DecisionKind, ClipRange] = field(default_factory=lambda: {kind: ClipRange() for kind in DecisionKind})
    beta: float = 0.0
    use_bias_correction_kl: bool = True  # of estimates of the divergence, which words and codes have
    importance_sampling_level: str = "token"  # or "sequence": one ratio a trajectory
    importance_sampling_cap: float | None = None
    importance_sampling_mode: str = "token_truncate"  # of IMPORTANCE_MODES


@dataclass(frozen=True)
class ScoredDecisions:
    log_ratio_N: Tensor  # new weights against old; carries the gradient
    advantage_N: Tensor
    kind_N: Tensor  # int64, DecisionKind
    weight_N: Tensor  # what the decision counts for; 0: not at all, neither in the loss nor in the sums
    trajectory_N: Tensor  # int64; read only for ratios by sequence
    divergence_N: Tensor | None = None  # from the reference; carries the gradient. None: beta is 0
    behaviour_log_ratio_N: Tensor | None = None  # old weights against those that sampled; None: the same weights
    entropy_N: Tensor | None = None  # None: not measured, and 0 in the sums


@dataclass(frozen=True)
class Loss:
    loss: Tensor  # scalar; sums over micro-batches and processes to the loss of the batch
    policy: Tensor  # scalar, detached: `loss` without the divergence
    sums_KM: Tensor  # float64 [kinds, len(SUMS)], detached


def policy_loss(scored: ScoredDecisions, settings: LossSettings) -> Loss:
    """Clipped surrogate (arXiv:2402.03300, eq. 3) with the KL term, weighted and summed.

    Shapes: everything in `scored` is [N]. Raises ValueError when beta is set but no divergence is given.
    """
    counts_N = scored.weight_N != 0
    low_N, high_N, delta_N = _clip_bounds(settings.clip, scored.kind_N, scored.log_ratio_N.dtype)

    log_weight_N = scored.log_ratio_N
    if settings.importance_sampling_level == "sequence":
        log_weight_N = _mean_by_trajectory(log_weight_N, scored.trajectory_N, counts_N)
    ratio_N = torch.exp(log_weight_N)
    clipped_N = torch.clamp(ratio_N, 1 - low_N, 1 + high_N)
    bounded_N = torch.clamp(ratio_N, max=delta_N)
    surrogate_N = -torch.min(bounded_N * scored.advantage_N, clipped_N * scored.advantage_N)

    importance_N = capped_N = None
    if scored.behaviour_log_ratio_N is not None and settings.importance_sampling_cap is not None:
        importance_N, capped_N = importance_ratio(
            scored.behaviour_log_ratio_N.detach(), scored.trajectory_N, counts_N, settings
        )
        surrogate_N = surrogate_N * importance_N

    # Selecting, rather than multiplying by 0, keeps an overflowing ratio of an uncounted decision out of the sum.
    policy = (scored.weight_N * surrogate_N)[counts_N].sum()
    loss = policy
    if settings.beta:
        if scored.divergence_N is None:
            raise ValueError("beta is set, but the decisions carry no divergence from a reference")
        divergence_N = scored.divergence_N
        if settings.use_bias_correction_kl:
            # A denoising step's divergence is exact: there is no estimate to correct.
            divergence_N = torch.where(scored.kind_N == DecisionKind.FLOW, divergence_N, divergence_N * ratio_N)
        loss = policy + settings.beta * (scored.weight_N * divergence_N)[counts_N].sum()

    below_N = (bounded_N < 1 - low_N) & (scored.advantage_N < 0)
    above_N = (bounded_N > 1 + high_N) & (scored.advantage_N > 0)
    columns = (
        torch.ones_like(ratio_N),
        scored.divergence_N,
        scored.entropy_N,
        below_N,
        above_N,
        importance_N,
        capped_N,
    )
    return Loss(loss, policy.detach(), _sums(columns, scored.kind_N, counts_N))


def importance_ratio(
    log_ratio_N: Tensor, trajectory_N: Tensor, counts_N: Tensor, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """The factor on each decision's loss where other weights sampled than are trained, and where it was over the cap.

    As TRL's vllm_importance_sampling_mode: by decision ("token") or the product over the trajectory's decisions that
    count ("sequence"); over the cap it is cut to it ("truncate") or 0 ("mask"). No lower bound.

    Args:
        log_ratio_N: of the weights at the start of the update to those that sampled, detached.

    Raises ValueError without a cap, and for another mode.
    """
    mode, cap = settings.importance_sampling_mode, settings.importance_sampling_cap
    if mode not in IMPORTANCE_MODES or cap is None:
        raise ValueError(
            f"no importance sampling of mode '{mode}' with cap {cap}. Known: {', '.join(IMPORTANCE_MODES)}"
        )
    if mode.startswith("sequence"):
        log_ratio_N = _sum_by_trajectory(log_ratio_N, trajectory_N, counts_N)[0][trajectory_N]
    ratio_N = torch.exp(log_ratio_N)
    over_N = ratio_N > cap
    if mode.endswith("mask"):
        return ratio_N.masked_fill(over_N, 0.0), over_N
    return ratio_N.clamp(max=cap), over_N


def _clip_bounds(clip: Mapping[DecisionKind, ClipRange], kind_N: Tensor, dtype: torch.dtype) -> list[Tensor]:
    ranges = [clip.get(kind, ClipRange()) for kind in DecisionKind]
    table_K3 = torch.tensor(
        [[r.low, r.high, float("inf") if r.delta is None else r.delta] for r in ranges],
        dtype=dtype,
        device=kind_N.device,
    )
    return list(table_K3[kind_N].unbind(-1))


def _mean_by_trajectory(value_N: Tensor, trajectory_N: Tensor, counts_N: Tensor) -> Tensor:
    sum_B, count_B = _sum_by_trajectory(value_N, trajectory_N, counts_N)
    return (sum_B / count_B.clamp(min=1))[trajectory_N]


def _sum_by_trajectory(value_N: Tensor, trajectory_N: Tensor, counts_N: Tensor) -> tuple[Tensor, Tensor]:
    """(sum_B, count_B): over the decisions of each trajectory that count."""
    rows = int(trajectory_N.max()) + 1 if len(trajectory_N) else 0
    counted_N = counts_N.to(value_N.dtype)
    sum_B = value_N.new_zeros(rows).index_add(0, trajectory_N, value_N * counted_N)
    count_B = value_N.new_zeros(rows).index_add(0, trajectory_N, counted_N)
    return sum_B, count_B


def _sums(columns: tuple[Tensor | None, ...], kind_N: Tensor, counts_N: Tensor) -> Tensor:
    sums_KM = torch.zeros(len(DecisionKind), len(columns), dtype=torch.float64, device=kind_N.device)
    for index, column_N in enumerate(columns):
        if column_N is not None:
            sums_KM[:, index].index_add_(0, kind_N[counts_N], column_N.detach()[counts_N].double())
    return sums_KM


def summarise(sums_KM: Tensor) -> dict[str, float]:
    """Means over all decisions and by kind, from sums added over micro-batches and processes.

    Names: kl, clip/low, clip/high, entropy (each also /word, /code, /flow, for the kinds that occur),
    importance/mean and importance/capped where the behaviour policy was older, trained/<kind>_decisions.
    """
    names = {
        "kl": "kl",
        "entropy": "entropy",
        "clip_low": "clip/low",
        "clip_high": "clip/high",
        "importance": "importance/mean",
        "importance_capped": "importance/capped",
    }
    rows = {f"/{kind.name.lower()}": sums_KM[kind] for kind in DecisionKind if sums_KM[kind, 0] > 0}
    metrics = {f"trained{suffix}_decisions": float(row[0]) for suffix, row in rows.items()}
    for column, name in names.items():
        index = SUMS.index(column)
        if column.startswith("importance") and not sums_KM[:, SUMS.index("importance")].any():
            continue
        for suffix, row in {"": sums_KM.sum(0), **rows}.items():
            if row[0] > 0:
                metrics[name + suffix] = float(row[index] / row[0])
    return metrics


@dataclass(frozen=True)
class Layout:
    """The segments of one optimiser step's whole batch, over all micro-batches and processes."""

    trajectory_S: np.ndarray  # int, 0..trajectories-1
    modality_S: np.ndarray  # int, equal where the modality is
    count_S: np.ndarray  # int: decisions that count
    role_weight_S: np.ndarray  # float
    trajectories: int
    local_batch_S: np.ndarray | None = None  # int: which local batch holds the segment. None: there is one


def decision_weights(layout: Layout, loss_type: str, max_completion_length: int = 512) -> np.ndarray:
    """weight_S, float64: what one decision of a segment counts for.

    segment   1 / decisions of the segment / trajectories
    modality  1 / decisions of its modality in the trajectory / trajectories
    token, dapo  1 / decisions of the batch (arXiv:2503.14476, eq. 8)
    grpo      1 / decisions of the trajectory / trajectories (arXiv:2402.03300, eq. 3)
    dr_grpo   1 / max_completion_length / trajectories (arXiv:2503.20783)
    bnpo      1 / decisions of the local batch, averaged over local batches

    All are multiplied by the role's weight, after which a segment of weight 0 counts nowhere. Raises ValueError for
    another loss type.
    """
    count_S = np.where(layout.role_weight_S == 0, 0, layout.count_S).astype(np.float64)
    if loss_type == "segment":
        divisor_S = count_S * layout.trajectories
    elif loss_type == "modality":
        divisor_S = _total_by(count_S, layout.trajectory_S, layout.modality_S) * layout.trajectories
    elif loss_type in ("token", "dapo"):
        divisor_S = np.full_like(count_S, count_S.sum())
    elif loss_type == "grpo":
        divisor_S = _total_by(count_S, layout.trajectory_S) * layout.trajectories
    elif loss_type == "dr_grpo":
        divisor_S = np.full_like(count_S, max_completion_length * layout.trajectories)
    elif loss_type == "bnpo":
        local_S = np.zeros_like(layout.trajectory_S) if layout.local_batch_S is None else layout.local_batch_S
        divisor_S = _total_by(count_S, local_S) * len(np.unique(local_S))
    else:
        raise ValueError(f"no loss type '{loss_type}'. Known: {', '.join(LOSS_TYPES)}")
    return np.where(count_S > 0, layout.role_weight_S / np.maximum(divisor_S, 1), 0.0)


def _total_by(count_S: np.ndarray, *keys_S: np.ndarray) -> np.ndarray:
    """For each segment, the sum of count_S over the segments with the same keys."""
    if not len(count_S):
        return count_S
    _, index_S = np.unique(np.stack(keys_S), axis=1, return_inverse=True)
    index_S = index_S.reshape(-1)
    return np.bincount(index_S, weights=count_S)[index_S]
