"""The process behind a worker: where it stands when it is stuck, and its end.

A stuck interpreter answers nobody, so its stack is written by a handler in C on SIGUSR1, and it is ended by SIGKILL.
Imports none of our packages; Ray only when it is there.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOOKS, LOOK_S = 40, 0.05  # how long a stack is waited for


class TraceableActor:
    """A Ray actor that writes its stack down when it is signalled. Call `__init__` in the actor's process."""

    def __init__(self) -> None:
        handle, self._stack_file = tempfile.mkstemp(prefix="ud-stack-")
        faulthandler.register(signal.SIGUSR1, handle, all_threads=True)

    def about(self) -> tuple[str, int, str]:
        """(node, pid, file that SIGUSR1 writes the stack to): what ActorProcess is made of."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid(), self._stack_file


@dataclass(frozen=True)
class ActorProcess:
    """The process of a TraceableActor, as others see it."""

    node: str
    pid: int
    stack_file: str

    def is_local(self) -> bool:
        import ray

        return self.node == ray.get_runtime_context().get_node_id()

    def stack(self) -> str:
        """Where every thread of it stands, or how to find out; "" if it has ended."""
        if not self.is_local():
            return f"it is on another node: `py-spy dump --pid {self.pid}` there says where it stands"
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGUSR1)
            return read_until_stable(Path(self.stack_file).read_bytes)
        return ""

    def kill(self) -> None:
        """End it if it is on this node. `ray.kill` alone asks the process, which may be past answering."""
        if self.is_local():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            Path(self.stack_file).unlink(missing_ok=True)


def end_actor(actor: Any, process: ActorProcess | None) -> None:
    """End a Ray actor, whatever it is doing. process: None while it has not said which it is."""
    import ray

    if actor is not None and ray.is_initialized():
        if process is not None:
            process.kill()
        ray.kill(actor)


def read_until_stable(read: Callable[[], bytes]) -> str:
    """What a signalled process is writing, once it no longer grows."""
    text = b""
    for _ in range(LOOKS):
        time.sleep(LOOK_S)
        now = read()
        if now and now == text:
            break
        text = now
    return text.decode(errors="replace").strip()
