"""Chameleon's visual losses in a warm start: which states of `score`'s forward they see, and their place in the model.

Letters: R rows of a forward, T ids, N decisions, M codes that are held to the codebook, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from policy.chameleon.model import InterleavedChameleon
from policy.chameleon.replay import Replay
from policy.chameleon.vocabulary import ChameleonVocabulary
from policy.extra_losses import VisualLossConfig
from policy.scoring.visual_losses import (
    CodeTargets,
    TokenDiscrepancy,
    VisualReconstruction,
    own_codes,
    predicted_codes,
)
from record.trajectory import Trajectory

UNLEARNED = -100


class Scorer(Protocol):
    """Of the family's policy, what the loss asks."""

    vocabulary: ChameleonVocabulary
    core: InterleavedChameleon
    score_chunk: int
    before_forward: list[Callable[[Replay], None]]  # told of every forward of `score` before it runs

    @property
    def device(self) -> torch.device: ...


class CodebookLoss:
    """policy.extra_losses.ExtraLoss: holds visual codes to their codebook. `seed`: of a fresh projection."""

    name = "visual"

    def __init__(self, policy: Scorer, config: VisualLossConfig, seed: int) -> None:
        self.policy, self.config, self.seed = policy, config, seed
        self.weight, self.form = config.weight, f"{config.kind}, {config.variant}"
        vocabulary = policy.vocabulary
        self.code_of_V = torch.full((vocabulary.size,), -1, dtype=torch.int64)  # -1: no visual code
        self.code_of_V[torch.as_tensor(vocabulary.code_ids, dtype=torch.int64)] = torch.arange(len(vocabulary.code_ids))
        self._codes: CodeTargets | None = None
        self._loss: Tensor | None = None
        self._hook: Any = None

    def attach(self) -> None:
        core: Any = self.policy.core
        core.visual_loss = self._module().to(self.policy.device)
        self.code_of_V = self.code_of_V.to(self.policy.device)
        # Inside the model's forward, where wrappers such as FSDP have the weights of projection and head at hand.
        self._hook = core.model.register_forward_hook(self._see)
        self.policy.before_forward.append(self.aim)

    def detach(self) -> None:
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        del self.policy.core.visual_loss
        self.policy.before_forward.remove(self.aim)

    def _module(self) -> VisualReconstruction | TokenDiscrepancy:
        core: Any = self.policy.core
        codebook_KE = core.model.vqmodel.quantize.embedding.weight
        release = self.config.variant == "release"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # on every process the same
            if self.config.kind == "twgi":
                return VisualReconstruction(core.config.hidden_size, codebook_KE, release)
            id_of_code_K = torch.as_tensor(self.policy.vocabulary.code_ids, dtype=torch.int64)
            return TokenDiscrepancy(codebook_KE, id_of_code_K, release, self.policy.score_chunk)

    def aim(self, replay: Replay) -> None:
        """Which codes of the coming forward are held to the codebook, and by which states."""
        labels_RT = labels_of(replay)
        release = self.config.variant == "release"
        if self.config.kind == "twgi" and release:
            vocabulary = self.policy.vocabulary
            self._codes = own_codes(
                replay.ids_LT, labels_RT, self.code_of_V, vocabulary.boi, vocabulary.codes_per_image
            )
        else:
            self._codes = predicted_codes(labels_RT, self.code_of_V, release)

    def _see(self, module: Any, args: Any, output: Any) -> None:
        if self._codes is None:
            return
        hidden_MD = output[0].reshape(-1, output[0].shape[-1])[self._codes.at_M]
        core: Any = self.policy.core
        self._loss = core.visual_loss(hidden_MD, self._codes.code_M, core.lm_head.weight)
        self._codes = None

    def loss(self, trajectories: Sequence[Trajectory]) -> Tensor | None:
        taken, self._loss = self._loss, None
        return taken

    def state(self) -> dict[str, Any]:
        core: Any = self.policy.core
        return core.visual_loss.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        core: Any = self.policy.core
        core.visual_loss.load_state_dict(state)


def labels_of(replay: Replay) -> Tensor:
    """The ids of a forward where they are decisions, int64 [R, T]; -100 elsewhere. Not shifted."""
    labels_RT = torch.full_like(replay.ids_LT, UNLEARNED)
    if replay.batch is not None:
        # An id stands after the position that predicts it.
        labels_RT.view(-1)[replay.batch.index_KN[0] + 1] = replay.batch.target_N
    return labels_RT
