"""The errors that a user can mend: each names the file, key or segment and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


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


@contextmanager
def writing(path: Path, advice: str = "free some space, or choose another folder") -> Iterator[None]:
    """Within it a disk that is full or not writable is a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); {advice}") from error
