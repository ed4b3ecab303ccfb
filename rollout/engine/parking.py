"""Rows whose trajectory waits for a tool: they are parked, and take no tick while others decode.

When an answer is read would depend on how fast the tool was. Under `rollout.reproducible` it is read a fixed number of
ticks after its call, however long the tool took, so that the policy computes the same batches in every run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from formats.base import Format
from rollout.engine.active import ActiveSequence, ParkedCall
from rollout.engine.state import EngineState
from rollout.requests import RolloutError
from rollout.tools.answers import Answer
from rollout.tools.base import ToolCall, ToolError
from rollout.tools.parse import parse_call
from rollout.tools.runner import ToolRunner

POLL_S = 1.0  # how often it is looked whether the tools' loop lives


class Parking:
    """The calls that are out, of one call of the engine."""

    def __init__(self, engine: EngineState) -> None:
        self.fmt: Format = engine.fmt
        self.stats = engine.stats
        self.reproducible = engine.config.reproducible
        self.runner: ToolRunner | None = engine.runner
        self.tick = 0

    def park(self, sequence: ActiveSequence) -> None:
        """Begin the call that the trajectory's last segment is. Its images are drawn by now.

        Raises RolloutError where nobody answers the role.
        """
        trajectory = sequence.trajectory
        called = trajectory.segments[-1]
        runner = self.runner
        names = runner.tools.for_role(called.role) if runner is not None else []
        if runner is None or not names:
            raise RolloutError(f"format '{self.fmt.name}': '{called.role}' calls a tool, and none answers it")
        if sequence.sessions is None:
            sequence.sessions = runner.open()
        future: Future[Answer]
        ticks = 1
        try:
            call: ToolCall = parse_call(called, self.fmt, names)
            ticks = runner.tools.configs[call.tool].answer_ticks
            if sequence.rehearsal and not runner.tools.by_name[call.tool].repeatable:
                raise ToolError(f"{call.tool} is not called in a rehearsal")
            future = runner.call(sequence.sessions, call, trajectory)
        except ToolError as error:
            future = Future()
            future.set_result(Answer("", error=str(error)))
        sequence.parked = ParkedCall(future, called.role, self.tick + ticks, time.perf_counter())

    def answered(self, sequences: Sequence[ActiveSequence]) -> list[int]:
        """The rows whose answer is read now. Waits where no row could do anything else, or an answer is due."""
        self.tick += 1
        parked = {i: sequence.parked for i, sequence in enumerate(sequences) if sequence.parked is not None}
        if not parked:
            return []
        idle = len(parked) == len(sequences)
        began = time.perf_counter()
        if self.reproducible:
            if idle:
                self.tick = max(self.tick, min(call.due for call in parked.values()))
            now = [i for i, call in parked.items() if call.due <= self.tick]
            for i in now:
                self._wait([parked[i].future])
        else:
            if idle:
                self._wait([call.future for call in parked.values()])
            now = [i for i, call in parked.items() if call.future.done()]
        self.stats.tools_waited_seconds += time.perf_counter() - began
        return now

    def take(self, sequence: ActiveSequence) -> tuple[str, Answer]:
        """The role that called, and the answer, of a row in `answered`. It is parked no longer."""
        call = sequence.parked
        assert call is not None
        answer, sequence.parked = call.future.result(), None
        self.stats.count_call(answer.tool, answer.error is not None, time.perf_counter() - call.since)
        return call.role, answer

    def release(self, sequence: ActiveSequence) -> None:
        """The trajectory is finished: its sessions are closed, which nobody waits for yet."""
        if sequence.sessions is not None and self.runner is not None:
            self.runner.release(sequence.sessions)
            sequence.sessions = None

    def close(self) -> None:
        """Close the sessions of all that is left, and wait for it."""
        if self.runner is not None:
            self.runner.settle()

    def _wait(self, futures: Sequence[Future[Answer]]) -> None:
        assert self.runner is not None
        while not wait(futures, timeout=POLL_S, return_when=FIRST_COMPLETED).done:
            self.runner.check_alive()
