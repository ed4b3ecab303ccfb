"""Tools at work: one asyncio loop in a thread of an engine, in which sessions are opened, called and closed.

The engine's thread asks (`call`, `release`) and never waits in here but where it says so. All that sessions hold is
touched by the loop alone.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from record.trajectory import Trajectory
from rollout.requests import RolloutError
from rollout.tools.answers import Answer, hold_to_limits
from rollout.tools.base import ToolCall, ToolError, ToolSession
from rollout.tools.registry import Tools
from runtime.errors import first_line

logger = logging.getLogger(__name__)
CLOSE_S = 10.0  # for a session to close
BLOCKED_S = 10.0  # a loop that does nothing for so long is held up by a tool
BEAT_S = 0.2  # how often the loop says that it is alive


@dataclass(eq=False)
class Sessions:
    """What one trajectory has opened."""

    opened: dict[str, ToolSession] = field(default_factory=dict)  # by tool
    opening: dict[str, asyncio.Task[ToolSession]] = field(default_factory=dict)
    at_work: set[str] = field(default_factory=set)  # tools whose call has not returned, be it too late
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    closed: bool = False


class ToolRunner:
    """Runs the calls of an engine's trajectories."""

    def __init__(self, tools: Tools) -> None:
        self.tools = tools
        self._loop = asyncio.new_event_loop()
        self._beat = [time.monotonic()]
        self._limits = {name: asyncio.Semaphore(config.concurrency) for name, config in tools.configs.items()}
        self._live: set[Sessions] = set()
        self._pending: set[Future[Any]] = set()
        self._late: set[asyncio.Task[Any]] = set()  # closing what came too late
        self._thread = threading.Thread(target=_serve, args=(self._loop, self._beat), name="tools", daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, _stop, self._loop)

    # ---- the engine's side ----

    def open(self) -> Sessions:
        """For a trajectory that makes its first call; to be released."""
        sessions = Sessions()
        self._live.add(sessions)
        return sessions

    def call(self, sessions: Sessions, call: ToolCall, trajectory: Trajectory) -> Future[Answer]:
        """Begin a call. The answer comes by itself; it is an error after the tool's timeout."""
        seen = replace(trajectory, segments=list(trajectory.segments))  # the engine's own list goes on growing
        return self._begin(self._answer(sessions, call, seen))

    def release(self, sessions: Sessions) -> None:
        """Begin to close a trajectory's sessions. Once: what is released already is left alone."""
        if sessions in self._live:
            self._live.discard(sessions)
            self._begin(self._close(sessions))

    def settle(self) -> None:
        """Release all sessions and wait until they are closed, as long as closing may take."""
        for sessions in list(self._live):
            self.release(sessions)
        _, late = wait_for_futures(set(self._pending), timeout=CLOSE_S + 2)
        if late:
            logger.warning("%d sessions of tools were not closed within %g s", len(late), CLOSE_S)

    def close(self) -> None:
        """Settle, and end the loop."""
        self.settle()
        self._end()
        self._thread.join(timeout=CLOSE_S)

    def check_alive(self) -> None:
        """Raises RolloutError where a tool blocks the loop, so that no timeout can come."""
        silent = time.monotonic() - self._beat[0]
        if silent > BLOCKED_S:
            working = sorted({name for sessions in self._live for name in sessions.at_work})
            raise RolloutError(
                f"tools: one of {', '.join(working) or 'the tools'} has blocked all others for {silent:.0f} s: an "
                "`async def` must await whatever takes long; write blocking work as a plain `def`"
            )

    def _begin(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    # ---- the loop's side ----

    async def _answer(self, sessions: Sessions, call: ToolCall, trajectory: Trajectory) -> Answer:
        name, config = call.tool, self.tools.configs[call.tool]
        try:
            async with self._limits[name]:
                work = self._task(sessions, self._work(sessions, call, trajectory))
                try:
                    done, _ = await asyncio.wait({work}, timeout=config.timeout_s)
                finally:
                    work.cancel()  # nothing, where it is done; else it may take its time to end
                if not done:
                    return Answer(name, error=f"{name} did not answer within {config.timeout_s:g} s")
            return Answer(name, hold_to_limits(work.result(), name, config))
        except ToolError as error:
            return Answer(name, error=str(error))
        except asyncio.CancelledError:
            return Answer(name, error=f"{name} was broken off")
        except Exception as error:
            logger.info("tool %s failed", name, exc_info=error)
            return Answer(name, error=f"{name} failed: {type(error).__name__}: {first_line(error)}")

    async def _work(self, sessions: Sessions, call: ToolCall, trajectory: Trajectory) -> Any:
        name = call.tool
        if sessions.closed:  # given up while the call waited for its turn
            raise ToolError(f"{name} was broken off")
        if name in sessions.at_work:
            raise ToolError(f"{name} is still at work on the call before")
        if name not in sessions.opened:
            if name not in sessions.opening:
                sessions.opening[name] = self._task(sessions, self._open(sessions, name, trajectory))
            await asyncio.shield(sessions.opening[name])  # one that comes too late is there for the next call
        sessions.at_work.add(name)
        return await run_function(
            sessions.opened[name].call, call, trajectory, ended=lambda: sessions.at_work.discard(name)
        )

    async def _open(self, sessions: Sessions, name: str, trajectory: Trajectory) -> ToolSession:
        try:
            session = await run_function(self.tools.by_name[name].open, trajectory, orphan=self._close_late)
            sessions.opened[name] = session
            return session
        finally:
            sessions.opening.pop(name, None)

    def _close_late(self, session: ToolSession) -> None:
        """A session that came when nobody wanted it any more."""
        task = self._loop.create_task(self._close_one("a tool", session))
        self._late.add(task)  # the loop alone would not keep it
        task.add_done_callback(self._late.discard)

    def _task(self, sessions: Sessions, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._loop.create_task(work)
        sessions.tasks.add(task)
        task.add_done_callback(sessions.tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # asked for, or asyncio logs it
        return task

    async def _close(self, sessions: Sessions) -> None:
        if sessions.closed:
            return
        sessions.closed = True
        for task in (left := set(sessions.tasks)):
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=1)
        await asyncio.gather(*(self._close_one(name, session) for name, session in sessions.opened.items()))

    async def _close_one(self, name: str, session: ToolSession) -> None:
        task = self._loop.create_task(run_function(session.close))
        done, _ = await asyncio.wait({task}, timeout=CLOSE_S)
        if not done:
            task.cancel()
            logger.warning("%s: a session did not close within %g s", name, CLOSE_S)
        elif not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("%s: a session did not close: %s: %s", name, type(error).__name__, first_line(error))


async def run_function(
    function: Callable[..., Any],
    *arguments: Any,
    ended: Callable[[], Any] = lambda: None,
    orphan: Callable[[Any], Any] = lambda found: None,
) -> Any:
    """A tool's function: awaited where it is asynchronous, else in a thread of its own, which no exit waits for.

    Args:
        ended: called in the loop when the function is over, be it long after a timeout.
        orphan: is given what it returned, where nobody waits for that any more.
    """
    if inspect.iscoroutinefunction(function):
        try:
            return await function(*arguments)
        except (SystemExit, KeyboardInterrupt) as error:  # which would end the loop
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        finally:
            ended()
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def work() -> None:
        found, failure = None, None
        try:
            found = function(*arguments)
        except Exception as error:
            failure = error if not isinstance(error, StopIteration) else RuntimeError("StopIteration")
        except BaseException as error:
            failure = RuntimeError(f"{type(error).__name__}: {error}")
        with suppress(RuntimeError):  # the loop is gone
            loop.call_soon_threadsafe(settle, found, failure)

    def settle(found: Any, failure: Exception | None) -> None:
        ended()
        if not future.done():
            future.set_result(found) if failure is None else future.set_exception(failure)
        elif failure is None:
            orphan(found)

    threading.Thread(target=work, name="tool", daemon=True).start()
    try:
        found = await future
    except asyncio.CancelledError:
        if future.done() and not future.cancelled() and future.exception() is None:
            orphan(future.result())
        raise
    return await found if inspect.isawaitable(found) else found


def _serve(loop: asyncio.AbstractEventLoop, beat: list[float]) -> None:
    def tick() -> None:
        beat[0] = time.monotonic()
        loop.call_later(BEAT_S, tick)

    asyncio.set_event_loop(loop)
    loop.call_soon(tick)
    loop.run_forever()
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left, timeout=1))
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(loop.stop)
