"""What may follow what around an image: after BOI exactly N codes, then EOI; elsewhere neither codes nor EOI.

The engine's formats constrain decoding themselves. This is the released rule over plain ids, in the two shapes that
transformers' `generate` takes, for benchmarks and for users who decode without us. BOI is forbidden where a whole
image no longer fits: current length >= max_length - (N + 1).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from policy.chameleon.vocabulary import ChameleonVocabulary


class ImageGrammar:
    """Allowed ids after every prefix. Call it as a `prefix_allowed_tokens_fn(batch_id, ids)`."""

    def __init__(self, boi: int, eoi: int, code_ids: Tensor, codes_per_image: int, size: int, max_length: int):
        self.boi, self.eoi, self.codes_per_image, self.max_length = boi, eoi, codes_per_image, max_length
        self.codes_V = torch.zeros(size, dtype=torch.bool)
        self.codes_V[torch.as_tensor(code_ids, dtype=torch.long)] = True
        self.closing_V = torch.zeros(size, dtype=torch.bool)
        self.closing_V[eoi] = True
        self.words_V = ~(self.codes_V | self.closing_V)  # BOI among them
        self.words_only_V = self.words_V.clone()
        self.words_only_V[boi] = False

    @classmethod
    def of(cls, vocabulary: ChameleonVocabulary, max_length: int) -> ImageGrammar:
        return cls(
            vocabulary.boi,
            vocabulary.eoi,
            torch.from_numpy(vocabulary.code_ids),
            vocabulary.codes_per_image,
            vocabulary.size,
            max_length,
        )

    def allowed(self, prefix_T: Tensor) -> Tensor:
        """Boolean mask [V] over the id that follows a prefix."""
        tail = prefix_T[-(self.codes_per_image + 1) :]
        begun = (tail == self.boi).nonzero()
        if len(begun):
            codes_so_far = len(tail) - 1 - int(begun[-1])
            return self.codes_V if codes_so_far < self.codes_per_image else self.closing_V
        return self.words_V if len(prefix_T) < self.max_length - (self.codes_per_image + 1) else self.words_only_V

    def __call__(self, batch_id: int, ids_T: Tensor) -> list[int]:
        return self.allowed(ids_T).nonzero().flatten().tolist()


class ImageLogitsProcessor(LogitsProcessor):
    """The same rule over a batch in a few tensor operations."""

    def __init__(self, grammar: ImageGrammar):
        self.grammar = grammar
        self.masks_4V = torch.stack([grammar.codes_V, grammar.closing_V, grammar.words_V, grammar.words_only_V])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        grammar = self.grammar
        tail_BT = input_ids[:, -(grammar.codes_per_image + 1) :]
        # Ids since the last BOI, or more than an image's where there is none.
        back_T = torch.arange(tail_BT.shape[1] - 1, -1, -1, device=tail_BT.device)
        since_B = torch.where(tail_BT == grammar.boi, back_T, grammar.codes_per_image + 1).min(1).values
        fits = input_ids.shape[1] < grammar.max_length - (grammar.codes_per_image + 1)
        case_B = torch.full_like(since_B, 2 if fits else 3)
        case_B[since_B == grammar.codes_per_image] = 1
        case_B[since_B < grammar.codes_per_image] = 0
        return scores.masked_fill(~self.masks_4V.to(scores.device)[case_B], torch.finfo(scores.dtype).min)
