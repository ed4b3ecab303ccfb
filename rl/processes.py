"""Several trainer processes in one driver: the first one's work handed to all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from rollout.errors import UserError

T = TypeVar("T")


class ElsewhereError(UserError):
    """The first process could not go on, so neither can this one."""


def on_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` returns on the first process, on every process (pickled). Nothing else runs it.

    An error there is raised on all: the others would wait for ever.
    """
    if accelerator.num_processes == 1:
        return work()
    error: Exception | None = None
    box: list = [None, ""]
    if accelerator.is_main_process:
        try:
            box[0] = work()
        except Exception as raised:
            error, box[1] = raised, f"{type(raised).__name__}: {raised}"
    broadcast_object_list(box)
    if error is not None:
        raise error
    if box[1]:
        raise ElsewhereError(box[1])
    return box[0]
