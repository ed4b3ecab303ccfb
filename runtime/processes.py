"""Ends a process with everything that it started, daemons and sessions of their own included.

What a process starts inherits its environment, whoever becomes its parent later; so a value in the environment, the
mark, finds what the tree of parents has lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

MARK = "UNDERDRAWING_PROCESS"  # in the environment of what we start
ROUNDS, ROUND_S = 40, 0.05  # looks for what still lives, and the pause between them
WATCH_S = 0.5  # between a guard's looks at its parent
EACH = 20  # of its looks is also one at what it guards, as are the first so many


def new_mark() -> str:
    """A mark that no other process bears. `<mark>.<anything>` belongs to it too."""
    return f"{os.getpid()}-{secrets.token_hex(6)}"


def end_tree(pid: int | None, mark: str | None = None, others: Collection[Any] = ()) -> None:
    """Kill a process, its descendants, everything of this user's that bears `mark`, with its descendants, and `others`,
    but never this process.

    Returns once they are gone, or after two seconds. Whoever started the process still has to wait for it.

    Args:
        pid: None, or a process that has ended, leaves what bears the mark.
        others: psutil.Process.
    """
    root = _process(pid)
    if root is not None:
        with contextlib.suppress(_gone()):
            root.suspend()  # so that it starts nothing more meanwhile
    for _ in range(ROUNDS):
        found = [p for p in {*_below(root), *bearing(mark), *others} if p.pid not in (pid, os.getpid()) and lives(p)]
        for process in found:
            with contextlib.suppress(_gone()):
                process.kill()
        if not found:
            break
        time.sleep(ROUND_S)
    if root is not None:
        with contextlib.suppress(_gone()):
            root.kill()


def guard(mark: str, folder: Path) -> subprocess.Popen[bytes]:
    """A process that, should this one be killed, ends all that bears `mark` and removes `folder`. Kill it, and wait for
    it, when there is nothing left to guard."""
    boot = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from runtime.processes import watch; watch()"
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    return subprocess.Popen(
        [sys.executable, "-c", boot, json.dumps(sys.path), str(os.getpid()), mark, str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )


def watch() -> None:
    """What a guard does."""
    parent, mark, folder = int(sys.argv[2]), sys.argv[3], sys.argv[4]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    seen: set[Any] = set()  # where a marked parent is gone first, its titled children would not be known
    looks = 0
    while os.getppid() == parent:
        if looks < EACH or looks % EACH == 0:
            seen = {process for process in seen if lives(process)} | bearing(mark)
        looks += 1
        time.sleep(WATCH_S)
    end_tree(None, mark, seen)
    shutil.rmtree(folder, ignore_errors=True)


def bearing(mark: str | None) -> set[Any]:
    """psutil.Process of what bears the mark, and its descendants: one that gives itself a title, as Ray's do, has
    written over its environment."""
    import psutil

    if mark is None:
        return set()
    marked = [
        process
        for process in psutil.process_iter(["environ"])  # None where it may not be read
        if (theirs := (process.info["environ"] or {}).get(MARK)) and (theirs == mark or theirs.startswith(f"{mark}."))
    ]
    return {*marked, *(child for process in marked for child in _below(process))}


def family(pid: int) -> tuple[Any, list[Any]]:
    """The psutil.Process of a process, None where it has ended, and its descendants."""
    root = _process(pid)
    return root, _below(root)


def lives(process: Any) -> bool:
    """Whether a psutil.Process runs: one that has ended and was not waited for does not."""
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def how_it_ended(pid: int) -> str:
    """How a child that nobody has waited for ended, in words; "it ended" where that cannot be known."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            status = int(file.read().rsplit(" ", 1)[1])
    except (OSError, ValueError):
        return "it ended"
    return f"signal {status & 0x7F}" if status & 0x7F else f"exit code {status >> 8}"


def _gone() -> type[Exception]:
    import psutil

    return psutil.Error


def _process(pid: int | None) -> Any:
    import psutil

    try:
        return psutil.Process(pid) if pid else None
    except psutil.Error:
        return None


def _below(process: Any) -> list[Any]:
    try:
        return process.children(recursive=True) if process is not None else []
    except _gone():
        return []
