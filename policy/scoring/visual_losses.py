"""Losses that hold the ids of an image to the codebook that the image is drawn from, beside the cross-entropy.

Visual reconstruction (Thinking with Generated Images, arXiv:2505.22525): a projection of the hidden state is to be the
code's own codebook vector. Token discrepancy (MVoT, arXiv:2501.07542): probability on another code costs that code's
distance from the right one.

Both are right by default: the state or the logits are those that predict the code, only learned codes count, sums are
float32. The forms of the released code are called `release`; each says how it differs.

Letters: B rows, T ids, M visual codes that are held to the codebook, D width of the model, V vocabulary,
K visual codes of E dimensions each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runtime.errors import UserError

ROWS_AT_ONCE = 1024  # of a distance table while it is computed in double precision


# ---- which positions ----


@dataclass(frozen=True)
class CodeTargets:
    """Visual codes of a batch, row by row, each with the position whose hidden state or logits are held to it."""

    at_M: Tensor  # int64 into the flattened [B * T]
    code_M: Tensor  # int64 in [0, K)


def predicted_codes(labels_BT: Tensor, code_of_V: Tensor, release: bool = False) -> CodeTargets:
    """Find the learned codes, each at the position before it: the one that predicts it.

    Args:
        labels_BT: the id itself where it is learned, negative elsewhere; not shifted. Padding is not learned.
        code_of_V: the code of each id, -1 where it is none.
        release: as MVoT's code has it. A row's first id has no position before it; it is left out here, and stops the
            release.

    Raises:
        UserError: `release`, and a row begins with a learned code.
    """
    code_BT = torch.where(labels_BT >= 0, code_of_V[labels_BT.clamp_min(0)], -1)
    if release and bool((code_BT[:, 0] >= 0).any()):
        row = int((code_BT[:, 0] >= 0).nonzero()[0])
        raise UserError(
            f"token discrepancy, variant release: row {row} begins with the visual code of id "
            f"{int(labels_BT[row, 0])}, which no position predicts; put a prompt before the image, or take the "
            "variant default, which leaves it out"
        )
    row_M, column_M = (code_BT[:, 1:] >= 0).nonzero(as_tuple=True)
    return CodeTargets(row_M * labels_BT.shape[1] + column_M, code_BT[row_M, column_M + 1])


def own_codes(
    input_ids_BT: Tensor, labels_BT: Tensor, code_of_V: Tensor, begin: int, codes_per_image: int
) -> CodeTargets:
    """Find images as the code of Thinking with Generated Images does, each code at its own position.

    An image is every learned id `begin` and the `codes_per_image` ids after it. The end marker is not looked for, nor
    whether the codes are learned, so an image is passed over only where its begin marker is masked. The position has
    read the very code that it is held to.

    Raises:
        UserError: an image is cut off by the end of its row, or holds an id that is no visual code.
    """
    row_I, column_I = (labels_BT == begin).nonzero(as_tuple=True)
    length = labels_BT.shape[1]
    cut = column_I + codes_per_image >= length
    if bool(cut.any()):
        row, column = int(row_I[cut][0]), int(column_I[cut][0])
        raise UserError(
            f"visual reconstruction, variant release: the image that begins at position {column} of row {row} is cut "
            f"off after {length - column - 1} of {codes_per_image} codes; give whole images"
        )
    column_IN = column_I[:, None] + 1 + torch.arange(codes_per_image, device=labels_BT.device)
    row_IN = row_I[:, None].expand_as(column_IN)
    code_IN = code_of_V[input_ids_BT[row_IN, column_IN]]
    if bool((code_IN < 0).any()):
        row, column = int(row_IN[code_IN < 0][0]), int(column_IN[code_IN < 0][0])
        raise UserError(
            f"visual reconstruction, variant release: id {int(input_ids_BT[row, column])} at position {column} of row "
            f"{row} stands in an image and is no visual code; after the begin marker come exactly {codes_per_image}"
        )
    return CodeTargets((row_IN * length + column_IN).flatten(), code_IN.flatten())


# ---- visual reconstruction ----


def reconstruction(hidden_MD: Tensor, code_M: Tensor, weight_ED: Tensor, bias_E: Tensor, codebook_KE: Tensor) -> Tensor:
    """Mean squared error of hidden @ weight.T + bias against the codebook vectors, over codes and dimensions.

    The precision is the weight's: bfloat16 is the release's, whose error and mean are rounded too.

    Returns:
        A number with gradient to hidden_MD, weight_ED and bias_E; without codes 0, its gradient 0.
    """
    projected_ME = F.linear(hidden_MD.to(weight_ED.dtype), weight_ED, bias_E)
    if not len(code_M):
        return projected_ME.sum() * 0.0
    return F.mse_loss(projected_ME, codebook_KE[code_M].to(weight_ED.dtype))


class VisualReconstruction(nn.Module):
    """The loss `reconstruction` with its projection, which is trained with the model.

    Args:
        hidden_size: D.
        codebook_KE: the visual tokenizer's, frozen.
        release: in bfloat16, and the projection stays as it was drawn, since the release's optimiser never has it.
    """

    codebook_KE: Tensor

    def __init__(self, hidden_size: int, codebook_KE: Tensor, release: bool = False) -> None:
        super().__init__()
        self.release = release
        self.projection = nn.Linear(hidden_size, codebook_KE.shape[1]).requires_grad_(not release)
        self.register_buffer("codebook_KE", codebook_KE.detach().clone(), persistent=False)

    def forward(self, hidden_MD: Tensor, code_M: Tensor, head_VD: Tensor | None = None) -> Tensor:
        """The loss of the given states; 0 (with a gradient of 0) where there is no code. The head is not asked."""
        dtype = torch.bfloat16 if self.release else self.projection.weight.dtype
        weight_ED, bias_E = self.projection.weight.to(dtype), self.projection.bias.to(dtype)
        return reconstruction(hidden_MD, code_M, weight_ED, bias_E, self.codebook_KE)


# ---- token discrepancy ----


def distance_table(
    codebook_KE: Tensor, code_of_column_K: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Euclidean distances between codebook vectors, computed in double precision.

    Args:
        code_of_column_K: int64, the code of each id in the list of ids that probabilities are laid out by; None: the
            release's table, whose columns go by code whatever the list.

    Returns:
        [K, K] in `dtype`: a row for each code, a column for each id of the list.
    """
    columns_KE = codebook_KE if code_of_column_K is None else codebook_KE[code_of_column_K]
    # Differences, not the matrix product that cdist prefers: equal vectors are exactly 0 apart.
    rows = [
        torch.cdist(part.double(), columns_KE.double(), compute_mode="donot_use_mm_for_euclid_dist").to(dtype)
        for part in codebook_KE.detach().split(ROWS_AT_ONCE)
    ]
    return torch.cat(rows)


