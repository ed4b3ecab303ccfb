"""From what a recipe writes to the object that it means: a dotted path, a module and a name, or a file and a name.

trl.rewards.think_format_reward            anything importable
my_package.scoring:brightness              the same, with a colon
rewards/brightness.py:brightness           a file and a name in it; nothing is registered
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from runtime.errors import UserError, nearest


class LoadError(UserError):
    """Nothing stands at the path that was given."""


def load_object(spec: str, where: str) -> Any:
    """Whatever stands at `spec`.

    Args:
        where: what messages begin with, such as "task.name: 'mine.Task'".

    Raises:
        LoadError: no such file, module or name, or one that does not import.
    """
    path, _, name = spec.rpartition(":")
    if is_file(spec):
        check_file(spec, where)
        return _attribute(_module_from_file(Path(path), where), name, where)
    if ":" not in spec and "." not in spec:
        raise LoadError(f"{where} is neither a dotted path nor 'path/to/file.py:name'")
    module, _, name = spec.rpartition(":" if ":" in spec else ".")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise LoadError(f"{where} is neither a dotted path nor 'path/to/file.py:name'")
    return _attribute(_module(module, where), name, where)


def is_file(spec: str) -> bool:
    """Whether a file is meant."""
    return spec.rpartition(":")[0].endswith(".py") or spec.endswith(".py")


def check_file(spec: str, where: str) -> None:
    """Raises LoadError for a file that is not there, or without the name of what is in it. Imports nothing."""
    if spec.endswith(".py"):
        raise LoadError(f"{where}: name the function too, as '{spec}:function'")
    path = Path(spec.rpartition(":")[0])
    if is_file(spec) and not path.is_file():
        raise LoadError(f"{where}: no file {path} (seen from {Path.cwd()})")


def raised(error: BaseException) -> str:
    """What was raised and where, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{at}"


def _module_from_file(path: Path, where: str) -> ModuleType:
    name = f"_file_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # a file may import its neighbours
        sys.path.append(folder)
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        raise LoadError(f"{where}: {path}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        raise LoadError(f"{where}: {path} does not import: {raised(error)}") from error
    return module


def _module(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise LoadError(f"{where}: no module '{error.name}' on the path{_hidden(name)}") from None
        raise LoadError(f"{where}: module '{name}' does not import: {raised(error)}") from error
    except SyntaxError as error:
        raise LoadError(f"{where}: {error.filename}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        raise LoadError(f"{where}: module '{name}' does not import: {raised(error)}") from error


def _attribute(module: ModuleType, name: str, where: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        functions = [
            n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__
        ]
        origin = getattr(module, "__file__", module.__name__)
        hidden = _hidden(module.__name__)
        hint = hidden or f"; {nearest(name, functions)}"
        raise LoadError(f"{where}: {origin} has no function '{name}'{hint}") from None
    except (Exception, SystemExit) as error:  # lazy packages import at the first look
        raise LoadError(f"{where}: {raised(error)}") from error


def _hidden(name: str) -> str:
    """A hint where a file of that dotted name lies on the search path behind another package of its first name, which
    Python takes in its place; empty where none does."""
    first, *inner = name.split(".")
    taken = getattr(sys.modules.get(first), "__file__", None)
    if taken is None:
        return ""
    for folder in sys.path:
        stem = Path(folder or ".", first, *inner)
        for file in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py"):
            if file.is_file() and not _same_top(file, len(inner), Path(taken)):
                return (
                    f"; {file} is not seen, for the package '{first}' in {Path(taken).parent} hides it: name it as a "
                    f"file, '{file}:...', or rename it"
                )
    return ""


def _same_top(file: Path, depth: int, taken: Path) -> bool:
    """Whether a file, `depth` folders deep, belongs to the package whose __init__.py is `taken`."""
    top = file.resolve()
    for _ in range(depth + (file.name == "__init__.py")):
        top = top.parent
    return top in (taken.resolve(), taken.resolve().parent)
