"""Several trainer processes in one driver: the first one's work handed to all, and Ctrl-C heard by all at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from rollout.errors import UserError

T = TypeVar("T")


class ElsewhereError(UserError):
    """The first process could not go on, so neither can this one."""


class Interrupted(UserError):
    """Ctrl-C: the step was finished and saved. Exits as an interrupted program does."""

    exit_code = 130


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


class Interruption:
    """Whether Ctrl-C was pressed. Asked at step boundaries, where all processes must hear the same answer."""

    pressed = False

    def heard(self, accelerator: Accelerator) -> bool:
        return on_first(accelerator, lambda: self.pressed)


@contextmanager
def interruptible(say: Callable[[str], None]) -> Iterator[Interruption]:
    """Within it the first Ctrl-C asks for a stop at the next step boundary, and the second stops at once."""
    interruption = Interruption()

    def handle(number: int, frame: FrameType | None) -> None:
        if interruption.pressed:
            raise KeyboardInterrupt
        interruption.pressed = True
        say("Stopping after this step; once more to stop at once, without saving")

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread, which gets no signals
        yield interruption
        return
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)
