"""What a worker prints is passed on up to a limit; what is over it is read, dropped and counted.

A program that prints faster than anybody reads would otherwise fill a log, a disk or a terminal. As a script,
`output.py LIMIT COUNT`, it does this for the process that started it, from stdin to stderr: a thread there could not,
since a library may print while it holds the interpreter's lock.
"""

from __future__ import annotations

import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

LIMIT = 2**20  # bytes that one worker may print in a run
BLOCK = 2**16
LOOK_S = 0.5  # how often it is seen whether the writer lives
LAST_WORDS_S = 2.0  # how long what an ended writer left in the pipe is read

logger = logging.getLogger(__name__)


class OutputRelay:
    """Passes on what the processes of one worker print, one after the other, to this program's stderr."""

    def __init__(self, name: str, limit: int = LIMIT) -> None:
        self.name, self.limit = name, limit
        self.passed = self.dropped = 0  # bytes
        self._thread: threading.Thread | None = None

    def follow(self, source: int, writing: Callable[[], bool]) -> None:
        """Read `source` in a thread, and close it, until all writers have closed it or `writing` says no."""
        self._thread = threading.Thread(
            target=self._copy, args=(source, writing), name=f"output of {self.name}", daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """Wait until all that was printed is passed on or counted. The writer has ended."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def report(self) -> None:
        """Say how much was dropped, if anything was. Begins to count anew."""
        dropped, self.dropped = self.dropped, 0
        if dropped:
            logger.warning("%s", dropped_sentence(self.name, self.limit, dropped))

    def _copy(self, source: int, writing: Callable[[], bool]) -> None:
        told = self.dropped > 0
        try:
            for block in blocks(source, writing):
                kept = block[: max(0, self.limit - self.passed)]
                write_all(2, kept)
                self.passed += len(kept)
                self.dropped += len(block) - len(kept)
                if self.dropped and not told:
                    told = True
                    logger.warning("%s", reached_sentence(self.name, self.limit))
        finally:
            os.close(source)


def cap_own_output(limit: int = LIMIT) -> Callable[[], int]:
    """From here on this process's stdout and stderr, those of what it starts included, go to where stderr went, up to
    `limit` bytes. Returns a function that says how many bytes were dropped."""
    count = os.memfd_create("dropped")
    source, sink = os.pipe()
    subprocess.Popen(
        [sys.executable, "-I", "-S", os.path.abspath(__file__), str(limit), str(count)],
        stdin=source,
        stdout=subprocess.DEVNULL,
        pass_fds=(count,),
    )
    os.close(source)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
    return lambda: int.from_bytes(os.pread(count, 8, 0), "little")


def reached_sentence(name: str, limit: int) -> str:
    return f"{name} has printed {_size(limit)}; what it prints from here on is dropped and counted"


def dropped_sentence(name: str, limit: int, dropped: int) -> str:
    return f"{name} printed more than {_size(limit)}: {dropped} bytes of its output were dropped"


def blocks(source: int, writing: Callable[[], bool]) -> Iterator[bytes]:
    """What can be read, until the end of the file, or until nothing comes and `writing` says no."""
    ended: float | None = None
    while True:
        if ended is None and not writing():  # asked first: what was written before the end is read below
            ended = time.monotonic()
        ready = select.select([source], [], [], LOOK_S if ended is None else 0)[0]
        if ended is not None and (not ready or time.monotonic() - ended > LAST_WORDS_S):
            return  # whoever still writes has got away from its worker
        if not ready:
            continue
        block = os.read(source, BLOCK)
        if not block:
            return
        yield block


def write_all(sink: int, block: bytes) -> None:
    """Write, but never fail: nobody may be listening any more."""
    try:
        while block:
            block = block[os.write(sink, block) :]
    except OSError:
        pass


def _size(count: int) -> str:
    return f"{count / 2**20:g} MiB" if count >= 2**20 else f"{count} bytes"


def main(limit: int, count: int) -> None:
    passed = dropped = 0
    for block in blocks(0, lambda: True):
        kept = block[: max(0, limit - passed)]
        write_all(2, kept)
        passed += len(kept)
        dropped += len(block) - len(kept)
        if dropped:
            os.pwrite(count, dropped.to_bytes(8, "little"), 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
