"""Who calls a part: the driver's own thread, or threads that each have a worker of the part.

An `Executor` is a queue with such threads: the driver never waits on a call, it submits jobs and reads their futures
(pending.py). A `Component` knows its plan (which trajectories make one call) and its patience (retries, then None).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from record.trajectory import Trajectory
from rewards.config import ComponentConfig, Scope, WorkersConfig
from rewards.contract import Logs, TrainerState, Value, is_broken, lightened
from rewards.runtime.isolate import ProcessWorker
from rewards.runtime.ray_worker import RayWorker
from rewards.runtime.serving import RAISED, CallFailed, Spec, describe
from runtime.ending import leave_behind
from runtime.errors import UserError
from runtime.section import LONGEST_WAIT_S

JOIN_S = 10.0  # how long a thread may be in its last job
GIVE_UP_AFTER = 3  # calls of a part in a row that ran out of time, every attempt of them: no more in this step

logger = logging.getLogger(__name__)


class Worker(Protocol):
    """isolate.ProcessWorker or ray_worker.RayWorker."""

    def start(self) -> None: ...
    def __call__(self, *arguments: Any) -> Any: ...
    def close(self) -> None: ...


def workers_of(spec: Spec, config: WorkersConfig, timeout_s: float | None, load_timeout_s: float) -> list[Worker]:
    """As many as the recipe says; none is started yet."""
    if config.kind == "process":
        return [ProcessWorker(spec, timeout_s, load_timeout_s) for _ in range(config.count)]
    return [RayWorker(spec, timeout_s, load_timeout_s, config.num_cpus, config.num_gpus) for _ in range(config.count)]


class Executor:
    """Runs jobs in the order in which they come, one thread a worker. Close it: its threads must not outlive the
    program, whose arrays they could free while the interpreter ends, which aborts."""

    def __init__(self, name: str, workers: Sequence[Any] = (None,)) -> None:
        """Each job is called with the worker of the thread that runs it."""
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[Any], Any]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, args=(worker,), name=f"reward-{name}-{index}", daemon=True)
            for index, worker in enumerate(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[Any], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.put((future, job))
        return future

    def stop(self) -> None:
        """Cancel what has not begun, and tell the threads to end."""
        while True:
            try:
                waiting = self._jobs.get_nowait()
            except queue.Empty:
                break
            if waiting is not None:
                waiting[0].cancel()
        for _ in self._threads:
            self._jobs.put(None)

    def close(self) -> None:
        """Stop, and wait for the threads. One that is still in a job after JOIN_S is given up: it ends with the
        program (runtime.ending). Idempotent."""
        self.stop()
        until = time.monotonic() + JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                logger.warning("%s did not end within %g s, and ends with the program", thread.name, JOIN_S)
                leave_behind(thread)
        self._threads = []

    def _run(self, worker: Any) -> None:
        # Nothing of a job may stay in this frame while it waits for the next one.
        while self._run_next(worker):
            pass

    def _run_next(self, worker: Any) -> bool:
        waiting = self._jobs.get()
        if waiting is None:
            return False
        future, job = waiting
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(job(worker))
            except BaseException as error:  # whoever reads the future raises it
                future.set_exception(error)
        return True


# ---- which trajectories make one call ----------------------------------------------------------------------------


@dataclass(frozen=True)
class RowSlice:
    """Rows of one group."""

    group: int  # its place among the step's groups
    start: int = 0
    stop: int | None = None  # None: to the end


def plan(scope: Scope, sizes: Sequence[int], batch_size: int | None) -> list[tuple[RowSlice, ...]]:
    """The calls of a part over a step's groups, given how many members each has.

    A part that sees the batch has one call. Any other has one a group, or, with a batch size, as many whole groups as
    fit into it; where a value depends on its own row alone, a group that is larger is taken apart. It depends on the
    sizes alone, so that the order in which groups finish changes no call.
    """
    if scope == "batch":
        return [tuple(RowSlice(group) for group in range(len(sizes)))] if sizes else []
    calls: list[tuple[RowSlice, ...]] = []
    packed: list[RowSlice] = []
    rows = 0
    for group, size in enumerate(sizes):
        if packed and (batch_size is None or rows + size > batch_size):
            calls.append(tuple(packed))
            packed, rows = [], 0
        if scope == "row" and batch_size is not None and size > batch_size:
            starts = range(0, size, batch_size)
            calls += [(RowSlice(group, at, at + batch_size if at + batch_size < size else None),) for at in starts]
            continue
        packed.append(RowSlice(group))
        rows += size
    return [*calls, tuple(packed)] if packed else calls


# ---- one call ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallFailure:
    """One failed call of a part, for the log and the report."""

    part: str
    kind: str  # "raised", "timeout", "crash", "nan" or "given up"
    message: str
    attempt: int  # from 1; 0: it was not called
    rows: int  # left unjudged by it; 0 if a later attempt succeeded
    stack: str = ""  # where it hung or what it raised


@dataclass
class Outcome:
    """What one call of a part came to, retries included."""

    values: list[Value]
    logs: Logs
    failures: list[CallFailure] = field(default_factory=list)
    failed_rows: int = 0  # None by the part's fault, unlike None by its choice
    began: float = 0.0  # time.monotonic
    ended: float = 0.0


class Loaded(Protocol):
    """serving.LoadedComponent, or what stands in for one."""

    @property
    def judge(self) -> Any: ...
    def __call__(self, trajectories: Sequence[Trajectory], state: TrainerState) -> tuple[list[Value], Logs]: ...


class Component:
    """One part of the recipe, with its lane."""

    def __init__(
        self,
        name: str,
        config: ComponentConfig,
        executor: Executor,
        loaded: Loaded | None,
        workers: Sequence[Worker] = (),
    ) -> None:
        """`loaded`: its function, of a part that stands in the driver; any other has workers."""
        self.name, self.config, self.executor, self.workers = name, config, executor, list(workers)
        self._loaded = loaded
        self._out_of_time = 0  # calls in a row, in this step
        self._ending = threading.Event()

    def plan(self, sizes: Sequence[int]) -> list[tuple[RowSlice, ...]]:
        return plan(self.config.sees, sizes, self.config.workers.batch_size if self.config.workers else None)

    def begin(self) -> None:
        """A new step: what was given up is tried again."""
        self._out_of_time = 0

    def submit(self, trajectories: Sequence[Trajectory], state: TrainerState) -> Future[Outcome]:
        return self.executor.submit(lambda worker: self._attempts(worker, trajectories, state))

    def stop(self) -> None:
        """End its workers, and with them the calls that they are in."""
        self._ending.set()
        self.executor.stop()
        for worker in self.workers:
            worker.close()
        judge: Any = self._loaded.judge if self._loaded is not None else None
        if hasattr(judge, "close"):  # its own; the toolkit's parts share the manager's
            judge.close()

    def close(self) -> None:
        """Stop, and wait for what it still does; its thread may be the driver's, which it shares."""
        self.stop()
        self.executor.close()
        self.stop()  # a call that was cut short may have asked its judge once more

    def _attempts(self, worker: Worker | None, trajectories: Sequence[Trajectory], state: TrainerState) -> Outcome:
        """Call until it answers whole, at most 1 + retries times."""
        began, rows = time.monotonic(), len(trajectories)
        if self._out_of_time >= GIVE_UP_AFTER:
            fault = CallFailure(
                self.name,
                "given up",
                f"not called again in this step, after {GIVE_UP_AFTER} calls in a row ran out of time",
                0,
                rows,
            )
            return Outcome([None] * rows, Logs(), [fault], rows, began, began)
        values, logs, failures, broken = self._tries(worker, trajectories, state)
        self._out_of_time = self._out_of_time + 1 if broken and failures[-1].kind == "timeout" else 0
        if broken:
            last = failures[-1]
            failures[-1] = CallFailure(last.part, last.kind, last.message, last.attempt, broken, last.stack)
        values = [None if is_broken(value) else value for value in values]
        return Outcome(values, logs, failures, broken, began, time.monotonic())

    def _tries(
        self, worker: Worker | None, trajectories: Sequence[Trajectory], state: TrainerState
    ) -> tuple[list[Value], Logs, list[CallFailure], int]:
        """(values, logs, the fault of each failed attempt, rows without a value after the last)."""
        failures: list[CallFailure] = []
        values: list[Value] = [None] * len(trajectories)
        logs, broken = Logs(), len(trajectories)
        for attempt in range(1, self.config.retries + 2):
            wait_s = min(self.config.retry_wait_s * 2 ** (attempt - 2), LONGEST_WAIT_S)
            if attempt > 1 and self._ending.wait(wait_s):
                break
            try:
                values, logs = self._call(worker, trajectories, state)
                broken = sum(is_broken(value) for value in values)
                if not broken:
                    break
                failures.append(
                    CallFailure(
                        self.name, "nan", f"NaN or infinity for {broken} of {len(values)} trajectories", attempt, 0
                    )
                )
            except CallFailed as failure:
                values, logs, broken = [None] * len(trajectories), Logs(), len(trajectories)
                failures.append(CallFailure(self.name, failure.kind, failure.message, attempt, 0, failure.stack))
        return values, logs, failures, broken

    def _call(
        self, worker: Worker | None, trajectories: Sequence[Trajectory], state: TrainerState
    ) -> tuple[list[Value], Logs]:
        if worker is not None:
            return worker([lightened(t) for t in trajectories], state)
        assert self._loaded is not None
        try:
            return self._loaded(trajectories, state)
        except (UserError, CallFailed):
            raise
        except RAISED as error:
            raise CallFailed("raised", *describe(error)) from error