def expected_distances(logits_MK: Tensor, code_M: Tensor, distance_KK: Tensor) -> Tensor:
    """Expected distance of the sampled code from the right one, [M].

    Args:
        logits_MK: of the visual codes alone, so that words cost nothing, in the order of the table's columns.
        code_M: int64, the right codes.
        distance_KK: of `distance_table`. Its precision is the result's: a bfloat16 table is the release's, which
            rounds the softmax of the logits as they are; otherwise the softmax is float32.
    """
    if distance_KK.dtype != torch.bfloat16:
        logits_MK = logits_MK.float()
    probability_MK = logits_MK.softmax(-1).to(distance_KK.dtype)
    return (distance_KK[code_M] * probability_MK).sum(-1)


def token_discrepancy(logits_MK: Tensor, code_M: Tensor, distance_KK: Tensor) -> Tensor:
    """Mean of `expected_distances` over codes; without codes 0, its gradient 0."""
    if not len(code_M):
        return logits_MK.sum() * 0.0
    return expected_distances(logits_MK, code_M, distance_KK).mean()


class TokenDiscrepancy(nn.Module):
    """The loss `token_discrepancy` from hidden states, with its table; nothing in it is trained.

    Logits and probabilities exist a chunk at a time and are computed again in the backward pass.

    Args:
        codebook_KE: the visual tokenizer's, frozen.
        id_of_code_K: int64, the id of each code.
        release: in bfloat16, and probabilities go by id while the table's columns go by code, as in the release,
            which is right only where ids and codes are in the same order.
        chunk: codes whose logits are held at a time.
    """

    id_K: Tensor
    distance_KK: Tensor

    def __init__(self, codebook_KE: Tensor, id_of_code_K: Tensor, release: bool = False, chunk: int = 256) -> None:
        super().__init__()
        self.chunk = chunk
        code_of_column_K = id_of_code_K.argsort()  # the list of ids is sorted by id, as transformers' is
        self.register_buffer("id_K", id_of_code_K[code_of_column_K], persistent=False)
        if release:
            table_KK = distance_table(codebook_KE, None, torch.bfloat16)
        else:
            table_KK = distance_table(codebook_KE, code_of_column_K)
        self.register_buffer("distance_KK", table_KK)

    def forward(self, hidden_MD: Tensor, code_M: Tensor, head_VD: Tensor) -> Tensor:
        """The loss of the states that predict the codes; 0 (with a gradient of 0) where there is no code."""
        if not len(code_M):
            return hidden_MD.sum() * 0.0
        head_KD = head_VD[self.id_K]
        parts = [
            checkpoint(
                self._expected_distances, hidden_CD, code_C, head_KD, use_reentrant=False, preserve_rng_state=False
            )
            for hidden_CD, code_C in zip(hidden_MD.split(self.chunk), code_M.split(self.chunk), strict=True)
        ]
        return torch.cat(parts).mean()

    def _expected_distances(self, hidden_CD: Tensor, code_C: Tensor, head_KD: Tensor) -> Tensor:
        return expected_distances(hidden_CD @ head_KD.T, code_C, self.distance_KK)
