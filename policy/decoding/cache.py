"""Key-value rows for rollouts: allocated once, independent of one another, each of its own length.

transformers' caches are one block that all rows of a batch fill in step. Here any subset of the rows may advance,
start anew or become a copy of another, which is what refilling finished rows and sharing a group's prompt need.
`decode.py` computes on them.

Letters: R rows of the cache, B rows of a call, H key-value heads, P positions of a row, d head width, L used length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import psutil
import torch
from torch import Tensor

from runtime.errors import UserError, first_line


class CacheError(UserError):
    """More rows than memory holds."""


class RowCache:
    """Keys and values of `rows` rows of up to `length` positions.

    `used_R` counts a row's ids; `position_R` is the position id that its next id gets, which is larger where a
    context has gaps (a window of frames keeps its positions).
    """

    def __init__(
        self, rows: int, length: int, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device
    ):
        """Raises CacheError where the device's memory does not hold so many rows."""
        self.rows, self.length = rows, length
        shape = (rows, heads, length, width)
        size = 2 * layers * math.prod(shape) * dtype.itemsize
        if device.type == "cpu" and size > psutil.virtual_memory().total:  # Linux would promise it, and kill later
            raise CacheError(_too_large(rows, length, size, "this machine has less"))
        try:
            # Zeros, not empty: what lies beyond a row's length is masked, but NaN times 0 would still be NaN.
            self.keys = [_keys(shape, dtype, device) for _ in range(layers)]
            self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        except (RuntimeError, MemoryError) as error:
            raise CacheError(_too_large(rows, length, size, first_line(error))) from None
        self.used_R = np.zeros(rows, np.int64)
        self.position_R = np.zeros(rows, np.int64)

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    def reset(self, row_B: Sequence[int]) -> None:
        self.used_R[list(row_B)] = 0
        self.position_R[list(row_B)] = 0

    def copy(self, source: int, row_B: Sequence[int]) -> None:
        """Rows become equal to `source`, as far as it is used."""
        target = torch.as_tensor([row for row in row_B if row != source], dtype=torch.long, device=self.device)
        used = int(self.used_R[source])
        for layer in (*self.keys, *self.values):
            layer[target, :, :used] = layer[source, :, :used]
        self.used_R[list(row_B)] = used
        self.position_R[list(row_B)] = self.position_R[source]


def _too_large(rows: int, length: int, size: int, why: str) -> str:
    return (
        f"rollout.rows: the cache of {rows} rows of {length} ids takes {size / 2**30:,.1f} GiB ({why}); ask for fewer "
        f"rows, or a smaller rollout.max_tokens"
    )


def _keys(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros [R, H, P, d]; on the CPU with a row's positions side by side in memory.

    A single query's product with its keys then runs along memory, which takes half the time there. Kernels on a GPU
    want the head's width side by side.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    rows, heads, length, width = shape
    return torch.zeros((rows, heads, width, length), dtype=dtype).transpose(2, 3)


class Rows:
    """The rows of one call, and how to reach them: a slice where they are neighbours, a gather where they are not.

    A gather copies their whole history, so rows that nearly fill a span are computed on the span's slice instead.
    """

    def __init__(self, cache: RowCache, row_B: np.ndarray, dense: bool):
        low, high = int(row_B.min()), int(row_B.max()) + 1
        self.count = len(row_B)
        self.span = slice(low, high) if dense and high - low <= 2 * len(row_B) else None
        self.exact = self.span is not None and np.array_equal(row_B, np.arange(low, high))
        self.index_B = torch.from_numpy(row_B).to(cache.device)
        self.place_B = self.index_B - low
        self.width = high - low if self.span is not None else len(row_B)

    def history(self, layer_RHPd: Tensor, used: int) -> Tensor:
        """[width, H, used, d]."""
        if self.span is not None:
            return layer_RHPd[self.span, :, :used]
        return layer_RHPd[:, :, :used].index_select(0, self.index_B)

    def spread(self, x_B: Tensor) -> Tensor:
        """Put a call's rows at their places in the span."""
        if self.span is None or self.exact:
            return x_B
        return x_B.new_zeros(self.width, *x_B.shape[1:]).index_copy_(0, self.place_B, x_B)

    def collect(self, x_W: Tensor) -> Tensor:
        """The inverse of `spread`."""
        return x_W if self.span is None or self.exact else x_W.index_select(0, self.place_B)
