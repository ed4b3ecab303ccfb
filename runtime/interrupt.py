"""Signals that ask for an end: Ctrl-C, a batch system's SIGTERM, its warning SIGUSR1, a terminal that is gone (SIGHUP).

Anywhere else a signal raises Stop in the main thread (`heed_signals`, around a whole command). While training the first
one lets the step be finished and saved (`interruptible`), and while things are stored or ended signals wait
(`uninterrupted`). A program that obeyed a signal exits with 128 and its number: 130, 143, 138, 129.

SIGUSR1 means something else in worker processes, which write their stack down at it (actor_process.py).
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

from runtime.errors import UserError

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
GRACE_S = 20.0  # what kills a process for good mostly waits 30 s after its SIGTERM (Slurm, Kubernetes, torchrun)
ECHO_S = 0.3  # a launcher passes on what the terminal has sent already: that is the same signal again

_last: int = signal.SIGINT  # that raised a Stop
_late = 0  # a signal that came when there was nothing left to stop

T = TypeVar("T")
Handler = Callable[[int, FrameType | None], Any]


class Stop(KeyboardInterrupt):
    """A signal came. Raised in the main thread, wherever it is."""

    def __init__(self, number: int) -> None:
        global _last
        super().__init__(signal.Signals(number).name)
        self.number = _last = number


class Interrupted(UserError):
    """The work was stopped by a signal, and what can be kept is kept. Exits as a program that the signal ended."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number, self.exit_code = number, 128 + number


class Interruption:
    """Which signal has asked for a stop. Asked at step boundaries, where all processes must hear the same answer."""

    def __init__(self) -> None:
        self.signal = 0  # 0: none
        self._over = self._breakable = self._broken = self._waking = False
        self._news: queue.SimpleQueue[int] = queue.SimpleQueue()  # a handler may put into it whatever it interrupts

    @property
    def pressed(self) -> bool:
        return self.signal != 0

    def breakable(self, work: Callable[[], T]) -> Callable[[], T]:
        """`work`, but broken off by Interrupted once the grace time is over. For what another attempt makes again."""

        def broken_off_in_time() -> T:
            self._breakable = True
            try:
                self._look()
                return work()
            except KeyboardInterrupt:
                if not self._broken:
                    raise
                raise self._too_late() from None  # Ray makes a KeyboardInterrupt of whatever a handler raises
            finally:
                self._breakable = False

        return broken_off_in_time

    @contextmanager
    def blamed_for(self, *kinds: type[UserError]) -> Iterator[None]:
        """Within it an error of these kinds that comes after a signal is an Interrupted: the signal went to others too,
        as a batch system sends it."""
        try:
            yield
        except kinds as error:
            if not self.signal:
                raise
            raise Interrupted(f"{name_of(self.signal)}: {error}", self.signal) from error

    def _look(self) -> None:
        if self._over and self._breakable:
            self._breakable, self._broken = False, True
            raise self._too_late()

    def _too_late(self) -> Interrupted:
        return Interrupted(f"{name_of(self.signal)}: broken off {GRACE_S:g} s after it", self.signal)

    @contextmanager
    def _counting_down(self) -> Iterator[None]:
        """Within it a thread wakes the main one when the grace time is over, whatever that waits for."""

        def count_down() -> None:
            if not self._news.get():
                return
            try:
                self._news.get(timeout=GRACE_S)
            except queue.Empty:
                self._over = self._waking = True
                signal.pthread_kill(main, self.signal)

        main = threading.get_ident()
        thread = threading.Thread(target=count_down, name="grace", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._news.put(0)
            thread.join()


def name_of(number: int) -> str:
    """As a person knows it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def number_of(error: KeyboardInterrupt) -> int:
    """Of the signal that raised it. Some libraries, Ray's among them, raise a KeyboardInterrupt in place of a Stop."""
    return error.number if isinstance(error, Stop) else _last


@contextmanager
def heed_signals() -> Iterator[None]:
    """Within it every signal of STOPS raises Stop at once, where nothing inside handles it better."""

    global _last, _late
    _last, _late = signal.SIGINT, 0

    def handle(number: int, frame: FrameType | None) -> None:
        raise Stop(number)

    with _handlers(handle):
        yield


@contextmanager
def interruptible(say: Callable[[str], None]) -> Iterator[Interruption]:
    """Within it the first signal asks for a stop after the step, and the second stops at once.

    After any but Ctrl-C, what is `breakable` is broken off when the grace time is over.
    """
    global _late
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield interruption
        return
    last = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if interruption._waking:
            interruption._waking = False
            interruption._look()
            return
        before, last = last, time.monotonic()
        if interruption.pressed:
            if last - before > ECHO_S:
                raise Stop(number)
            return
        interruption.signal = number
        told = f"{name_of(number)}. Stopping after this step"
        if number != signal.SIGINT:
            interruption._news.put(number)
            told += f", or by breaking off its rollouts in {GRACE_S:g} s"
        with suppress(RuntimeError):  # it came while the same stream was written to
            say(f"{told}; once more to stop at once, without saving")

    with _handlers(handle), interruption._counting_down():
        yield interruption
    _late = interruption.signal


def raise_late() -> None:
    """Raise Stop for a signal that came in the last step of work that is done by now, where more work would follow."""
    global _late
    number, _late = _late, 0
    if number:
        raise Stop(number)


@contextmanager
def uninterrupted() -> Iterator[ExitStack]:
    """An ExitStack whose end no signal cuts short: one that comes meanwhile is raised after it, as Stop."""
    came: list[int] = []
    closing = ExitStack()

    def close() -> None:
        with _handlers(lambda number, frame: came.append(number)):
            closing.close()

    try:
        yield closing
    except BaseException as error:
        close()
        if came and not isinstance(error, (Interrupted, KeyboardInterrupt)):
            raise Stop(came[-1]) from error
        raise
    close()
    if came:
        raise Stop(came[-1])


@contextmanager
def stopping(told: Callable[[], str]) -> Iterator[None]:
    """Within it a signal that stops at once becomes an Interrupted with a sentence.

    Args:
        told: says what became of the work; asked when all is closed.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        before = f"{error.__cause__}. " if isinstance(error.__cause__, UserError) else ""
        number = number_of(error)
        raise Interrupted(f"{before}{name_of(number)}: {told()}", number) from error


@contextmanager
def _handlers(handle: Handler) -> Iterator[None]:
    """This handler for all of STOPS, and afterwards those of before. A SIGHUP that is ignored stays so: nohup."""
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for stop in STOPS:
                if stop != signal.SIGHUP or signal.getsignal(stop) != signal.SIG_IGN:
                    before[stop] = signal.signal(stop, handle)
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: a library's own, in C, which Python cannot put back
                signal.signal(number, handler)
