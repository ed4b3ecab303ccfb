"""The process behind a worker: where it stands when it is stuck, and its end.

A stuck interpreter answers nobody, so its stack is written by a handler in C on SIGUSR1, and it is ended by SIGKILL,
with all that it started. Imports Ray only when it is there.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.processes import MARK, end_tree, family, lives, new_mark
from runtime.ray_cluster import ClusterError, check_alive

LOOKS, LOOK_S = 40, 0.05  # how long a stack is waited for
REMOTE_END_S = 10.0  # how long another node may take to end a process
LEAVE_S, LEAVE_LOOK_S = 1.0, 0.01  # how long Ray may take to end processes of this node, and between looks at them


class TraceableActor:
    """A Ray actor that writes its stack down when it is signalled. Call `__init__` in the actor's process."""

    def __init__(self) -> None:
        # A file without a name is read through the process that holds it, and is gone with it, however it ends.
        self._stack = os.memfd_create("stack")
        faulthandler.register(signal.SIGUSR1, self._stack, all_threads=True)
        _leave_signals_to_driver()
        inherited = os.environ.get(MARK)  # a local Ray's, which ends what bears it or a mark below it
        os.environ[MARK] = self._mark = f"{inherited}.{os.getpid()}" if inherited else new_mark()

    def about(self) -> tuple[str, int, int, str]:
        """(node, pid, descriptor of the stack, mark): what ActorProcess is made of."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid(), self._stack, self._mark


def _leave_signals_to_driver() -> None:
    """What a batch system sends to all processes of a job is the driver's to obey. start_ray blocks it in all that it
    starts, but what this process starts hears it as any program does."""
    deaf = {signal.SIGTERM, signal.SIGHUP}

    def block() -> None:  # one that comes before a fork has its own handlers waits for them
        signal.pthread_sigmask(signal.SIG_BLOCK, deaf)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, deaf)

    def hear() -> None:
        for number in deaf:
            signal.signal(number, signal.SIG_DFL)
        unblock()

    for number in deaf:
        signal.signal(number, lambda *_: None)  # unlike SIG_IGN, a program that is executed does not inherit it
    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=hear)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, *deaf})


@dataclass(frozen=True)
class ActorProcess:
    """The process of a TraceableActor, as others see it."""

    node: str
    pid: int
    stack_descriptor: int  # of the file, in that process, that SIGUSR1 writes the stack to
    mark: str  # in the environment of what it starts

    def is_local(self) -> bool:
        import ray

        return self.node == ray.get_runtime_context().get_node_id()

    def stack(self) -> str:
        """Where every thread of it stands, or how to find out; "" if it has ended."""
        if not self.is_local():
            return f"it is on another node: `py-spy dump --pid {self.pid}` there says where it stands"
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGUSR1)
            return read_until_stable(Path(f"/proc/{self.pid}/fd/{self.stack_descriptor}").read_bytes)
        return ""

    def end(self) -> None:
        """End it with all that it started. `ray.kill` alone asks the process, which may be past answering, and leaves
        its children.

        A process on another node is ended by a task there; one that does not come to its turn is given up.
        """
        if self.is_local():
            end_tree(self.pid, self.mark)
            return
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(self.node, soft=False)
        task: Any = ray.remote(num_cpus=0, max_retries=0)(end_tree).options(scheduling_strategy=there)
        ray.wait([task.remote(self.pid, self.mark)], timeout=REMOTE_END_S)


def end_actor(actor: Any, process: ActorProcess | None) -> None:
    """End a Ray actor, whatever it is doing. process: None while it has not said which it is."""
    end_actors([(actor, process)])


def end_actors(actors: Iterable[tuple[Any, ActorProcess | None]]) -> None:
    """End Ray actors with all that they started, whatever they are doing.

    On this node Ray is asked to end them first: a process that is gone without its doing it takes for a crash, and says
    so on the terminal. What outlasts LEAVE_S is killed.

    Args:
        actors: each with its process; None while it has not said which it is. An actor that is None is none.
    """
    import ray

    if not ray.is_initialized():
        return
    ending = [(actor, process) for actor, process in actors if actor is not None]
    try:
        check_alive()
    except ClusterError:  # it ends nothing more, and would end a program that waits for it
        for actor, process in ending:
            if process is not None:
                process.end()
            ray.kill(actor)
        return
    # Before they end: what they started is found by its parent where it has lost the mark.
    here = [(process, *family(process.pid)) for _, process in ending if process is not None and process.is_local()]
    for actor, process in ending:
        if process is not None and not process.is_local():
            process.end()
        ray.kill(actor)
    until = time.monotonic() + LEAVE_S
    while any(lives(root) for _, root, _ in here if root is not None) and time.monotonic() < until:
        time.sleep(LEAVE_LOOK_S)
    for process, root, below in here:
        end_tree(process.pid if root is not None and lives(root) else None, process.mark, below)


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
