"""What a tool is: it opens a session for a trajectory, which answers calls until the trajectory is finished.

DeepEyes and verl-tool keep such sessions a trajectory too (arXiv:2505.14362; verl_tool/servers); here a call is
asynchronous, and whatever goes wrong in it is words that the model reads.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from record.trajectory import Frames, Segment, Trajectory

# Words, an image (uint8 [height, width, 3]), frames, or a segment whose role the tool chooses itself.
Reply = str | np.ndarray | Frames | Segment


class ToolError(Exception):
    """A call that a tool cannot serve. The message is for the model: it is read as the answer."""


@dataclass(frozen=True)
class ToolCall:
    """What the policy asked for."""

    tool: str  # by the name that the recipe has for it
    arguments: dict[str, Any] = field(default_factory=dict)  # of a JSON object; empty where the body is none
    body: str = ""  # what stands between the tags
    role: str = ""  # of the policy's segment


class ToolSession(Protocol):
    """A tool at one trajectory's service. Its calls come one after another.

    `call` and `close` may be `async def`, which must await and never block, or plain functions, each run of which has a
    thread of its own.
    """

    def call(self, call: ToolCall, trajectory: Trajectory) -> Sequence[Reply] | Awaitable[Sequence[Reply]]:
        """Answer with nothing, or with one or several replies in their order.

        Args:
            trajectory: all that was written so far, images drawn; the call is its last segment. Not to be changed.

        Raises:
            ToolError: with words for the model. Any other exception is an answer too, and is counted as an error.
        """
        ...

    def close(self) -> None | Awaitable[None]:
        """Called once, when the trajectory is finished or given up. A plain `call` that was too late may still run."""
        ...


class Tool(Protocol):
    """Built once an engine, and in the driver to be checked, so building is cheap.

    A class that a recipe names may have an inner class `Options`, a Section of its options, and is made with one of
    these; without it the class is made without arguments.

    It may offer `words`: what it says and what calls of it are made of, for a tiny tokenizer that is made for a run.
    """

    name: str  # what calls name it by, where a recipe calls it nothing else
    repeatable: bool  # a call may be made again, with nothing left behind, where its trajectory is written again

    def open(self, trajectory: Trajectory) -> ToolSession | Awaitable[ToolSession]:
        """Before the trajectory's first call of this tool. May be `async def` or plain, as a session's methods."""
        ...
