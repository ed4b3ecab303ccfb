"""Chameleon's decoder over cached rows: the same weights and numbers as transformers' forward, with fewer operations.

On small models a step of transformers' modules is mostly overhead: norms of six operations, rotary embeddings done
apart for queries and keys, keys and values repeated for every query head. Linear layers are called as modules, so
adapters apply; fused.py takes the single ids of small models without adapters.

Letters: B rows, T ids of a call, W rows of the attention (>= B, see cache.Rows), D width, Q query heads, H key-value
heads, G query heads per key-value head, d head width, L used length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonAttention,
    ChameleonModel,
    ChameleonSwinDecoderLayer,
)

from policy.decoding.cache import RowCache, Rows
from policy.decoding.fused import FusedLayers, fusible


class Decode:
    """Runs a decoder's layers over a RowCache."""

    def __init__(self, model: ChameleonModel, length: int):
        self.model = model
        config = model.config
        self.heads = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads or self.heads
        self.width = config.hidden_size // config.num_attention_heads
        self.swin = isinstance(model.layers[0], ChameleonSwinDecoderLayer)
        self.scale = self.width**-0.5
        self.fused = FusedLayers(model, self.heads, self.kv_heads, self.width) if fusible(model) else None
        self._rope_tables(length)

    def _rope_tables(self, length: int) -> None:
        embed = self.model.embed_tokens.weight
        positions = torch.arange(length, device=embed.device)[None]
        cos, sin = self.model.rotary_emb(embed[:1, None].detach(), positions)
        half = self.width // 2
        self.cos_Pd = cos[0].clone()
        # Signed, so that x * cos + roll(x) * sin is the rotation of both halves.
        self.sin_Pd = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)

    def __call__(
        self, cache: RowCache, row_B: np.ndarray, ids_BT: Tensor, position_BT: np.ndarray, count_B: np.ndarray
    ) -> Tensor:
        """Extend each row by its first `count` ids. Returns the last one's hidden state, normed, [B, D].

        Rows of fewer than T ids are padded on the right with any valid id. The caller has checked capacity.
        """
        device = cache.device
        steps = ids_BT.shape[1]
        used_B = cache.used_R[row_B]
        used = int((used_B + count_B).max())
        rows = Rows(cache, row_B, dense=steps == 1)
        position = torch.from_numpy(position_BT).to(device)
        cos_BT1d, sin_BT1d = self.cos_Pd[position].unsqueeze(2), self.sin_Pd[position].unsqueeze(2)

        row, step = np.nonzero(np.arange(steps) < count_B[:, None])
        where = _Where(
            rows=rows,
            used=used,
            row_M=torch.from_numpy(row_B[row]).to(device),
            at_M=torch.from_numpy(used_B[row] + step).to(device),
            pick_M=None if len(row) == len(row_B) * steps else torch.from_numpy(row * steps + step).to(device),
            mask=self._mask(rows, used_B, steps, used, cos_BT1d.dtype, device),
        )
        hidden_BTD = self.model.embed_tokens(ids_BT)
        if self.fused is not None and steps == 1:
            last_BD = self._fused(hidden_BTD[:, 0], cos_BT1d[:, 0], sin_BT1d[:, 0], cache, where)
            cache.used_R[row_B] += count_B
            return _norm(self.model.norm, last_BD)
        layers: Any = self.model.layers
        for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
            if self.swin:
                attended = self._attend(layer.self_attn, hidden_BTD, cos_BT1d, sin_BT1d, keys, values, where)
                hidden_BTD = hidden_BTD + _norm(layer.input_layernorm, attended)
                hidden_BTD = hidden_BTD + _norm(layer.post_attention_layernorm, layer.mlp(hidden_BTD))
            else:
                normed = _norm(layer.input_layernorm, hidden_BTD)
                hidden_BTD = hidden_BTD + self._attend(layer.self_attn, normed, cos_BT1d, sin_BT1d, keys, values, where)
                hidden_BTD = hidden_BTD + layer.mlp(_norm(layer.post_attention_layernorm, hidden_BTD))
        if steps == 1:
            last_BD = hidden_BTD[:, 0]
        else:
            last = torch.from_numpy(np.maximum(count_B - 1, 0)).to(device)
            last_BD = hidden_BTD[torch.arange(len(row_B), device=device), last]
        cache.used_R[row_B] += count_B
        return _norm(self.model.norm, last_BD)

    def _fused(self, hidden_BD: Tensor, cos_B1d: Tensor, sin_B1d: Tensor, cache: RowCache, where: _Where) -> Tensor:
        """All layers for one id a row."""
        assert self.fused is not None
        self.fused.refresh()
        for number, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):

            def attend(
                query_BQd: Tensor, key_BHd: Tensor, value_BHd: Tensor, keys: Tensor = keys, values: Tensor = values
            ) -> Tensor:
                keys[where.row_M, :, where.at_M] = key_BHd
                values[where.row_M, :, where.at_M] = value_BHd
                query_W1Qd = where.rows.spread(query_BQd).unsqueeze(1)
                out_W1Qd = self._single(
                    query_W1Qd, where.rows.history(keys, where.used), where.rows.history(values, where.used), where.mask
                )
                return where.rows.collect(out_W1Qd).flatten(1)

            hidden_BD = self.fused(number, hidden_BD, cos_B1d, sin_B1d, attend)
        return hidden_BD

    def _mask(
        self, rows: Rows, used_B: np.ndarray, steps: int, used: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        """Additive mask [W, 1, T, L]: the id at offset t of a row sees the row's past and its own first t + 1 ids."""
        if steps == 1 and (used_B + 1 == used).all():
            return None
        last_BT = torch.from_numpy(used_B[:, None] + np.arange(steps)).to(device)
        hidden_BTL = torch.arange(used, device=device) > last_BT[..., None]
        mask_BTL = torch.zeros(hidden_BTL.shape, dtype=dtype, device=device)
        mask_BTL.masked_fill_(hidden_BTL, torch.finfo(dtype).min)
        return rows.spread(mask_BTL)[:, None]

    def _attend(
        self,
        attention: ChameleonAttention,
        x_BTD: Tensor,
        cos_BT1d: Tensor,
        sin_BT1d: Tensor,
        keys_RHPd: Tensor,
        values_RHPd: Tensor,
        where: _Where,
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        Q, H, d = self.heads, self.kv_heads, self.width
        qk = torch.cat([attention.q_proj(x_BTD), attention.k_proj(x_BTD)], -1).view(B, T, Q + H, d)
        gain = torch.cat([attention.q_norm.weight, attention.k_norm.weight])
        bias = torch.cat([attention.q_norm.bias, attention.k_norm.bias])
        qk = torch.addcmul(bias, F.layer_norm(qk, (d,), eps=1e-5), gain)
        qk = torch.addcmul(qk * cos_BT1d, qk.roll(d // 2, -1), sin_BT1d)
        query_BTQd, key_BTHd = qk[:, :, :Q], qk[:, :, Q:]
        value_BTHd = attention.v_proj(x_BTD).view(B, T, H, d)

        where.write(keys_RHPd, key_BTHd)
        where.write(values_RHPd, value_BTHd)
        key_WHLd = where.rows.history(keys_RHPd, where.used)
        value_WHLd = where.rows.history(values_RHPd, where.used)
        query_WTQd = where.rows.spread(query_BTQd)
        if T == 1 and x_BTD.device.type == "cpu":
            out_WTQd = self._single(query_WTQd, key_WHLd, value_WHLd, where.mask)
        else:
            out_WTQd = F.scaled_dot_product_attention(
                query_WTQd.transpose(1, 2),
                key_WHLd,
                value_WHLd,
                where.mask,
                scale=self.scale,
                enable_gqa=Q != H,
            ).transpose(1, 2)
        return attention.o_proj(where.rows.collect(out_WTQd).reshape(B, T, Q * d))

    def _single(self, query_W1Qd: Tensor, key_WHLd: Tensor, value_WHLd: Tensor, mask_W11L: Tensor | None) -> Tensor:
        """One query a row: two batched products in which the heads of a group are the rows, nothing repeated."""
        W, H, L, d = key_WHLd.shape
        G = self.heads // H
        query = query_W1Qd.reshape(W * H, G, d) * self.scale
        key, value = key_WHLd.flatten(0, 1), value_WHLd.flatten(0, 1)
        score = torch.bmm(query, key.transpose(1, 2))
        if mask_W11L is not None:
            score.view(W, H, G, L).add_(mask_W11L)
        return torch.bmm(score.softmax(-1), value).view(W, 1, H * G, d)


class _Where:
    """Where a call's keys and values go, the same for every layer."""

    def __init__(self, rows: Rows, used: int, row_M: Tensor, at_M: Tensor, pick_M: Tensor | None, mask: Tensor | None):
        self.rows, self.used, self.mask = rows, used, mask
        self.row_M, self.at_M, self.pick_M = row_M, at_M, pick_M

    def write(self, layer_RHPd: Tensor, new_BTHd: Tensor) -> None:
        new_MHd = new_BTHd.flatten(0, 1)
        layer_RHPd[self.row_M, :, self.at_M] = new_MHd if self.pick_M is None else new_MHd[self.pick_M]


def _norm(norm: Any, x: Tensor) -> Tensor:
    """RMS norm (ChameleonRMSNorm) as one operation."""
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
