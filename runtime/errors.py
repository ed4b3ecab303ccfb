"""The errors that a user can mend: each names the file, key or segment and what would be right."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# The disk is full, the user's share of it is, or a file is as long as it may be; None: a library kept the number.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)


class UserError(Exception):
    """Something that the user gave is wrong. The command prints the sentence and exits with code 2."""

    exit_code = 2


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the closest known one if there is one, and all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(known) if known else 'none'}"


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def remedy(error: BaseException, otherwise: str, full: str | None = None) -> str:
    """What the user may do where writing failed: `full`, or else to free space, where the disk may be full; `otherwise`
    for every other reason. An error without the system's number may be of a full disk."""
    if getattr(error, "errno", None) in _NO_ROOM:
        return full or f"free some space, or {otherwise}"
    return otherwise


@contextmanager
def writing(path: Path, otherwise: str = "choose another folder", full: str | None = None) -> Iterator[None]:
    """Within it a disk that is full or not writable is a UserError that names `path`, and what to do (`remedy`)."""
    try:
        yield
    except OSError as error:
        advice = remedy(error, otherwise, full)
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); {advice}") from error
