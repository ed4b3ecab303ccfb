"""Types of the command's options: each turns what was written into a value, or says in a few words what is wrong.

Every number has bounds, so that none reaches a loop or a slice that it was never meant for; every path is expanded as
a recipe's are.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from runtime.errors import UserError
from runtime.paths import PathError, expand, expand_object
from runtime.section import LARGEST_SEED as LARGEST_SEED


class OptionError(argparse.ArgumentTypeError):
    """An option's value that is wrong, in a few words."""


class Parser(argparse.ArgumentParser):
    """argparse's, but for a wrong value: that is a UserError, one sentence that names the option, without the usage."""

    def error(self, message: str) -> NoReturn:
        refused = sys.exc_info()[1]
        if refused is not None and isinstance(refused.__context__, OptionError):
            raise UserError(message.removeprefix("argument ")) from None
        super().error(message)


@dataclass(frozen=True)
class Whole:
    """Whole numbers from `least` to `most`, both included; None: as many as there are."""

    least: int
    most: int | None = None

    def __call__(self, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise OptionError(f"'{text}' is no whole number") from None
        if value < self.least:
            raise OptionError(f"{value} is too small; at least {self.least}")
        if self.most is not None and value > self.most:
            raise OptionError(f"{value} is too large; at most {self.most}")
        return value


@dataclass(frozen=True)
class Number:
    """Finite numbers above `above` and up to `most`; `zero`: `above` itself too."""

    above: float = 0.0
    most: float = math.inf
    zero: bool = False

    def __call__(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise OptionError(f"'{text}' is no number") from None
        if not math.isfinite(value):
            raise OptionError(f"{text} is not finite")
        if value < self.above or value == self.above and not self.zero:
            raise OptionError(f"{value:g} is too small; {'at least' if self.zero else 'above'} {self.above:g}")
        if value > self.most:
            raise OptionError(f"{value:g} is too large; at most {self.most:g}")
        return value


NEWEST = "newest"


def join_resume(arguments: Sequence[str]) -> list[str]:
    """The command's words with `--resume` and its value in one: a step or a folder where one follows, else `newest`.

    What follows may also be a recipe, an override or another option, which argparse could not tell.
    """
    words: list[str] = []
    bare = False
    for word in arguments:
        if bare and _names_checkpoint(word):
            words[-1] = f"--resume={word}"
            bare = False
            continue
        bare = word == "--resume"
        words.append(f"--resume={NEWEST}" if bare else word)
    return words


def _names_checkpoint(word: str) -> bool:
    if word.isdigit() or Path(word).is_dir():
        return True
    return not (word.startswith("-") or "=" in word or word.endswith((".yaml", ".yml")) or Path(word).is_file())


def checkpoint_name(text: str) -> str:
    """A step, a folder, or `newest`."""
    return text if text == NEWEST or text.isdigit() else str(expanded_path(text))


def expanded_path(text: str) -> Path:
    """A file or folder, its ~ and variables expanded."""
    try:
        return Path(expand(text))
    except PathError as error:
        raise OptionError(str(error)) from None


def object_path(text: str) -> str:
    """A name, a dotted path or 'file.py:name'."""
    try:
        return expand_object(text)
    except PathError as error:
        raise OptionError(str(error)) from None
