"""One id a row through a small decoder on the CPU, with half the operations: decode.py uses it where it applies.

At a hundred rows of width 128 a step is bound by the number of operations as much as by the products. So queries, keys
and values are one product, gate and up another; the gains of the norms before them, and the means that the norms of
queries and keys subtract, are folded into the weights. The folded copies are made anew whenever a weight has changed,
and never for large models, whose products dwarf the rest.

Letters: B rows, D width, Q query heads, H key-value heads, d head width, E width of the feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.chameleon.modeling_chameleon import ChameleonDecoderLayer, ChameleonModel

WIDEST = 1024  # hidden size up to which a second copy of the weights costs little and saves much
QK_EPSILON = 1e-5  # transformers' ChameleonAttention normalises queries and keys with torch's default


@dataclass(frozen=True)
class FusedLayer:
    qkv_DM: Tensor  # [D, (Q + 2 H) d]
    gain_Nd: Tensor  # [Q + H, d]
    bias_Nd: Tensor
    out_MD: Tensor  # [Q d, D]
    gate_up_DM: Tensor  # [D, 2 E]
    down_ED: Tensor
    epsilon: tuple[Tensor, Tensor]  # D times that of the norms before attention and feed-forward


def fusible(model: ChameleonModel) -> bool:
    """Plain linear layers without biases (no adapters), SiLU, norms before the sublayers, on the CPU and small."""
    config = model.config
    if config.hidden_size > WIDEST or config.hidden_act != "silu" or model.embed_tokens.weight.device.type != "cpu":
        return False
    layers: Any = model.layers
    return model.embed_tokens.weight.dtype == torch.float32 and all(
        type(layer) is ChameleonDecoderLayer
        and all(type(module) is nn.Linear and module.bias is None for module in _linears(layer))
        for layer in layers
    )


def _linears(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    ]


class FusedLayers:
    """The folded weights of a decoder's layers."""

    def __init__(self, model: ChameleonModel, heads: int, kv_heads: int, width: int):
        self.model = model
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.epsilon = torch.tensor(QK_EPSILON * width)
        self._parameters = list(model.layers.parameters())
        self._seen: tuple[int, ...] = ()
        self.layers: list[FusedLayer] = []

    def refresh(self) -> None:
        """Fold anew if any weight was replaced or changed in place since last time."""
        seen = tuple(x for parameter in self._parameters for x in (parameter.data_ptr(), parameter._version))
        if seen != self._seen:
            with torch.no_grad():
                layers: Any = self.model.layers
                self.layers = [self._fold(layer) for layer in layers]
            self._seen = seen

    def _fold(self, layer: Any) -> FusedLayer:
        attention, mlp, d = layer.self_attn, layer.mlp, self.width
        first, second = layer.input_layernorm, layer.post_attention_layernorm
        D = first.weight.numel()
        qk_MD = torch.cat([attention.q_proj.weight, attention.k_proj.weight])
        # Rows less their head's mean give heads of mean 0, which is what the norm of queries and keys begins with.
        by_head = qk_MD.view(-1, d, D).double()
        qk_MD = (by_head - by_head.mean(1, keepdim=True)).reshape(-1, D).float()
        scale = D**0.5  # x / |x| is the root mean square's quotient over sqrt(D)
        return FusedLayer(
            (torch.cat([qk_MD, attention.v_proj.weight]) * (first.weight * scale)).t().contiguous(),
            torch.cat([attention.q_norm.weight, attention.k_norm.weight]) * d**0.5,
            torch.cat([attention.q_norm.bias, attention.k_norm.bias]),
            attention.o_proj.weight.t().contiguous(),
            (torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * (second.weight * scale)).t().contiguous(),
            mlp.down_proj.weight.t().contiguous(),
            (torch.tensor(D * first.variance_epsilon), torch.tensor(D * second.variance_epsilon)),
        )

    def __call__(
        self,
        number: int,
        hidden_BD: Tensor,
        cos_B1d: Tensor,
        sin_B1d: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Layer `number`. `attend` takes queries [B, Q, d], keys and values [B, H, d], returns [B, Q d]."""
        layer = self.layers[number]
        B, N, d = len(hidden_BD), self.heads + self.kv_heads, self.width
        heads_BNd = (hidden_BD * _inverse_norm(hidden_BD, layer.epsilon[0])).mm(layer.qkv_DM).view(B, -1, d)
        qk_BNd = heads_BNd[:, :N]
        qk_BNd = torch.addcmul(layer.bias_Nd, qk_BNd * _inverse_norm(qk_BNd, self.epsilon), layer.gain_Nd)
        qk_BNd = torch.addcmul(qk_BNd * cos_B1d, qk_BNd.roll(d // 2, -1), sin_B1d)
        attended_BM = attend(qk_BNd[:, : self.heads], qk_BNd[:, self.heads :], heads_BNd[:, N:])
        hidden_BD = torch.addmm(hidden_BD, attended_BM, layer.out_MD)
        gate_up_BM = (hidden_BD * _inverse_norm(hidden_BD, layer.epsilon[1])).mm(layer.gate_up_DM)
        gate_BE, up_BE = gate_up_BM.chunk(2, -1)
        return torch.addmm(hidden_BD, F.silu(gate_BE).mul_(up_BE), layer.down_ED)


def _inverse_norm(x: Tensor, epsilon: Tensor) -> Tensor:
    """1 / sqrt(|x|^2 + epsilon) over the last dimension, kept."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(epsilon, norm, norm).rsqrt_()
