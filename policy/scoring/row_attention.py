"""Causal attention among rows that lie end to end in one line, for transformers' models: no padding and no mask.

Norms, projections and the feed-forward part see one line of all rows' ids; attention takes the line apart and computes
each row by itself with torch's scaled_dot_product_attention, whose causal kernels hold no [T, T] mask. So a forward
costs what its rows cost, and a line may be as long as memory allows.

Letters: T ids of a line, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROWS = "sdpa_rows"  # the name under which transformers' models find it


def packs(attn_implementation: str) -> bool:
    """Whether a model of this attention takes rows end to end. Others are given padded rows."""
    return attn_implementation == ROWS


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa` where no lengths are given; with them, that of each row of a line [1, H, T, d].

    Neighbours of one length are computed together. The mask is then not read. Returns [1, T, H, d].
    """
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    runs = [(length, len(list(rows))) for length, rows in groupby(row_lengths)]
    # One split, not a slice for each run: the backward of a slice fills a gradient of the whole line.
    split = [each.squeeze(0).split([length * count for length, count in runs], 1) for each in (query, key, value)]
    parts = []
    for (length, count), *of_run in zip(runs, *split, strict=True):
        # [H, rows * length, d] -> [rows, H, length, d]
        q, k, v = (each.unflatten(1, (count, length)).transpose(0, 1) for each in of_run)
        parts.append(sdpa_attention_forward(module, q, k, v, None, **kwargs)[0].flatten(0, 1))
    return torch.cat(parts)[None], None


AttentionInterface.register(ROWS, row_attention)
AttentionMaskInterface.register(ROWS, sdpa_mask)
