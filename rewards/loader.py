"""From what a recipe writes to the function it means: a registered name, a dotted path, or a file.

geneval                                    one of this toolkit's own (registry.py)
trl.rewards.think_format_reward            any importable function, TRL's included
my_package.scoring:brightness              the same, with a colon
rewards/brightness.py:brightness           a file and a function in it; nothing is registered
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewards.contract import Reward, RewardError
from rewards.registry import REWARDS
from runtime import loading
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
    if not loading.is_file(spec) and ":" not in spec and "." not in spec:
        raise RewardError(
            f"no reward '{spec}'; {nearest(spec, REWARDS)}. Your own is 'package.module.function' or "
            f"'path/to/file.py:function'"
        )
    try:
        return loading.load_object(spec, f"reward '{spec}'")
    except loading.LoadError as error:
        raise RewardError(str(error)) from error.__cause__


def make(factory: Any, spec: str, options: Mapping[str, Any] | None = None) -> Any:
    """What a factory or class makes of the options. Raises RewardError where it does not take them, or raises."""
    if not callable(factory):
        raise RewardError(f"'{spec}' is {type(factory).__name__}, which makes nothing; name a function or a class")
    try:
        return factory(**(options or {}))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        given = f" with {dict(options)}" if options else ""
        raise RewardError(f"'{spec}' cannot be made{given}: {loading.raised(error)}") from error


def check_exists(spec: str) -> None:
    """What can be said of a spec without running it: an unknown bare name, a missing file, a file without a colon.

    Raises RewardError.
    """
    if is_own(spec):
        return
    if loading.is_file(spec):
        try:
            loading.check_file(spec, f"reward '{spec}'")
        except loading.LoadError as error:
            raise RewardError(str(error)) from None
    elif ":" not in spec and "." not in spec:
        load_object(spec)  # raises, with the nearest name
