"""From logits to decisions: counter-based noise, the allowed set, the inverse CDF. Called by loop.py, once a tick.

Every decision takes one uniform number that is a pure function of (seed, group, member, decision index), so a
trajectory does not depend on its worker, its row or its neighbours in the batch.

Letters: B rows of a tick, V vocabulary, M masks, R id ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rollout.sampling_table import SamplingTable

GOLDEN = 0x9E3779B97F4A7C15
NOISE_STREAM = 0x5851F42D4C957F2D  # keeps Gaussian noise apart from the uniforms of the same decision
_64 = (1 << 64) - 1


def mix64(z: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014), on uint64 of any shape: bijective and well mixed."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def noise_key(seed: int, group: int, member: int) -> int:
    """64 bits that name one trajectory's noise. Any integers are accepted."""
    key = np.zeros(1, np.uint64)
    for value in (seed, group, member):
        key = mix64(key + np.array([(value + 1) * GOLDEN & _64], np.uint64))
    return int(key[0])


def hash64(key_B: np.ndarray, index_B: np.ndarray) -> np.ndarray:
    """uint64 [B]: splitmix64's output number `index` of the generator that starts at `key`."""
    return mix64(key_B + (index_B.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))


def uniforms(key_B: np.ndarray, index_B: np.ndarray) -> np.ndarray:
    """float64 [B] in [0, 1) with 53 random bits."""
    return (hash64(key_B, index_B) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def gaussian(key: int, index: int, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 noise of one denoising decision, on the CPU so that every device gets the same."""
    mixed = hash64(np.array([key ^ NOISE_STREAM], np.uint64), np.array([index]))
    generator = torch.Generator().manual_seed(int(mixed[0] >> np.uint64(1)))
    return torch.randn(tuple(shape), generator=generator)


@dataclass(frozen=True)
class Sampled:
    id_B: Tensor  # int64
    logprob_B: Tensor  # float32 under the final law; NaN where temperature is 0
    kept_BV: Tensor | None  # bool: what top-p or top-k left; None: neither was asked for


def sample(
    logits_BV: Tensor,
    temperature_B: Tensor,
    allowed_BV: Tensor | None,
    uniform_B: Tensor,
    top_p: float = 1.0,
    top_k: int = 0,
) -> Sampled:
    """One id a row from softmax(logits / temperature) over the allowed set, by the inverse CDF in float64.

    Args:
        logits_BV: uncut and at temperature 1 (policy/base.py: Categorical).
        temperature_B: float32; 0 takes the likeliest id, which is no draw and has no log-prob.
        allowed_BV: bool, each row with at least one True; None: everything.
        uniform_B: float64 in [0, 1).
        top_p, top_k: the likeliest ids are kept (top_k first); the log-prob is renormalised over them.
    """
    greedy_B = temperature_B == 0
    any_greedy = bool(greedy_B.any())
    if any_greedy:
        temperature_B = torch.where(greedy_B, 1.0, temperature_B)
    logits_BV = logits_BV.float()
    if bool((temperature_B != 1).any()):
        logits_BV = logits_BV / temperature_B[:, None]
    if allowed_BV is not None:
        logits_BV = torch.where(allowed_BV, logits_BV, -torch.inf)
    kept_BV = None
    if top_k or top_p < 1:
        kept_BV = _likeliest(logits_BV, top_p, top_k)
        logits_BV = logits_BV.masked_fill(~kept_BV, -torch.inf)
    p_BV = torch.softmax(logits_BV, -1)
    cdf_BV = p_BV.cumsum(-1, dtype=torch.float64)
    total_B = cdf_BV[:, -1]
    # Strictly below the total, so that the first entry above it is one with probability: never a forbidden id.
    target_B = torch.minimum(uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    id_B = torch.searchsorted(cdf_BV, target_B[:, None], right=True)[:, 0].clamp_(max=cdf_BV.shape[1] - 1)
    if any_greedy:
        id_B = torch.where(greedy_B, logits_BV.argmax(-1), id_B)
    # The log of one p instead of a log-softmax of all: p was drawn, so it is no underflow, and exact to its last bit.
    chosen_B = p_BV.gather(1, id_B[:, None])[:, 0].log()
    if any_greedy:
        chosen_B = torch.where(greedy_B, torch.nan, chosen_B)
    return Sampled(id_B, chosen_B, kept_BV)


def _likeliest(logits_BV: Tensor, top_p: float, top_k: int) -> Tensor:
    """bool [B, V]: the top_k likeliest, then the fewest of them that hold top_p; always at least one."""
    ordered_BV, order_BV = torch.sort(logits_BV, stable=True, dim=-1, descending=True)
    keep_BV = ordered_BV > -torch.inf
    if top_k:
        keep_BV[:, top_k:] = False
    if top_p < 1:
        p_BV = ordered_BV.masked_fill(~keep_BV, -torch.inf).softmax(-1).double()
        keep_BV &= p_BV.cumsum(-1) - p_BV < top_p  # the mass before this id
    keep_BV[:, 0] = True
    return torch.zeros_like(keep_BV).scatter_(1, order_BV, keep_BV)


class DeviceMasks:
    """The masks of a SamplingTable on the engine's device. Grows with the table."""

    def __init__(self, table: SamplingTable, device: torch.device | str = "cpu"):
        self.table, self.device = table, torch.device(device)
        self._mask_MV = torch.empty((0, table.size), dtype=torch.bool, device=self.device)

    def of(self, number_B: np.ndarray) -> Tensor:
        """bool [B, V]: among what each row's next id is chosen, by its number in the table."""
        known = len(self._mask_MV)
        if known < len(self.table.masks):
            new_MV = torch.from_numpy(np.stack(self.table.masks[known:])).to(self.device)
            self._mask_MV = torch.cat([self._mask_MV, new_MV])
        return self._mask_MV[torch.from_numpy(self.table.mask_L[number_B]).to(self.device)]
