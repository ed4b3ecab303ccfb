"""A reward in a process of its own, so that one that hangs or crashes costs a timeout and never the run.

The driver's side is `IsolatedReward`; `serve` is the child's. They speak pickles over two pipes. On a timeout the
child's stack is dumped (it says where it hung), the child and its children are killed, and the next call starts a
fresh one. The child leaves when the driver does.
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
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from rewards.base import Logs, RewardError, TrainerState, Value, View, call, check_options, lightened
from rewards.loader import load_reward
from rollout.errors import UserError
from rollout.trajectory import Trajectory

logger = logging.getLogger(__name__)

# The child's first line: only a search path and three descriptors cross by the command line.
_BOOT = ("import sys, json; sys.path[:] = json.loads(sys.argv[1])\n"
         "from rewards.isolate import serve; serve(sys.argv[2:])")


class CallFailed(Exception):
    """One call that gave no values: the function raised, hung, or took its process with it."""

    def __init__(self, kind: str, message: str, stack: str = "") -> None:
        super().__init__(message)
        self.kind, self.message, self.stack = kind, message, stack


@dataclass
class IsolatedReward:
    """Not started until `start` or the first call; usable again after any failure. One call at a time."""

    name: str
    spec: str
    options: Mapping[str, Any]
    factory: bool = False
    view: View = "auto"
    timeout_s: float = 60.0
    load_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()  # held while the process is in use
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._to: Connection | None = None
        self._from: Connection | None = None
        self._dump: Any = None
        self._timed_out = False

    def start(self) -> None:
        """Start the process and load the function in it.

        Raises:
            RewardError: the function cannot be loaded.
            CallFailed: loading hung or crashed.
        """
        with self._lock:
            self._ensure()

    def __call__(self, trajectories: Sequence[Trajectory], state: TrainerState) -> tuple[list[Value], Logs]:
        """As rewards.base.call. Raises CallFailed, or RewardError where the function breaks the contract."""
        options = {} if self.factory else dict(self.options)
        with self._lock:
            self._ensure()
            return self._exchange(("call", self.name, [lightened(t) for t in trajectories], options, state, self.view),
                                  self.timeout_s, "a call")

    def close(self) -> None:
        """End the process and whatever it started, for good. A call in another thread fails at once. Idempotent."""
        self._closed = True
        process = self._process
        if process is not None:
            _kill_session(process)
        with self._lock:
            self._drop()

    def _ensure(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._drop()
        if self._closed:
            raise CallFailed("crash", "the judge was closed")
        self._timed_out = False
        inbound, to = os.pipe()
        from_, outbound = os.pipe()
        self._dump = tempfile.TemporaryFile()
        descriptors = (inbound, outbound, self._dump.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(sys.path), *map(str, descriptors), str(os.getpid())],
            pass_fds=descriptors, stdin=subprocess.DEVNULL, start_new_session=True)
        os.close(inbound)
        os.close(outbound)
        self._to, self._from = Connection(to, readable=False), Connection(from_, writable=False)
        if self._closed:  # meanwhile
            self._drop()
            raise CallFailed("crash", "the judge was closed")
        self._exchange(("load", self.name, self.spec, dict(self.options), self.factory), self.load_timeout_s,
                       "loading it")

    def _drop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _kill_session(process)
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
            _kill_session(process)  # sending and receiving below end with it

        watchdog = threading.Timer(timeout_s, time_out)
        watchdog.daemon = True
        watchdog.start()
        try:
            to.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))
            while not from_.poll(0.5):
                if process.poll() is not None and not from_.poll():  # something it started may still hold the pipe
                    raise EOFError
            kind, answer = pickle.loads(from_.recv_bytes())
        except (EOFError, OSError):
            watchdog.cancel()
            watchdog.join()  # it may be at work: what it does comes before what follows
            hung, code = self._timed_out, process.wait()
            self._drop()
            if hung:
                raise CallFailed("timeout", f"{what} took longer than {timeout_s:g} s and was stopped",
                                 "".join(stack)) from None
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise CallFailed("crash", f"its process ended with {how} during {what}") from None
        finally:
            watchdog.cancel()
            watchdog.join()
        if kind == "refused":
            raise RewardError(answer)
        if kind == "raised":
            raise CallFailed("raised", *answer)
        return answer


def _stack_of(process: subprocess.Popen[bytes], dump: Any) -> str:
    """Where every thread of the child stands: faulthandler writes it on SIGUSR1, even if the child holds its lock."""
    try:
        process.send_signal(signal.SIGUSR1)
        text = b""
        for _ in range(40):
            time.sleep(0.05)
            now = os.pread(dump.fileno(), 100_000, 0)
            if now and now == text:
                break
            text = now
        return text.decode(errors="replace")
    except (OSError, ValueError, AttributeError):  # it ended in the meantime
        return ""


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


# ---- the child --------------------------------------------------------------------------------------------------

def serve(arguments: Sequence[str]) -> None:
    """Answer requests until the driver is gone. Runs in the child's main thread, where signal.alarm works."""
    inbound, outbound, dump, parent = map(int, arguments)
    faulthandler.register(signal.SIGUSR1, file=dump, all_threads=True)
    os.dup2(2, 1)  # what a reward prints belongs on stderr
    answers = Connection(outbound, readable=False)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(Connection(inbound, writable=False), requests, parent), daemon=True).start()
    function: Any = None
    while True:
        verb, *content = pickle.loads(requests.get())
        try:
            if verb == "load":
                name, spec, options, factory = content
                function = load_reward(spec, options, factory)
                check_options(function, name, {} if factory else options)
                answer: tuple[str, Any] = ("ready", None)
            else:
                name, trajectories, options, state, view = content
                answer = ("values", call(function, name, trajectories, options=options, state=state, view=view))
            packed = pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL)
        except UserError as error:
            packed = pickle.dumps(("refused", str(error)))
        except (Exception, SystemExit) as error:
            packed = pickle.dumps(("raised", describe(error)))
        answers.send_bytes(packed)


def _read(connection: Connection, requests: queue.SimpleQueue[bytes], parent: int) -> None:
    """Take requests off the pipe at once, so that the driver never blocks on a busy child; leave with the driver."""
    while True:
        try:
            while not connection.poll(5):
                if os.getppid() != parent:
                    os._exit(0)
            requests.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)


def describe(error: BaseException) -> tuple[str, str]:
    """(one line with the place it was raised at, the whole traceback)."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    hint = ""
    if isinstance(error, TypeError) and "got 'list'" in str(error):
        hint = ". If it reads text alone, set completions: text for this part"
    return f"{type(error).__name__}: {error}{where}{hint}", "".join(traceback.format_exception(error))
