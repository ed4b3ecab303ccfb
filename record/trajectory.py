"""The record: a prompt and an ordered list of segments, written once and read by everybody downstream.

Demonstrations (sft), rollouts, rewards, the trainer and the report all hold this type. It is made of numpy
arrays, so that it travels between processes and imports neither torch, Ray nor transformers.

Letters: T ids of a segment, N decisions of a segment, R id ranges, S segments of a trajectory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

import numpy as np

from runtime.errors import UserError

PARENT_GROUP = "parent_group"  # in Trajectory.info
ARM = "arm"  # in Trajectory.info: which picture a counterfactual has in the place of its parent's last one


class RecordError(UserError):
    """A trajectory that breaks the record's own rules."""


class Author(StrEnum):
    POLICY = "policy"
    ENVIRONMENT = "environment"
    USER = "user"


class Modality(StrEnum):
    TEXT = "text"
    IMAGE = "image"  # an image of whatever making: what a grammar says, and how an image that is only seen is recorded
    IMAGE_TOKENS = "image_tokens"  # drawn as visual codes
    IMAGE_LATENT = "image_latent"  # denoised
    VIDEO_FRAMES = "video_frames"


class DecisionKind(IntEnum):
    """What was chosen: the loss looks up clip range and weight by it."""

    WORD = 0
    CODE = 1
    FLOW = 2


class StopReason(StrEnum):
    END = "end"  # the policy sampled its end-of-turn token, or the format had nothing left to follow
    MAX_TOKENS = "max_tokens"
    MAX_IMAGES = "max_images"
    MAX_CONTEXT = "max_context"  # the next segment would not have fitted; it was not begun
    DEMONSTRATION = "demonstration"  # written, not sampled

    @property
    def cut_off(self) -> bool:
        """Whether a limit ended it, and not its author."""
        return self in (StopReason.MAX_TOKENS, StopReason.MAX_IMAGES, StopReason.MAX_CONTEXT)


@dataclass(frozen=True)
class Piece:
    """One segment as it was seen by a later one."""

    segment: int  # index into Trajectory.segments
    form: str  # "ids", or one that the policy's family names: "vae", "vit", "frames" ...
    start: int  # position id of its first slot; with several axes, on each of them
    keep: tuple[int, int] | None = None  # half-open range of its ids or frames; None: all of it


@dataclass(frozen=True)
class Context:
    """What a segment's decisions were conditioned on, under one guidance branch."""

    branch: str  # "full" is the conditional one; others are named by the guidance that needs them
    pieces: tuple[Piece, ...]
    start: int  # position id of the segment's own first token under this branch


@dataclass(frozen=True)
class Guidance:
    """How the branches' logits (or velocities) were combined: policy/guidance.py defines each kind."""

    kind: str
    scales: dict[str, float]


@dataclass
class SamplingParams:
    """What the decisions of one segment were sampled from, so that scoring can renormalise over the same thing.

    `sets[allowed_N[n]]` are the half-open id ranges [R, 2] among which decision n was chosen; -1 is the whole
    vocabulary. Temperature 0 has no density: such decisions are greedy and never trained.
    """

    temperature_N: np.ndarray  # float32
    allowed_N: np.ndarray  # int32
    sets: tuple[np.ndarray, ...]  # each int32 [R, 2], sorted and disjoint
    guidance: Guidance | None = None  # None: unguided. Applies to CODE and FLOW decisions; words are never guided

    @property
    def greedy_N(self) -> np.ndarray:
        return self.temperature_N == 0


@dataclass
class Decisions:
    """The policy's choices in one segment, in the order in which they were made."""

    kind_N: np.ndarray  # int8, DecisionKind
    position_N: np.ndarray  # int32: index into Segment.ids, or the denoising step
    logprob_N: np.ndarray  # float32, behaviour log-prob under the law; NaN where greedy
    sampling: SamplingParams

    def __len__(self) -> int:
        return len(self.kind_N)


@dataclass
class FlowSteps:
    """How one image was denoised. Each stochastic step is a decision, whose `Decisions.position_N` is its number.

    Letters: M times, one more than there are steps; P latents, N + 1 of them where the stochastic steps are neighbours.
    """

    sampler: dict[str, Any]  # policy/scoring/flow.py: Sampler.as_json
    time_M: np.ndarray  # float32, from 1 (noise) down to 0
    point_N: np.ndarray  # int32, index into x_P of where each decision started; it led to the next one
    x_P: np.ndarray  # float32 [P, ...]

    @property
    def x_N(self) -> np.ndarray:
        return self.x_P[self.point_N]

    @property
    def x_next_N(self) -> np.ndarray:
        return self.x_P[self.point_N + 1]


@dataclass(frozen=True)
class Frames:
    """A stretch of video."""

    frames_F: np.ndarray  # uint8 [F, height, width, 3]
    time_F: np.ndarray  # float32, seconds from the video's start

    def __post_init__(self) -> None:
        if self.frames_F.dtype != np.uint8 or self.frames_F.ndim != 4 or len(self.frames_F) != len(self.time_F):
            raise RecordError(
                f"frames are uint8 [frames, height, width, 3] with a time each, not {self.frames_F.dtype} "
                f"{list(self.frames_F.shape)} with {len(self.time_F)} times"
            )


