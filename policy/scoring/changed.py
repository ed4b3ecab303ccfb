"""Which visual codes of a redrawn image differ from the image before it, and weights that follow them.

Most of a redrawn image is a copy. Where all its codes weigh alike, the few that repair it drown in those that do not.

Letters: P passes, N decisions, C decisions of one segment.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from formats.base import Codes
from policy.base import Pass, Policy, Scored
from record.trajectory import Author, DecisionKind, Modality, Trajectory
from runtime.errors import UserError


def check_codes(policy: Policy, key: str) -> None:
    """Raises UserError where the family's images are no codes, of which some could differ."""
    if not isinstance(policy.vocabulary.imaging, Codes):
        raise UserError(
            f"{key}: it weighs visual codes, and the family '{policy.family}' draws no image as codes; set {key}: 1"
        )


def changed_codes(trajectory: Trajectory, segment: int) -> np.ndarray | None:
    """bool [C]: which decisions of a segment are codes that differ, at their place, from the policy's image before it.

    None where there is no such image, or one of another size. Greedy decisions are left out, as in `score`.
    """
    this = trajectory.segments[segment]
    if this.modality is not Modality.IMAGE_TOKENS or this.decisions is None:
        return None
    before = next(
        (
            other.ids
            for other in reversed(trajectory.segments[:segment])
            if other.author is Author.POLICY and other.modality is Modality.IMAGE_TOKENS
        ),
        None,
    )
    if before is None or len(before) != len(this.ids):
        return None
    scored_C = ~this.decisions.sampling.greedy_N
    position_C = this.decisions.position_N[scored_C]
    code_C = this.decisions.kind_N[scored_C] == DecisionKind.CODE
    return code_C & (this.ids != before)[position_C]


def changed_weights(passes: Sequence[Pass], scored: Scored, weight: float) -> Tensor:
    """float32 [N]: `weight` for codes that differ from the image before, 1 for all other decisions."""
    pass_N, segment_N = scored.pass_N.cpu().numpy(), scored.segment_N.cpu().numpy()
    weight_N = np.ones(len(pass_N), np.float32)
    for number, one in enumerate(passes):
        for segment in one.segments:
            changed_C = changed_codes(one.trajectory, segment)
            if changed_C is None or not changed_C.any():
                continue
            at_C = np.flatnonzero((pass_N == number) & (segment_N == segment))
            if len(at_C) != len(changed_C):
                raise ValueError(
                    f"trajectory {one.trajectory.key}: segment {segment} has {len(changed_C)} decisions that can be "
                    f"scored, and {len(at_C)} scores"
                )
            weight_N[at_C[changed_C]] = weight
    return torch.from_numpy(weight_N).to(scored.logprob_N.device)
