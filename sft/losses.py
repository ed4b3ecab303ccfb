"""The warm start's two losses: cross-entropy over what the policy would decide, and visual reconstruction.

Letters: L lines of a batch, T ids, N learned ids, M learned visual codes, D width of the model,
K codes of E dimensions each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sft.data import IGNORE


@dataclass(frozen=True)
class Targets:
    """The learned ids of a batch. Each is predicted from the position before it."""

    before_N: Tensor  # int64 into the flattened [L * T]: where the hidden state that predicts it stands
    id_N: Tensor  # int64
    image_N: Tensor  # bool, a visual code
    weight_N: Tensor  # float, by its role


def targets(labels_LT: Tensor, weight_LT: Tensor, is_code_V: Tensor) -> Targets:
    """Collect the learned ids, line by line. A line's first id has nothing before it and is never learned."""
    line_N, column_N = (labels_LT[:, 1:] != IGNORE).nonzero(as_tuple=True)
    id_N = labels_LT[line_N, column_N + 1]
    return Targets(line_N * labels_LT.shape[1] + column_N, id_N, is_code_V[id_N], weight_LT[line_N, column_N + 1])


def weighted_cross_entropy(logprob_N: Tensor, weight_N: Tensor, image_N: Tensor, image_weight: float) -> Tensor:
    """Weighted mean of -log p; visual codes weigh `image_weight` times as much."""
    weight_N = torch.where(image_N, image_weight * weight_N, weight_N)
    return -(weight_N * logprob_N).sum() / weight_N.sum().clamp_min(1e-8)


class VisualReconstruction(nn.Module):
    """Mean squared error between a projection of the hidden state and the code's own codebook vector.

    Thinking with Generated Images (arXiv:2505.22525) adds it to the cross-entropy with weight 1. The hidden state is
    the one that predicts the code (the position before it), and the projection is trained with the model.
    """

    codebook_KE: Tensor

    def __init__(self, hidden_size: int, codebook_KE: Tensor) -> None:
        super().__init__()
        self.projection = nn.Linear(hidden_size, codebook_KE.shape[1])
        self.register_buffer("codebook_KE", codebook_KE.detach().clone(), persistent=False)

    def forward(self, hidden_MD: Tensor, code_M: Tensor) -> Tensor:
        """Mean over codes and codebook dimensions; 0 (with a gradient of 0) where there is no code."""
        if not len(code_M):
            return self.projection(hidden_MD).sum() * 0.0
        projected_ME = self.projection(hidden_MD.to(self.projection.weight.dtype))
        return nn.functional.mse_loss(projected_ME, self.codebook_KE[code_M])