Media = np.ndarray | Frames  # an image, uint8 [height, width, 3], or frames


@dataclass
class Segment:
    """A stretch by one author in one role.

    `ids` holds the tokens exactly as they stand in the context, forced ones included: a text segment with its
    tags, an image with its markers ([BOI, code..., EOI]). `decisions` is None for what nobody sampled.
    """

    role: str
    author: Author
    modality: Modality
    trained: bool
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # int32 [T]
    text: str = ""  # what a reader sees; decoded from ids once, by whoever wrote the segment
    decisions: Decisions | None = None
    flow: FlowSteps | None = None
    image: np.ndarray | None = None  # uint8 [height, width, 3]
    latent: np.ndarray | None = None  # float32, where a sampled posterior latent re-enters the context
    contexts: tuple[Context, ...] = ()  # the first one is "full"; empty for segments that nobody sampled
    version: int = 0  # of the weights that sampled it
    frames: Frames | None = None

    def __post_init__(self) -> None:
        if self.image is not None and (self.image.dtype != np.uint8 or self.image.ndim != 3):
            raise RecordError(
                f"segment '{self.role}': an image is uint8 [height, width, 3], not "
                f"{self.image.dtype} {list(self.image.shape)}"
            )
        if self.decisions is not None and self.flow is None and len(self.decisions):
            last = int(self.decisions.position_N.max())
            if last >= len(self.ids):
                raise RecordError(f"segment '{self.role}': a decision at position {last} of {len(self.ids)} ids")


@dataclass
class Trajectory:
    """One thought: the prompt, the segments, and what was made of it afterwards."""

    prompt: str
    record: dict[str, Any]  # the task's columns for this prompt, JSON values (GenEval's tag, include, exclude ...)
    format: str
    segments: list[Segment]
    group: int = 0  # members of one group share the prompt
    member: int = 0
    seed: int = 0
    stop: StopReason = StopReason.END
    rewards: dict[str, float | None] = field(default_factory=dict)  # by part; None: not judged
    segment_rewards: dict[str, dict[int, float | None]] = field(default_factory=dict)  # parts that credit segments
    reward: float | None = None  # the recipe's expression over the parts; None: unjudged, trains nothing
    advantage_S: np.ndarray | None = None  # float32, one a segment; None until credited
    info: dict[str, Any] = field(default_factory=dict)  # JSON values that nothing computes with
    # (member, segments): it goes on from that member's first ones, which it holds too, untrained: they are the
    # parent's. The parent is of the same group, unless info names another one (PARENT_GROUP).
    parent: tuple[int, int] | None = None
    exact: bool = True  # its log-probs are the scorer's; False: another engine's, which the trainer rescores

    @property
    def key(self) -> str:
        return f"{self.group}-{self.member}"

    @property
    def continues(self) -> str:
        """What it goes on from, for a reader; empty where it begins at the prompt."""
        if self.parent is None:
            return ""
        member, segments = self.parent
        group, arm = self.info.get(PARENT_GROUP), self.info.get(ARM)
        of = "" if group is None else f" of group {group}"
        instead = "" if arm is None else f", the image there: {arm}"
        return f"continues member {member}{of} after segment {segments - 1}{instead}"

    def images(self) -> list[np.ndarray]:
        """The images that the policy drew, in order."""
        return [s.image for s in self.segments if s.author is Author.POLICY and s.image is not None]

    def occurrence(self, segment: int) -> int:
        """How many earlier segments have the same role (and modality)."""
        this = self.segments[segment]
        return sum(s.role == this.role and s.modality == this.modality for s in self.segments[:segment])

    def num_tokens(self) -> int:
        return sum(len(s.ids) for s in self.segments)

    def num_decisions(self) -> int:
        return sum(len(s.decisions) for s in self.segments if s.decisions is not None)


def full_history(trajectory: Trajectory, segment: int) -> Context:
    """The plain causal context of a family whose every segment is ids: all earlier ones at consecutive positions."""
    pieces, start = [], 0
    for index in range(segment):
        pieces.append(Piece(index, "ids", start))
        start += len(trajectory.segments[index].ids)
    return Context("full", tuple(pieces), start)


def ranges_of(ids: np.ndarray | list[int]) -> np.ndarray:
    """Sorted disjoint half-open ranges [R, 2] that hold exactly `ids`."""
    unique = np.unique(np.asarray(ids, np.int64))
    if not len(unique):
        return np.empty((0, 2), np.int32)
    breaks = np.flatnonzero(np.diff(unique) != 1)
    starts = unique[np.concatenate([[0], breaks + 1])]
    stops = unique[np.concatenate([breaks, [len(unique) - 1]])] + 1
    return np.stack([starts, stops], 1).astype(np.int32)


def mask_of(ranges: np.ndarray, size: int) -> np.ndarray:
    """Boolean mask [size], True inside the ranges."""
    mask = np.zeros(size, bool)
    for start, stop in ranges:
        mask[start:stop] = True
    return mask
