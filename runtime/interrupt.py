"""Ctrl-C while training: the step is finished and saved first. Imports none of our packages but the record."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from runtime.errors import UserError


class Interrupted(UserError):
    """Ctrl-C: the step was finished and saved. Exits as an interrupted program does."""

    exit_code = 130


class Interruption:
    """Whether Ctrl-C was pressed. Asked at step boundaries, where all processes must hear the same answer."""

    pressed = False


@contextmanager
def interruptible(say: Callable[[str], None]) -> Iterator[Interruption]:
    """Within it the first Ctrl-C asks for a stop after the step, and the second stops at once."""
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
