"""What a model that thinks must supply. The engine owns the sampling loop; a policy owns its weights and forms.

Letters: B rows of a call, V vocabulary, N decisions of all trajectories of a call in order (trajectory by
trajectory, segment by segment, as they were made).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from formats.base import Vocabulary
from record.trajectory import Context, Guidance, Piece, Segment, Trajectory


@dataclass
class TokenStep:
    """Feed one id to each row, at the row's next position, and ask for the logits that follow."""

    ids_B: Tensor  # int64


@dataclass
class FlowStep:
    """One denoising step of each row. Nothing enters the cache."""

    x_B: Tensor  # float32 [B, ...]
    time_B: Tensor  # float32, from 1 (noise) to 0


@dataclass
class Categorical:
    """Unnormalised and uncut: temperature, guidance and the allowed set are the engine's to apply, and to record."""

    logits_BV: Tensor  # float32


@dataclass
class Velocity:
    """d x / d time of the flow at x_B: samplers, noise and guidance are the engine's."""

    velocity_B: Tensor  # float32 [B, ...]


@dataclass(frozen=True)
class Extent:
    """What a segment takes when it is seen in a form."""

    slots: int  # of the cache
    positions: int  # by which the next piece's start is later


@dataclass
class FlowScores:
    """What the current weights say of one image's denoising steps, for the ratios and divergences of such steps.

    F are its decisions, in their order. policy/scoring/steps.py makes it from velocities.
    """

    place: tuple[int, int]  # index into the call's passes, and segment
    decision_F: Tensor  # int64, index into the call's N
    x_next_F: Tensor  # float32 [F, ...], where each step led
    mean_F: Tensor  # float32 [F, ...]; carries the gradient
    velocity_F: Tensor  # float32 [F, ...], guided; carries the gradient
    noise_std_F: Tensor  # float32
    step_size_F: Tensor  # float32, the time that it takes off


@dataclass
class Scored:
    """What the current weights say of recorded decisions.

    Raises nothing for greedy decisions: they are left out, as are those of untrained segments.
    """

    pass_N: Tensor  # int64, index into the call's passes
    segment_N: Tensor  # int64
    kind_N: Tensor  # int64, DecisionKind
    logprob_N: Tensor  # float32, under the recorded law; carries the gradient
    behaviour_N: Tensor  # float32, as recorded by the engine
    log_ratio_N: Tensor  # float32: the difference of log-probs, new less `old`
    divergence_N: Tensor | None  # float32: k3 of the log-probs from those of `reference`; None: none given
    entropy_N: Tensor | None  # float32, of the law's distribution, detached; None: not asked for
    # One an image that was denoised. From them rl/flow_decisions.py makes those decisions' ratios and divergences anew.
    flows: tuple[FlowScores, ...] = ()


class Cache(Protocol):
    """Key-value rows, allocated once and reused. Rows are independent and may differ in length."""

    rows: int
    length: int


@dataclass(frozen=True)
class Pass:
    """The atom of scoring: one forward of known cost, and the decisions of a trajectory that it scores."""

    trajectory: Trajectory
    segments: tuple[int, ...]  # whose trained decisions it scores, ascending
    cost: int  # slots that are forwarded, guidance branches included, padding not
    modules: frozenset[str]  # what it touches, by the family's own names: ranks make equal passes over equal modules
    decisions: int
    plan: Any = field(default=None, repr=False, compare=False)  # the family's own
    rows: tuple[int, ...] = ()  # lengths of its rows, where a forward pads all rows to the longest; none: no padding


def forwarded(passes: Sequence[Pass]) -> int:
    """Slots that one forward of these passes takes, padding included: what memory and time follow."""
    packed = sum(one.cost for one in passes if not one.rows)
    padded = [length for one in passes for length in one.rows]
    return packed + len(padded) * max(padded, default=0)


