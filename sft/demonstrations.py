"""Demonstrations as trajectories: a task's own or those of a file, in the recipe's format, images seen by the policy.

An image stands in a demonstration in one of two ways. What the policy drew is what it is to draw: codes or a latent, by
`Policy.encode_images`. What it was shown, in the prompt or by the environment, is perceived, and only conditions what
follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from formats.base import Format, Latent, SeenOnly
from formats.render import image_ids, render, with_codes
from policy.base import Policy
from record.trajectory import Author, Segment, Trajectory
from runtime.errors import UserError
from sft.config import SftConfig
from sft.sources import load_demonstrations
from tasks.base import Demonstration, Task

SEE_BATCH = 256
# In Trajectory.info: the segments of images that are known to be wrong; not there: nobody knows of any.
WRONG_IMAGES = "wrong_images"


def demonstrate(task: Task, fmt: Format, policy: Policy, config: SftConfig, seed: int) -> list[Trajectory]:
    """The trajectories to learn from: the task's demonstrations rendered in the format, those of a file, or stored
    ones."""
    if config.data is not None:
        trajectories = load_demonstrations(config, fmt, policy, task.prompts("heldout"))
        see(trajectories, policy)
        return trajectories
    demonstrations = task.demonstrations(fmt.name, config.demonstrations, seed)
    return render_all(demonstrations, fmt, policy, config.learn_mistakes)


def render_all(
    demonstrations: Sequence[Demonstration], fmt: Format, policy: Policy, learn_mistakes: bool = False
) -> list[Trajectory]:
    """Demonstrations with their images seen by the policy, in batches."""
    trajectories = []
    for group, d in enumerate(demonstrations):
        trajectory = render(fmt, d.prompt, d.record, d.parts, policy.vocabulary, media=d.media)
        trajectory.group = group
        # An image that is wrong on purpose is there to be inspected and repaired, a needless text to be followed:
        # neither is imitated.
        first = next(n for n, segment in enumerate(trajectory.segments) if segment.author is not Author.USER)
        for index in (*d.needless, *(() if learn_mistakes else d.mistakes)):
            trajectory.segments[first + index].trained = False
        trajectory.info[WRONG_IMAGES] = [first + index for index in d.mistakes]
        trajectories.append(trajectory)
    see(trajectories, policy)
    return trajectories


def see(trajectories: Sequence[Trajectory], policy: Policy) -> None:
    """Give every image that has none yet its content: codes, a latent, or whatever the family perceives.

    Raises:
        UserError: the policy is to draw, and its family draws nothing; an image that the family cannot see.
    """
    drawn: list[tuple[str, Segment]] = []
    shown: list[Segment] = []
    for index, trajectory in enumerate(trajectories):
        for number, segment in enumerate(trajectory.segments):
            if (segment.image is None and segment.frames is None) or len(segment.ids) or segment.latent is not None:
                continue
            if segment.author is Author.POLICY:
                where = f"demonstration {index} ('{trajectory.prompt}'): segment {number} ('{segment.role}')"
                drawn.append((where, segment))
            else:
                shown.append(segment)
    imaging = policy.vocabulary.imaging
    if drawn and isinstance(imaging, SeenOnly):
        raise UserError(
            f"{drawn[0][0]}: the policy draws an image there, and the family '{policy.family}' draws none; take "
            "demonstrations in which images are shown by the prompt or a tool"
        )
    with torch.inference_mode():
        for begin in range(0, len(drawn), SEE_BATCH):
            part = drawn[begin : begin + SEE_BATCH]
            contents = policy.encode_images([segment.image for _, segment in part if segment.image is not None])
            for (where, segment), content in zip(part, contents, strict=True):
                if isinstance(imaging, Latent):
                    segment.latent = np.asarray(content, np.float32)
                    segment.ids = np.asarray(image_ids(policy.vocabulary), np.int32)
                else:
                    segment.ids = np.asarray(with_codes(policy.vocabulary, content, where), np.int32)
        for begin in range(0, len(shown), SEE_BATCH):
            policy.perceive(shown[begin : begin + SEE_BATCH])


def check_demonstrations(trajectories: Sequence[Trajectory], fmt: Format) -> None:
    """Refuse to learn from sentences that the format itself would not accept.

    Raises:
        UserError: names the first such demonstration, its segment and what would be right.
    """
    for index, trajectory in enumerate(trajectories):
        where = f"demonstration {index} ({trajectory.prompt!r})"
        if trajectory.format != fmt.name:
            raise UserError(
                f"{where}: written in the format '{trajectory.format}', but the recipe's is '{fmt.name}'; "
                "change format.name or give other demonstrations"
            )
        for violation in fmt.violations(trajectory):
            segment = f", segment {violation.segment}" if violation.segment is not None else ""
            raise UserError(f"{where}{segment}: {violation.message}")
