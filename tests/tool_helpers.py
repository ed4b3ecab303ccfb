"""Tools for tests: each does one thing, good or bad. Those that a recipe names are made with an `Options`."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from pathlib import Path

from rollout.tools.base import ToolError
from rollout.tools.registry import Tools
from runtime.section import Section


class Counting:
    """Counts the words of the call's body: "big right" for more than two, else "small right". Keeps an account."""

    name, repeatable = "counting", True

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.closed: list[str] = []
        self.calls: Counter[str] = Counter()

    def open(self, trajectory):
        self.opened.append(trajectory.key)
        return _CountingSession(self, trajectory.key)

    async def answer(self, call, trajectory):
        return [f"{'big' if len(call.body.split()) > 2 else 'small'} right"]


class _CountingSession:
    def __init__(self, tool: Counting, key: str) -> None:
        self.tool, self.key, self.closed = tool, key, False

    async def call(self, call, trajectory):
        assert self.key == trajectory.key and not self.closed
        self.tool.calls[self.key] += 1
        return await self.tool.answer(call, trajectory)

    async def close(self):
        assert not self.closed
        self.closed = True
        self.tool.closed.append(self.key)


class Delayed(Counting):
    """The same, after a random while that no seed fixes."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most, self.at_work, self.at_once = most, 0, 0

    async def answer(self, call, trajectory):
        self.at_work += 1
        self.at_once = max(self.at_once, self.at_work)
        await asyncio.sleep(random.random() * self.most)
        self.at_work -= 1
        return await super().answer(call, trajectory)


class Replies(Counting):
    """Answers with what it was given."""

    def __init__(self, *replies) -> None:
        super().__init__()
        self.replies = list(replies)

    async def answer(self, call, trajectory):
        return self.replies


class Raising(Counting):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    async def answer(self, call, trajectory):
        raise self.error


class Hanging(Counting):
    """Waits for ever; `stubborn`: and does not let itself be broken off."""

    def __init__(self, stubborn: bool = False) -> None:
        super().__init__()
        self.stubborn = stubborn

    async def answer(self, call, trajectory):
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if not self.stubborn:
                    raise


class Blocking:
    """A plain function that takes a while: sessions whose methods are no coroutines."""

    name, repeatable = "blocking", True

    def __init__(self, seconds: float, opening: float = 0.0) -> None:
        self.seconds, self.opening = seconds, opening
        self.opened, self.closed, self.threads = 0, 0, set()

    def open(self, trajectory):
        time.sleep(self.opening)
        self.opened += 1
        return self

    def call(self, call, trajectory):
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        return ["fine"]

    def close(self):
        self.closed += 1


class FileTool:
    """Writes down each call in a file, so that calls in other processes are counted too; `die` ends the process there
    while that file is absent."""

    name = "file"

    class Options(Section):
        path: str
        repeatable: bool = True
        die: str = ""

    def __init__(self, options: Options) -> None:
        self.options, self.repeatable = options, options.repeatable

    def open(self, trajectory):
        return self

    def call(self, call, trajectory):
        import os
        import signal

        with open(self.options.path, "a") as file:
            file.write(f"{trajectory.key}\n")
        if self.options.die and not Path(self.options.die).exists():
            Path(self.options.die).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if not call.body:
            raise ToolError("say something")
        return ["right"]

    def close(self):
        pass


class Answering:
    """A function of the trajectory as a tool: what it returns is the answer."""

    name, repeatable = "answering", True

    def __init__(self, answer) -> None:
        self.answer = answer

    def open(self, trajectory):
        return self

    async def call(self, call, trajectory):
        return [self.answer(trajectory)]

    async def close(self):
        pass


def answering(answer) -> Tools:
    return Tools([Answering(answer)])
