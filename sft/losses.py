"""The warm start's losses: cross-entropy over what the policy would decide, and those that its family offers.

Letters: P passes of a batch, S segments, N decisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from policy.base import Pass, Policy, Scored
from policy.extra_losses import ExtraLoss, ExtraLosses
from record.trajectory import Author, DecisionKind, Modality, Trajectory
from runtime.errors import UserError
from sft.demonstrations import WRONG_IMAGES

PADDING = "padding"  # the role of what stands in no segment


@dataclass(frozen=True)
class Learned:
    """What the scored decisions of a batch are, as the loss and its log ask."""

    weight_N: Tensor  # float32, by role
    role_N: Tensor  # int64, into the roles
    verdict_N: Tensor  # int64, into the verdicts; -1: of none
    code_N: Tensor  # bool: a visual code


def learned(
    passes: Sequence[Pass],
    scored: Scored,
    roles: Sequence[str],
    role_weights: Mapping[str, float],
    verdicts: Sequence[str] = (),
) -> Learned:
    """Weights, roles and verdicts of decisions, by the segments that they stand in.

    Args:
        roles: those that `role_N` counts; PADDING is that of what is in no segment.
        role_weights: 1 where none is given.
        verdicts: those of `verdict_names` that `verdict_N` counts.
    """
    number_of = {role: number for number, role in enumerate(roles)}
    verdict_of = {verdict: number for number, verdict in enumerate(verdicts)}
    most = max((len(one.trajectory.segments) for one in passes), default=0)
    # One more column, which index -1 finds: padding.
    role_PS = np.full((len(passes), most + 1), number_of.get(PADDING, 0), np.int64)
    weight_PS = np.ones((len(passes), most + 1), np.float32)
    verdict_PS = np.full((len(passes), most + 1), -1, np.int64)
    for number, one in enumerate(passes):
        own = [segment.role for segment in one.trajectory.segments]
        role_PS[number, : len(own)] = [number_of.get(role, 0) for role in own]
        weight_PS[number, : len(own)] = [role_weights.get(role, 1.0) for role in own]
        if verdict_of:
            verdict_PS[number, : len(own)] = [verdict_of.get(name, -1) for name in verdicts_of(one.trajectory)]
    at = (scored.pass_N, scored.segment_N)
    device = scored.logprob_N.device
    role_N, weight_N, verdict_N = (
        torch.from_numpy(values).to(device)[at] for values in (role_PS, weight_PS, verdict_PS)
    )
    return Learned(weight_N, role_N, verdict_N, scored.kind_N == DecisionKind.CODE)


def verdicts_of(trajectory: Trajectory) -> list[str]:
    """By segment: "<role>/right" or "<role>/wrong" for the policy's words after an image of its own that is known to be
    right or wrong; empty for all else, and where nobody knows (`info` lacks WRONG_IMAGES)."""
    wrong = trajectory.info.get(WRONG_IMAGES)
    names, verdict = [], ""
    for number, segment in enumerate(trajectory.segments):
        words = segment.author is Author.POLICY and segment.modality is Modality.TEXT
        names.append(f"{segment.role}/{verdict}" if verdict and words else "")
        if segment.author is Author.POLICY and not words and wrong is not None:
            verdict = "wrong" if number in wrong else "right"
    return names


def verdict_names(trajectories: Sequence[Trajectory]) -> list[str]:
    """The names by which losses are split, sorted: of roles that speak of right images and of wrong ones."""
    found = {name for trajectory in trajectories for name in verdicts_of(trajectory)} - {""}
    roles = sorted({name.rpartition("/")[0] for name in found})
    both = [(f"{role}/right", f"{role}/wrong") for role in roles]
    return [name for pair in both if found.issuperset(pair) for name in pair]


def weighted_cross_entropy(logprob_N: Tensor, weight_N: Tensor, image_N: Tensor, image_weight: float) -> Tensor:
    """Weighted mean of -log p; visual codes weigh `image_weight` times as much."""
    weight_N = torch.where(image_N, image_weight * weight_N, weight_N)
    return -(weight_N * logprob_N).sum() / weight_N.sum().clamp_min(1e-8)


def losses_of(policy: Policy, asked: ExtraLosses) -> list[ExtraLoss]:
    """The family's own losses that the recipe asks for.

    Raises UserError for one that the family does not have.
    """
    own = getattr(policy, "extra_losses", None)
    found: list[ExtraLoss] = own(asked) if own is not None else []
    names = {loss.name for loss in found}
    if asked.visual.weight and "visual" not in names:
        raise UserError(
            f"sft.visual_loss: the family '{policy.family}' has no codebook to hold its images to; set "
            "sft.visual_loss: 0"
        )
    if asked.padding and "padding" not in names:
        raise UserError(
            f"sft.labels=release: it learns padding, which the family '{policy.family}' has none of; take "
            "sft.labels=default"
        )
    return found
