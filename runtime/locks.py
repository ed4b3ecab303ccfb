"""One writer a folder: whoever comes second is told who is at work there.

The lock is the kernel's, on a file in the folder, so it ends with its process, however that ends. Where a file system
has no such locks, a file that names its owner takes their place: an owner on this machine is looked up, and one on
another machine is alive while it touches the file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runtime.errors import UserError, writing

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
BEAT_S = 30.0  # between touches of a file that stands for a lock
DEAD_AFTER_S = 300.0  # without one its owner on another machine is dead

logger = logging.getLogger(__name__)
_held: dict[Path, int] = {}  # locks of this process, and how often each is held


class Busy(UserError):
    """Another process is at work in the folder."""


@contextmanager
def only_writer(file: Path, what: Path, otherwise: str = "choose another folder") -> Iterator[None]:
    """Within it no other process that asks for the lock `file` gets it. A process may ask again for its own.

    Folders that are made for it are removed again where nothing else came to lie in them.

    Args:
        what: the folder or file that is written, for the sentences.
        otherwise: what else the user may do.

    Raises:
        Busy: another process has it; says which.
        UserError: the lock's file cannot be made.
    """
    file = Path(os.path.abspath(file))
    _held[file] = _held.get(file, 0) + 1
    try:
        if _held[file] > 1:
            yield
            return
        made = [folder for folder in file.parents if not folder.exists()]  # the innermost first
        with writing(what, otherwise):
            file.parent.mkdir(parents=True, exist_ok=True)
            release = _acquire(file, what, otherwise)
        try:
            yield
        finally:
            release()
            with suppress(OSError):
                for folder in made:
                    folder.rmdir()
    finally:
        _held[file] -= 1
        if not _held[file]:
            del _held[file]


def _acquire(file: Path, what: Path, otherwise: str) -> Callable[[], None]:
    """Take the lock; returns what gives it back, and removes its file."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise Busy(_sentence(what, _read(file), otherwise)) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in NO_LOCKS:
                raise
            logger.warning(
                "%s: this file system has no locks (%s); a file with this process's number, %s, stands for one",
                file.parent,
                os.strerror(error.errno),
                _owner_file(file).name,
            )
            with suppress(OSError):
                file.unlink()
            return _acquire_by_name(_owner_file(file), what, otherwise)
        if _is_at(descriptor, file):
            break
        os.close(descriptor)  # its holder has removed it meanwhile: that lock is nobody's
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(_myself()).encode())

    def release() -> None:
        with suppress(OSError):
            file.unlink()  # while it is locked: whoever waits for it sees that it is gone
        os.close(descriptor)

    return release


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def beside(path: Path) -> Path:
    """The lock of a file, or of a folder that is replaced whole."""
    whole = Path(os.path.abspath(path))
    return whole.with_name(f".{whole.name}.lock")


# ---- without locks -----------------------------------------------------------------------------------------------


def _owner_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.owner")


def _acquire_by_name(file: Path, what: Path, otherwise: str) -> Callable[[], None]:
    me = _myself()
    while True:
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)  # one process alone makes it
            break
        except FileExistsError:
            owner = _read(file)
            if not _is_dead(owner, file):
                raise Busy(_sentence(what, owner, otherwise, file)) from None
            _take_away(file, owner)
    os.write(descriptor, json.dumps(me).encode())
    os.close(descriptor)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT_S):
            with suppress(OSError):
                os.utime(file)

    thread = threading.Thread(target=beat, name=f"lock of {what}", daemon=True)
    thread.start()

    def release() -> None:
        stop.set()
        thread.join()
        if _read(file) == me:
            file.unlink(missing_ok=True)

    return release


def _is_dead(owner: dict[str, Any], file: Path) -> bool:
    """Whether the owner is no more. Ages are by the file system's own clock."""
    if owner.get("host") == socket.gethostname():
        return _started(int(owner["pid"])) != owner.get("started")
    now = file.with_name(f"{file.name}.now-{os.getpid()}")
    try:
        now.touch()
        return now.stat().st_mtime - file.stat().st_mtime > DEAD_AFTER_S
    except FileNotFoundError:  # it has just been given back
        return False
    finally:
        now.unlink(missing_ok=True)


def _take_away(file: Path, dead: dict[str, Any]) -> None:
    """Remove a dead owner's file, but not that of somebody who was quicker to do so."""
    aside = file.with_name(f"{file.name}.old-{os.getpid()}")
    try:
        os.rename(file, aside)
    except FileNotFoundError:
        return
    if _read(aside) != dead:
        os.rename(aside, file)
        return
    aside.unlink(missing_ok=True)
    logger.warning("%s: %s, which held it, has ended without giving it back", file, _named(dead))


# ---- who ---------------------------------------------------------------------------------------------------------


def _myself() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}


def _started(pid: int) -> float | None:
    """When a process started, which tells it from a later one of the same number; None: there is none."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _read(file: Path) -> dict[str, Any]:
    """What a lock's file says of its owner; nothing where it is being written."""
    try:
        owner = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) and "pid" in owner else {}


def _named(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner.get('host', '?')}" if owner else "another process"


def _sentence(what: Path, owner: dict[str, Any], otherwise: str, file: Path | None = None) -> str:
    hint = f", or delete {file} if that process is no more" if file is not None else ""
    return f"{what}: {_named(owner)} is at work there; wait until it ends, or {otherwise}{hint}"
