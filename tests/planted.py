"""Policies of known ways: they draw what the prompt asks, more often than not, say a word, draw again and end the turn.

`copies`: the word and the second image are the first one's. Else both are by chance, whatever the first one shows.
"""

from __future__ import annotations

import numpy as np
import torch

from record.trajectory import Author, Trajectory
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from tests.fakes import FakeFormat, FakePolicy

SURE = 40.0  # logits above those of all others
PROMPTS = ("red", "blue")  # ask for codes of the lower half, of the upper half


class Planted(FakePolicy):
    def __init__(self, copies: bool):
        super().__init__()
        self.copies = copies

    def prefill(self, cache, row_B, contexts):
        super().prefill(cache, row_B, contexts)
        cache.ids = getattr(cache, "ids", {})
        for row, (trajectory, context) in zip(row_B, contexts, strict=True):
            cache.ids[row] = [int(id) for piece in context.pieces for id in trajectory.segments[piece.segment].ids]
        return torch.stack([self.logits(cache.ids[row]) for row in row_B])

    def copy(self, cache, source, row_B):
        super().copy(cache, source, row_B)
        for row in row_B:
            cache.ids[row] = list(cache.ids[source])

    def step(self, cache, row_B, inputs):
        answer = super().step(cache, row_B, inputs)
        for row, id in zip(row_B, inputs.ids_B.tolist(), strict=True):
            cache.ids[row].append(id)
        answer.logits_BV = torch.stack([self.logits(cache.ids[row]) for row in row_B])
        return answer

    def logits(self, ids: list[int]) -> torch.Tensor:
        v, wanted_V = self.vocabulary, torch.zeros(self.vocabulary.size)
        begun = [at for at, id in enumerate(ids) if id == v.boi]
        inside = begun and len(ids) - begun[-1] - 1 < v.codes_per_image
        said = ids[begun[-1] + v.codes_per_image + 2 :] if begun and not inside else []
        if inside and len(begun) == 1:
            lower = v.decode(ids[: begun[0]]).strip() == PROMPTS[0]
            half = v.code_ids[:4] if lower else v.code_ids[4:]
            wanted_V[half.tolist()] = 2.0
        elif inside and self.copies:
            wanted_V[ids[begun[0] + len(ids) - begun[-1]]] = SURE
        elif not inside:
            if not begun or said[1:]:
                wanted = [v.boi]
            elif len(begun) > 1:
                wanted = [v.eos]
            elif said:
                wanted = [v.stop]
            else:
                first = ids[begun[0] + 1]
                wanted = [v.word_ids[first % 2]] if self.copies else v.word_ids
            wanted_V[wanted] = SURE
        return wanted_V


def engine(copies: bool) -> Engine:
    return Engine(Planted(copies), FakeFormat(max_images=2), RolloutConfig(rows=8, max_tokens=40))


def reward(trajectory: Trajectory) -> float:
    """The share of the last image that is of the half that the prompt asks for."""
    drawn = [s.image for s in trajectory.segments if s.author is Author.POLICY and s.image is not None]
    lower_W = drawn[-1][0, :, 0].astype(int) <= 4
    return float(np.mean(lower_W if trajectory.prompt == PROMPTS[0] else ~lower_W))