class Policy(Protocol):
    family: str
    model: torch.nn.Module  # what the optimiser trains and weight syncs ship
    max_length: int  # slots that one row can hold

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of an image that is denoised; empty: the family denoises none."""
        ...

    @property
    def image_slots(self) -> int:
        """What an image takes once it is drawn, in all forms in which it is seen again; 0: the family draws none."""
        ...

    # ---- what a segment takes ----
    def forms(self, segment: Segment) -> tuple[str, ...]:
        """In which forms later segments see this one, in order, where the format does not say."""
        ...

    def extent(self, segment: Segment, form: str, keep: tuple[int, int] | None = None) -> Extent | None:
        """Slots and positions of a segment in a form. None: the family cannot see it so."""
        ...

    def perceive(self, segments: Sequence[Segment]) -> None:
        """Take in the media of segments that the policy did not draw: ids where images are ids, and whatever else
        `extent` and `prefill` want. Sets the segments' fields.

        Raises UserError for media that the family cannot see.
        """
        ...

    # ---- sampling: called by the engine under torch.inference_mode ----
    def allocate(self, rows: int, length: int) -> Any:
        """A cache of `rows` rows of up to `length` slots."""
        ...

    def prefill(self, cache: Any, row_B: Sequence[int], contexts: Sequence[tuple[Trajectory, Context]]) -> Tensor:
        """Forget the rows and compute them anew from their contexts. Returns logits_BV after the last slot
        (undefined for an empty context)."""
        ...

    def copy(self, cache: Any, source: int, row_B: Sequence[int]) -> None:
        """Make the rows equal to `source`: a group's prompt is computed once."""
        ...

    def step(self, cache: Any, row_B: Sequence[int], inputs: TokenStep | FlowStep) -> Categorical | Velocity: ...

    def append(self, cache: Any, row_B: Sequence[int], pieces: Sequence[tuple[Trajectory, Piece]]) -> Tensor:
        """Extend rows by a finished segment in a given form (environment text, a re-encoded image).
        Returns logits_BV after it."""
        ...

    # ---- images ----
    def encode_images(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 [height, width, 3] to content: for token families the ids of the codes, int32 [count], without
        markers; for flow families the latent."""
        ...

    def decode_images(self, contents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Content (as `encode_images` gives it, or a latent) to uint8 [height, width, 3]."""
        ...

    # ---- training ----
    def guide(self, branches: dict[str, Tensor], guidance: Guidance, at: FlowStep | None = None) -> Tensor:
        """Combine the branches' logits [.., V] or, asked for at some latents and times, their velocities."""
        ...

    def passes(self, trajectories: Sequence[Trajectory], budget: int | None = None) -> list[Pass]:
        """What scores the trained decisions of trajectories, in their order. A trajectory is divided at segments where
        it would take more than `budget` slots as forwarded; None: it is not divided. A pass of several segments takes
        no more than the budget or, where that is more, than the trajectory's dearest segment alone."""
        ...

    def score(
        self,
        passes: Sequence[Pass],
        old: Scored | None = None,
        reference: Scored | None = None,
        entropy: bool = False,
    ) -> Scored:
        """Replay the recorded contexts and sampling parameters with gradient, all passes in one forward. `old` None:
        ratios against the behaviour log-probs. Ratios of the same weights are 1."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within it the model is the reference: adapters off, or the frozen copy's weights."""
        ...

    def save(self, folder: Path) -> None:
        """Write a folder that the family can be loaded from again, adapters merged in."""
        ...


def score_trajectories(policy: Policy, trajectories: Sequence[Trajectory], **kwargs: Any) -> Scored:
    """All decisions of some trajectories in one forward; `pass_N` then counts trajectories."""
    passes = policy.passes(trajectories)
    number = {id(trajectory): index for index, trajectory in enumerate(trajectories)}
    scored = policy.score(passes, **kwargs)
    owner_P = torch.tensor([number[id(p.trajectory)] for p in passes], dtype=torch.int64, device=scored.pass_N.device)
    return replace(scored, pass_N=owner_P[scored.pass_N] if len(passes) else scored.pass_N)
