"""What scores in a process of its own, so that one that hangs or crashes costs a timeout and never the run.

The driver's side is `ProcessWorker`; `serve` is the child's. They speak pickles over two pipes, and a third carries
what the child prints. On a timeout the child's stack is dumped (it says where it hung), the child and all that it
started are killed, and the next call starts a fresh one. The child leaves when the driver does. ray_worker.py does the
same with a Ray actor.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from rewards.runtime.serving import CallFailed, Server, Worker, read
from runtime.actor_process import read_until_stable
from runtime.output import OutputRelay
from runtime.processes import MARK, end_tree, new_mark

logger = logging.getLogger(__name__)

# The child's first line: only a search path and three descriptors cross by the command line.
_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1])\n"
    "from rewards.runtime.isolate import serve; serve(sys.argv[2:])"
)


@dataclass
class ProcessWorker(Worker):
    """A spec loaded in a process of its own, which leads a session: whatever it starts ends with it, and what it prints
    is passed on up to a limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._process: subprocess.Popen[bytes] | None = None
        self._to: Connection | None = None
        self._from: Connection | None = None
        self._dump: Any = None
        self._mark = ""
        self._timed_out = False
        self._output = OutputRelay(f"reward '{self.spec.name}'")

    def close(self) -> None:
        super().close()
        self._output.report()

    def _interrupt(self) -> None:
        process = self._process
        if process is not None:
            self._kill(process)

    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _launch(self) -> None:
        self._timed_out = False
        inbound, to = os.pipe()
        from_, outbound = os.pipe()
        printed, prints = os.pipe()
        self._dump, self._mark = tempfile.TemporaryFile(), new_mark()
        descriptors = (inbound, outbound, self._dump.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(sys.path), *map(str, descriptors), str(os.getpid())],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=prints,
            stderr=prints,
            env={**os.environ, MARK: self._mark},
            start_new_session=True,
        )
        for descriptor in (inbound, outbound, prints):
            os.close(descriptor)
        process = self._process
        self._output.follow(printed, lambda: process.poll() is None)
        self._to, self._from = Connection(to, readable=False), Connection(from_, writable=False)

    def _drop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            self._kill(process)
            self._output.finish()
        for connection in (self._to, self._from):
            if connection is not None:
                connection.close()
        if self._dump is not None:
            self._dump.close()
        self._to = self._from = self._dump = None

    def _exchange(self, message: tuple[Any, ...], timeout_s: float, what: str) -> Any:
        process, to, from_ = self._process, self._to, self._from
        assert process is not None and to is not None and from_ is not None
        stack: list[str] = []

        def time_out() -> None:
            self._timed_out = True
            stack.append(_stack_of(process, self._dump))
            self._kill(process)  # sending and receiving below end with it

        watchdog = threading.Timer(timeout_s, time_out)
        watchdog.daemon = True
        watchdog.start()
        try:
            to.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))
            while not from_.poll(0.5):
                if process.poll() is not None and not from_.poll():  # something it started may still hold the pipe
                    raise EOFError
            answer = pickle.loads(from_.recv_bytes())
        except (EOFError, OSError):
            watchdog.cancel()
            watchdog.join()  # it may be at work: what it does comes before what follows
            hung, code = self._timed_out, process.wait()
            self._drop()
            if hung:
                raise CallFailed(
                    "timeout", f"{what} took longer than {timeout_s:g} s and was stopped", "".join(stack)
                ) from None
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise CallFailed("crash", f"its process ended with {how} during {what}") from None
        finally:
            watchdog.cancel()
            watchdog.join()
        return read(answer)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """End it with all that it started, and when it ended by itself what it left behind."""
        end_tree(process.pid if process.poll() is None else None, self._mark)
        process.wait()


def _stack_of(process: subprocess.Popen[bytes], dump: Any) -> str:
    """Where every thread of the child stands: faulthandler writes it on SIGUSR1, even if the child holds its lock."""
    try:
        process.send_signal(signal.SIGUSR1)
        return read_until_stable(lambda: os.pread(dump.fileno(), 100_000, 0))
    except (OSError, ValueError, AttributeError):  # it ended in the meantime
        return ""


# ---- the child --------------------------------------------------------------------------------------------------


def serve(arguments: Sequence[str]) -> None:
    """Answer requests until the driver is gone. Runs in the child's main thread, where signal.alarm works."""
    inbound, outbound, dump, parent = map(int, arguments)
    faulthandler.register(signal.SIGUSR1, file=dump, all_threads=True)
    os.dup2(2, 1)  # what a reward prints belongs on stderr
    answers = Connection(outbound, readable=False)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(Connection(inbound, writable=False), requests, parent), daemon=True).start()
    server = Server()
    while True:
        answers.send_bytes(_packed(server, pickle.loads(requests.get())))


def _packed(server: Server, message: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps(server.answer(message), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # what it returned does not pickle
        return pickle.dumps(("raised", (f"{type(error).__name__}: {error}", "")))


def _read(connection: Connection, requests: queue.SimpleQueue[bytes], parent: int) -> None:
    """Take requests off the pipe at once, so that the driver never blocks on a busy child; leave with the driver."""
    while True:
        try:
            while not connection.poll(5):
                if os.getppid() != parent:
                    raise EOFError
            requests.put(connection.recv_bytes())
        except (EOFError, OSError):
            end_tree(None, os.environ.get(MARK))  # all but this process
            os._exit(0)
