"""A contract test for tools: what the engine takes for granted, tried on one tool. Run it in your own tests."""

from __future__ import annotations

import asyncio
import inspect
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np

from record.trajectory import Frames, Segment, Trajectory
from rollout.tools.answers import hold_to_limits
from rollout.tools.base import Reply, ToolCall, ToolError
from rollout.tools.config import ToolConfig
from rollout.tools.parse import arguments_of
from rollout.tools.runner import run_function

BLOCKING_S = 0.5  # that a coroutine may hold the loop; a busy machine may take it for some of that
WATCH_S = 0.02
PARTS = {"name": str, "repeatable": bool, "open": object}


def check_tool(tool: Any, calls: Sequence[str], trajectory: Trajectory, config: ToolConfig | None = None) -> None:
    """Try a tool on some calls, each in a fresh session, all in one session, and in two sessions at once.

    Args:
        calls: what stands between a call's tags: words, or a JSON object of arguments.
        trajectory: one that it may be called from, pictures drawn.
        config: the limits that it is held to; None: those of a recipe that names none.

    Raises:
        AssertionError: it breaks what rollout/tools/base.py promises; says which call, and how.
    """
    for part, kind in PARTS.items():
        assert hasattr(tool, part), f"the tool {type(tool).__name__} has no '{part}'"
        assert isinstance(getattr(tool, part), kind), f"the tool's '{part}' is no {kind.__name__}"
    asyncio.run(_Trial(tool, config or ToolConfig(), trajectory).all(calls))


class _Trial:
    def __init__(self, tool: Any, config: ToolConfig, trajectory: Trajectory) -> None:
        self.tool, self.config, self.trajectory = tool, config, trajectory

    async def all(self, calls: Sequence[str]) -> None:
        alone = [await self._session([body]) for body in calls]
        if self.tool.repeatable:
            for body, before in zip(calls, alone, strict=True):
                assert _same(await self._session([body]), before), (
                    f"{self.tool.name} is `repeatable`, and the call '{body}' was answered otherwise the second time"
                )
        await self._session(calls)
        together = await asyncio.gather(*(self._session([body]) for body in calls))
        if self.tool.repeatable:
            assert _same(list(together), alone), f"{self.tool.name}: sessions at once are answered otherwise than alone"

    async def _session(self, calls: Sequence[str]) -> list[Any]:
        session = await self._timed(self.tool.open, "open", self.trajectory)
        for part in ("call", "close"):
            assert callable(getattr(session, part, None)), f"{self.tool.name}: its session has no '{part}'"
        try:
            return [await self._call(session, body) for body in calls]
        finally:
            await self._timed(session.close, "close")

    async def _call(self, session: Any, body: str) -> tuple[Reply, ...] | str:
        try:
            call = ToolCall(self.tool.name, arguments_of(body), body)
        except ToolError as error:
            return str(error)
        before = pickle.dumps(self.trajectory)
        try:
            found = await self._timed(session.call, f"the call '{body}'", call, self.trajectory)
        except ToolError as error:
            return str(error)
        assert pickle.dumps(self.trajectory) == before, f"{self.tool.name}: the call '{body}' changed the trajectory"
        try:
            return hold_to_limits(found, self.tool.name, self.config)
        except ToolError as error:
            raise AssertionError(str(error)) from None

    async def _timed(self, function: Any, what: str, *arguments: Any) -> Any:
        """Run a method; nothing may take the loop from the others meanwhile."""
        loop = asyncio.get_running_loop()
        late = 0.0

        async def watch() -> None:
            nonlocal late
            while True:
                began = loop.time()
                await asyncio.sleep(WATCH_S)
                late = max(late, loop.time() - began - WATCH_S)

        watching = loop.create_task(watch())
        await asyncio.sleep(0)
        try:
            found = await asyncio.wait_for(run_function(function, *arguments), self.config.timeout_s)
            await asyncio.sleep(0)
        except TimeoutError:
            raise AssertionError(f"{self.tool.name}: {what} took longer than {self.config.timeout_s:g} s") from None
        except ToolError:
            raise
        except Exception as error:
            raise AssertionError(
                f"{self.tool.name}: {what} raised {type(error).__name__}: {error}; raise ToolError with words for "
                "the model"
            ) from error
        finally:
            watching.cancel()
        if inspect.iscoroutinefunction(function):
            assert late < BLOCKING_S, (
                f"{self.tool.name}: {what} blocks all other tools for {late:.1f} s: await whatever takes long, or "
                "write a plain `def`, which gets a thread"
            )
        return found


def _same(one: Any, other: Any) -> bool:
    """Whether two answers are equal, arrays by their values."""
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, Frames | Segment):
        return pickle.dumps(one) == pickle.dumps(other)
    return bool(one == other)
