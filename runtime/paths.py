"""Paths as a recipe and the command write them: `~`, `$NAME`, and files that stand beside the recipe.

A key that holds a path has one of the types below, and that is all it needs: while a recipe is read (and only then,
for what is read again elsewhere is resolved already) its value is expanded, and a file that is to be read is sought
from the working folder first and beside the recipe then.

    WritePath     what the run writes
    ReadPath      a file or folder that it reads; what is found nowhere stays, for whoever reads it to name
    ObjectPath    a name, a dotted path, or 'file.py:name', whose file is read
    Options       keyword arguments of somebody's, in which a path is told by its beginning or by its name
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ValidationInfo

from runtime.errors import UserError
from runtime.loading import is_file

FOLDER = "folder"  # in a validation's context: the recipe's
_VARIABLE = re.compile(r"\$(?:\$|(\w+)|\{([^}]*)\})")
# A value that begins so is a path, whatever its option is called.
_BEGINS = re.compile(r"~[\w.-]*/|\$(?:[A-Za-z_]\w*|\{\w+\})/")
# An option that is called so, or ends so after an underscore, holds a path.
_NAMES = ("path", "file", "folder", "dir", "weights", "pretrained", "processor", "encoder")
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, as Linux has it


class PathError(UserError, ValueError):
    """A path that means no place. As a ValueError it gets the name of its key from whoever checks the recipe."""


def reading(folder: Path) -> dict[str, Any]:
    """The validation context under which the paths of a recipe that stands in `folder` are resolved."""
    return {FOLDER: Path(folder)}


def expand(text: str) -> str:
    """`text` with its leading ~ or ~user and each $NAME or ${NAME} replaced; `$$` stands for a dollar.

    Raises:
        PathError: a variable that is not set or empty, an unknown user, or what no path can be.
    """
    if not text:
        raise PathError("is empty; give a path, and '.' for the working folder")
    home = os.path.expanduser(text)
    if text.startswith("~") and home == text:
        raise PathError(f"'{text}': there is no user '{text[1:].partition('/')[0]}' to take the home folder of")
    expanded = _VARIABLE.sub(lambda found: _value(found, text), home)
    if "\0" in expanded:
        raise PathError("holds a NUL character, which no path can")
    longest = max(len(os.fsencode(name)) for name in expanded.split("/"))
    if longest > LONGEST_NAME or len(os.fsencode(expanded)) > LONGEST_PATH:
        raise PathError(f"'{expanded[:40]} ...' is longer than the file system takes")
    return expanded


def find(text: str, folder: Path | None) -> str:
    """Where a path leads: as it stands where there is something, else beside the recipe, else as it stands."""
    if folder is None or os.path.isabs(text) or os.path.lexists(text):
        return text
    beside = os.path.join(folder, text)
    return beside if os.path.lexists(beside) else text


def expand_object(text: str, folder: Path | None = None) -> str:
    """The same for 'file.py:name'; a registered name or a dotted path stays as it is."""
    if not is_file(text):
        return text
    path, colon, name = text.rpartition(":") if not text.endswith(".py") else (text, "", "")
    return find(expand(path), folder) + colon + name


def expand_options(options: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Options with their paths resolved, however deep.

    A path is a text that begins with `~/`, `$NAME/` or `${NAME}/`, or stands under a name that says so: `path`, `file`,
    `folder`, `dir`, `weights`, `pretrained`, `processor`, `encoder`, or one that ends so, as `prompts_file` does.
    """
    return {name: _option(str(name), value, folder) for name, value in options.items()}


def _option(name: str, value: Any, folder: Path | None) -> Any:
    if isinstance(value, Mapping):
        return expand_options(value, folder)
    if isinstance(value, list):
        return [_option(name, item, folder) for item in value]
    if not isinstance(value, str) or not value:
        return value
    named = name.rpartition("_")[2] in _NAMES
    try:
        expanded = expand(value) if named or _BEGINS.match(value) else value
    except PathError as error:
        raise PathError(f"{name}: {error}") from None
    return find(expanded, folder) if named else expanded


def _value(found: re.Match[str], text: str) -> str:
    if found[0] == "$$":
        return "$"
    name = found[1] or found[2] or ""
    value = os.environ.get(name)
    if not value:
        how = "is not set" if value is None else "is empty"
        raise PathError(f"'{text}': the environment's {name or found[0]} {how}; set it, or write $$ for a dollar")
    return value


def _folder(info: ValidationInfo) -> tuple[bool, Path | None]:
    """Whether a recipe is being read, and the folder that it stands in."""
    context = info.context if isinstance(info.context, Mapping) else {}
    return FOLDER in context, context.get(FOLDER)


def _written(path: Any, info: ValidationInfo) -> Any:
    return Path(expand(str(path))) if _folder(info)[0] and isinstance(path, str | Path) else path


def read_path(text: str, info: ValidationInfo) -> str:
    """The validator of ReadPath, for a key that may also hold something else."""
    resolving, folder = _folder(info)
    return find(expand(text), folder) if resolving else text


def _object(text: str, info: ValidationInfo) -> str:
    resolving, folder = _folder(info)
    return expand_object(text, folder) if resolving else text


def _options(options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    resolving, folder = _folder(info)
    return expand_options(options, folder) if resolving else options


WritePath = Annotated[Path, BeforeValidator(_written)]  # before it is a Path, in which "" is the working folder
ReadPath = Annotated[str, AfterValidator(read_path)]
ObjectPath = Annotated[str, AfterValidator(_object)]
Options = Annotated[dict[str, Any], AfterValidator(_options)]
