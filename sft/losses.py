"""The warm start's losses: cross-entropy over what the policy would decide, and the visual loss that the recipe names.

Letters: L lines of a batch, T ids, N learned ids, V vocabulary, K codes of E dimensions each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from policy.chameleon.family import ChameleonPolicy
from policy.chameleon.vocabulary import ChameleonVocabulary
from policy.scoring.visual_losses import (
    CodeTargets,
    TokenDiscrepancy,
    VisualReconstruction,
    own_codes,
    predicted_codes,
)
from sft.config import VisualLossConfig
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


def visual_loss(
    config: VisualLossConfig, policy: ChameleonPolicy, seed: int
) -> VisualReconstruction | TokenDiscrepancy:
    """The loss that the recipe names, on the policy's device. Fresh weights in it are a function of `seed`."""
    core: Any = policy.core
    codebook_KE = core.model.vqmodel.quantize.embedding.weight
    release = config.variant == "release"
    loss: VisualReconstruction | TokenDiscrepancy
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.kind == "twgi":
            loss = VisualReconstruction(core.config.hidden_size, codebook_KE, release)
        else:
            id_of_code_K = torch.as_tensor(policy.vocabulary.code_ids, dtype=torch.int64)
            loss = TokenDiscrepancy(codebook_KE, id_of_code_K, release, policy.score_chunk)
    return loss.to(policy.device)


def visual_targets(
    config: VisualLossConfig,
    vocabulary: ChameleonVocabulary,
    code_of_V: Tensor,
    input_ids_LT: Tensor,
    labels_LT: Tensor,
) -> CodeTargets:
    """The codes of a batch that the loss counts, and where the states stand that it holds to them."""
    release = config.variant == "release"
    if config.kind == "twgi" and release:
        return own_codes(input_ids_LT, labels_LT, code_of_V, vocabulary.boi, vocabulary.codes_per_image)
    return predicted_codes(labels_LT, code_of_V, release)
