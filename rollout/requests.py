"""What a rollout is asked for: one prompt, the members of its group, and the seed of their noise.

The driver makes requests, pool/ spreads them over writers, and each turns its own into trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from record.trajectory import ARM, Media, Segment, Trajectory
from rollout.config import FlowConfig
from runtime.errors import UserError
from tasks.media import media_of

RequestKey = tuple[int, tuple[int, int] | None, str]  # group, parent, arm


class RolloutError(UserError):
    """A request that cannot be served; the sentence names the prompt or the key."""


@dataclass(frozen=True)
class RolloutRequest:
    """One group, or those of its members that this engine is to write.

    `members` are indices within the whole group: a trajectory depends on (seed, group, member), never on which
    engine or row wrote it, so a group may be split over calls or written again.

    With `parent` the members go on from another trajectory's first segments (rollout/forks.py makes such requests). The
    index of a decision in the noise counts those of the prefix, so a member differs from its parent from its first own
    decision on. The prefix's decisions are the parent's: they are recorded, untrained, and the limits count them.
    """

    group: int
    prompt: str
    record: dict[str, Any] = field(default_factory=dict)  # the task's columns, handed on to the trajectory
    members: tuple[int, ...] = (0,)
    seed: int = 0
    # What the prompt shows: images, uint8 [height, width, 3], and frames.
    media: tuple[Media, ...] = field(default=(), compare=False)
    parent: tuple[int, int] | None = None  # (member, segments): as in Trajectory.parent
    parent_group: int | None = None  # the parent's group; None: this one
    prefix: tuple[Segment, ...] = field(default=(), compare=False)  # the parent's first segments, whole
    unanswered: bool = False  # where the prefix ends with a call, the environment answered it with nothing
    # Of a counterfactual (rollout/counterfactuals.py): what stands in the place of the prefix's last image. Its arms go
    # on from one state with the same members' noise, so each is a request of its own.
    arm: str = ""
    decided: int | None = None  # decisions that the prefix counts as in the noise; None: those that it holds
    flow: FlowConfig | None = None  # how its images are denoised; None: as the recipe's rollouts say
    # Written to try the writer: a call of a tool that is not `repeatable` is not made, and answered by an error.
    rehearsal: bool = False

    @property
    def key(self) -> RequestKey:
        """What tells the requests of one generation apart."""
        return self.group, self.parent, self.arm


def key_of(trajectory: Trajectory) -> RequestKey:
    """The key of the request that a trajectory answers."""
    return trajectory.group, trajectory.parent, trajectory.info.get(ARM, "")


def request_of(
    group: int, record: dict[str, Any], members: Sequence[int], seed: int, flow: FlowConfig | None = None
) -> RolloutRequest:
    """What a task's record asks for, with what its prompt shows.

    Raises UserError for an image or a video that cannot be read.
    """
    return RolloutRequest(group, record["prompt"], record, tuple(members), seed, media_of(record), flow=flow)
