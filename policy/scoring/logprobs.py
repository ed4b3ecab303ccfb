"""Log-probabilities of chosen ids without ever holding all logits.

For D-wide hidden states and a vocabulary of V the logits of N decisions take N x V floats, and a plain log-softmax
with its gradient three times that: 8 rows of 4,096 ids over 65,536 entries are 8.6 GB a copy. Here they are made a
chunk at a time, reduced to one number each, and made again in the backward pass.

Letters: N decisions, C decisions of a chunk, D width, V vocabulary, U distinct allowed sets of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from record.trajectory import mask_of


def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    temperature_N: Tensor | None = None,
    allowed_N: Tensor | None = None,
    sets: Sequence[np.ndarray] = (),
    entropy: bool = False,
    chunk: int = 256,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature) over the allowed ids, at the targets.

    Args:
        target_N: int64 ids; each must lie in its allowed set.
        temperature_N: float32 > 0; None: 1.
        allowed_N: int64 index into `sets`; -1, or None for all: the whole vocabulary.
        sets: half-open id ranges int32 [R, 2] each.
        entropy: also return each distribution's entropy in nats, detached.
        chunk: rows of logits that are held at a time.

    Returns:
        logprob_N float32, with gradient to hidden_ND and weight_VD; entropy_N float32 or None.
    """
    temperature = torch.ones_like(target_N, dtype=torch.float32) if temperature_N is None else temperature_N
    allowed = np.full(len(target_N), -1) if allowed_N is None else allowed_N.cpu().numpy()
    logprob_N, entropy_N = _ChunkedLogprobs.apply(
        hidden_ND, weight_VD, target_N, temperature.float(), allowed, tuple(sets), entropy, chunk
    )
    return logprob_N, entropy_N if entropy else None


def _logits(
    hidden_CD: Tensor, weight_VD: Tensor, temperature_C: Tensor, allowed_C: np.ndarray, sets: tuple[np.ndarray, ...]
) -> Tensor:
    """SamplingParams's logits [C, V] in float32: divided by the temperature, -inf outside the allowed sets."""
    logits_CV = (hidden_CD @ weight_VD.T).float()
    if bool((temperature_C != 1).any()):
        logits_CV /= temperature_C[:, None]
    if (allowed_C >= 0).any():
        used, which_C = np.unique(allowed_C, return_inverse=True)
        size = weight_VD.shape[0]
        banned_UV = np.stack([np.zeros(size, bool) if index < 0 else ~mask_of(sets[index], size) for index in used])
        device = logits_CV.device
        logits_CV.masked_fill_(torch.from_numpy(banned_UV).to(device)[torch.from_numpy(which_C).to(device)], -torch.inf)
    return logits_CV


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        target_N: Tensor,
        temperature_N: Tensor,
        allowed_N: np.ndarray,
        sets: tuple[np.ndarray, ...],
        entropy: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        count = len(target_N)
        logprob_N = hidden_ND.new_empty(count, dtype=torch.float32)
        normalizer_N = hidden_ND.new_empty(count, dtype=torch.float32)
        entropy_N = hidden_ND.new_empty(count if entropy else 0, dtype=torch.float32)
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            logits_CV = _logits(hidden_ND[part], weight_VD, temperature_N[part], allowed_N[part], sets)
            # Relative to the largest: at low temperatures logits are large, and their rounding would stay.
            largest_C = logits_CV.max(-1).values
            logits_CV -= largest_C[:, None]
            normalizer_C = logits_CV.logsumexp(-1)
            logprob_N[part] = logits_CV.gather(1, target_N[part, None])[:, 0] - normalizer_C
            normalizer_N[part] = largest_C + normalizer_C
            if entropy:
                logits_CV -= normalizer_C[:, None]
                # exp(-inf) x -inf would be NaN: entries outside the allowed set count nothing.
                entropy_N[part] = -logits_CV.exp().mul_(logits_CV.nan_to_num_(neginf=0.0)).sum(-1)
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, temperature_N, normalizer_N)
        ctx.allowed_N, ctx.sets, ctx.chunk = allowed_N, sets, chunk
        ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, target_N, temperature_N, normalizer_N = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        # Summed in float32: half-precision sums over many chunks would lose the small ones.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(target_N), ctx.chunk):
            part = slice(start, min(start + ctx.chunk, len(target_N)))
            logits_CV = _logits(hidden_ND[part], weight_VD, temperature_N[part], ctx.allowed_N[part], ctx.sets)
            # d logprob / d logits = one_hot(target) - softmax
            scale_C = grad_N[part].float() / temperature_N[part]
            grad_CV = logits_CV.sub_(normalizer_N[part, None]).exp_().mul_(-scale_C[:, None])
            grad_CV.scatter_add_(1, target_N[part, None], scale_C[:, None])
            grad_CV = grad_CV.to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[part] = grad_CV @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += grad_CV.T @ hidden_ND[part]
        grad_weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_ND, grad_weight, None, None, None, None, None, None
