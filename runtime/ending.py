"""How a program of ours ends: with its own exit code, though a thread of it may be stuck.

A thread that still runs while the interpreter ends is ended where it next asks for the interpreter's lock; inside a
C++ library that aborts the process (exit code 134).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from typing import NoReturn

from runtime.interrupt import STOPS

_left: list[threading.Thread] = []


def leave_behind(thread: threading.Thread) -> None:
    """Note a daemon thread that could not be waited for: someone else's function, which nobody can end."""
    _left.append(thread)


def leave(code: int) -> NoReturn:
    """End the program. Where a thread was left behind and still runs, without the interpreter's own farewell.

    Nothing is left to be stopped, so a signal that comes now changes the exit code no more.
    """
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    if not any(thread.is_alive() for thread in _left):
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
