"""From what a recipe writes to the function it means: a registered name, a dotted path, or a file.

geneval                                    one of this toolkit's own (registry.py)
trl.rewards.think_format_reward            any importable function, TRL's included
my_package.scoring:brightness              the same, with a colon
rewards/brightness.py:brightness           a file and a function in it; nothing is registered
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.contract import Reward, RewardError
from rewards.registry import REWARDS
from runtime.errors import UserError, nearest


def is_own(spec: str) -> bool:
    """Whether a recipe's function is one of this toolkit's, which are quick, bounded, and run in the driver."""
    return spec in REWARDS


def load_reward(spec: str, options: Mapping[str, Any] | None = None, factory: bool = False) -> Reward:
    """The function that `spec` names. With `factory` the named function is called with `options` to make it, as TRL's
    `get_...` functions want.

    Raises:
        RewardError: no such file, module or function, a file that does not import, or something not callable.
    """
    function = load_object(spec)
    if factory:
        function = make(function, spec, options)
    elif isinstance(function, type):
        raise RewardError(f"reward '{spec}' is a class; set factory: true to make one with the options")
    if not callable(function):
        raise RewardError(f"reward '{spec}' is {type(function).__name__}, not a function")
    return function


def load_object(spec: str) -> Any:
    """Whatever stands at `spec`. Raises RewardError where nothing does."""
    if is_own(spec):
        return REWARDS[spec].load()
    path, _, name = spec.rpartition(":")
    if _is_file(spec):
        return _attribute(_module_from_file(Path(path), spec), name, spec)
    if ":" in spec or "." in spec:
        module, _, name = spec.rpartition(":" if ":" in spec else ".")
        return _attribute(_module(module, spec), name, spec)
    raise RewardError(
        f"no reward '{spec}'; {nearest(spec, REWARDS)}. Your own is 'package.module.function' or "
        f"'path/to/file.py:function'"
    )


def make(factory: Any, spec: str, options: Mapping[str, Any] | None = None) -> Any:
    """What a factory or class makes of the options. Raises RewardError where it does not take them, or raises."""
    if not callable(factory):
        raise RewardError(f"'{spec}' is {type(factory).__name__}, which makes nothing; name a function or a class")
    try:
        return factory(**(options or {}))
    except UserError:
        raise
    except Exception as error:
        given = f" with {dict(options)}" if options else ""
        raise RewardError(f"'{spec}' cannot be made{given}: {_last_line(error)}") from error


def check_exists(spec: str) -> None:
    """What can be said of a spec without running it: an unknown bare name, a missing file, a file without a colon.

    Raises RewardError.
    """
    if is_own(spec):
        return
    if spec.endswith(".py"):
        raise RewardError(f"reward '{spec}': name the function too, as '{spec}:function'")
    if _is_file(spec):
        path = Path(spec.rpartition(":")[0])
        if not path.is_file():
            raise RewardError(f"reward '{spec}': no file {path} (seen from {Path.cwd()})")
    elif ":" not in spec and "." not in spec:
        load_object(spec)  # raises, with the nearest name


def _is_file(spec: str) -> bool:
    return spec.rpartition(":")[0].endswith(".py") or spec.endswith(".py")


def _module_from_file(path: Path, spec: str) -> ModuleType:
    check_exists(spec)
    name = f"_reward_file_{path.stem}"
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
        raise RewardError(f"reward '{spec}': {path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        raise RewardError(f"reward '{spec}': {path} does not import: {_last_line(error)}") from error
    return module


def _module(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise RewardError(f"reward '{spec}': no module '{error.name}' on the path") from None
        raise RewardError(f"reward '{spec}': module '{name}' does not import: {_last_line(error)}") from error
    except SyntaxError as error:
        raise RewardError(f"reward '{spec}': {error.filename}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        raise RewardError(f"reward '{spec}': module '{name}' does not import: {_last_line(error)}") from error


def _attribute(module: ModuleType, name: str, spec: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise RewardError(
            f"reward '{spec}': {getattr(module, '__file__', module.__name__)} has no function '{name}'; "
            f"{nearest(name, functions)}"
        ) from None
    except ImportError as error:  # lazy packages import at the first look
        raise RewardError(f"reward '{spec}': {error}") from error


def _last_line(error: BaseException) -> str:
    """What was raised and where, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
