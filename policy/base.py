"""What a model that thinks must supply. The engine owns the sampling loop; a policy owns its weights and forms.

Letters: B rows of a call, V vocabulary, N decisions of all trajectories of a call in order (trajectory by
trajectory, segment by segment, as they were made).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from formats.base import Vocabulary
from record.trajectory import Context, Guidance, Trajectory


@dataclass
class TokenStep:
    """Feed one id to each row, at the row's next position, and ask for the logits that follow."""

    ids_B: Tensor  # int64


@dataclass
class FlowStep:
    """One stochastic denoising step of each row. Nothing enters the cache."""

    x_B: Tensor  # float32 [B, ...]
    time_B: Tensor
    time_next_B: Tensor


@dataclass
class Categorical:
    """Unnormalised and uncut: temperature, guidance and the allowed set are the engine's to apply, and to record."""

    logits_BV: Tensor  # float32


@dataclass
class Gaussian:
    mean_B: Tensor  # float32 [B, ...]
    sigma_B: Tensor  # float32 [B]; 0: a deterministic step, which is no decision


@dataclass
class Scored:
    """What the current weights say of recorded decisions.

    Raises nothing for greedy decisions: they are left out, as are those of untrained segments.
    """

    trajectory_N: Tensor  # int64, index into the call's sequence
    segment_N: Tensor  # int64
    kind_N: Tensor  # int64, DecisionKind
    logprob_N: Tensor  # float32, under the recorded law; carries the gradient
    behaviour_N: Tensor  # float32, as recorded by the engine
    log_ratio_N: Tensor  # float32: new against `old`, as the kind defines it
    divergence_N: Tensor | None  # float32: from `reference`, as the kind defines it (k3 for tokens); None: none given
    entropy_N: Tensor | None  # float32, of the law's distribution, detached; None: not asked for
    mean_N: Any = None  # flow families keep their step means here, for the next call's ratio or divergence


class Cache(Protocol):
    """Key-value rows, allocated once and reused. Rows are independent and may differ in length."""

    rows: int
    length: int


class Policy(Protocol):
    family: str
    model: torch.nn.Module  # what the optimiser trains and the publisher ships
    max_length: int  # ids that one row can hold

    @property
    def vocabulary(self) -> Vocabulary: ...

    # ---- sampling: called by the engine under torch.inference_mode ----
    def allocate(self, rows: int, length: int) -> Any:
        """A cache of `rows` rows of up to `length` positions."""
        ...

    def prefill(self, cache: Any, row_B: Sequence[int], contexts: Sequence[tuple[Trajectory, Context]]) -> Tensor:
        """Forget the rows and compute them anew from their contexts. Returns logits_BV after the last position
        (undefined for an empty context)."""
        ...

    def copy(self, cache: Any, source: int, row_B: Sequence[int]) -> None:
        """Make the rows equal to `source`: a group's prompt is computed once."""
        ...

    def step(self, cache: Any, row_B: Sequence[int], inputs: TokenStep | FlowStep) -> Categorical | Gaussian: ...

    def append(self, cache: Any, row_B: Sequence[int], pieces: Sequence[tuple[Trajectory, int, str]]) -> Tensor:
        """Extend rows by a finished segment in a given form (environment text, a re-encoded image).
        Returns logits_BV after it."""
        ...

    # ---- images ----
    def encode_images(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 [height, width, 3] to content: for token families the ids of the codes, int32 [codes_per_image],
        without markers."""
        ...

    def decode_images(self, contents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Content (as `see` gives it, or a latent) to uint8 [height, width, 3]."""
        ...

    # ---- training ----
    def guide(self, branches: dict[str, Tensor], guidance: Guidance) -> Tensor:
        """Combine the branches' logits [.., V] or velocities."""
        ...

    def score(
        self,
        trajectories: Sequence[Trajectory],
        old: Scored | None = None,
        reference: Scored | None = None,
        entropy: bool = False,
    ) -> Scored:
        """Replay the recorded contexts and laws with gradient. `old` None: ratios against the behaviour log-probs.
        Ratios of the same weights are 1."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within it the model is the reference: adapters off, or the frozen copy's weights."""
        ...

    def save(self, folder: Path) -> None:
        """Write a folder that the family can be loaded from again, adapters merged in."""
        ...
