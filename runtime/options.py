"""Options that a recipe hands to a function: held to its annotations, and a function called with them so that whatever
it raises is a sentence."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from runtime.errors import UserError
from runtime.loading import raised

T = TypeVar("T")
_STRICT_ENOUGH = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)


class OptionsError(UserError):
    """Options that a function does not take."""


def checked(function: Callable[..., Any], options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options in the types that the function's annotations ask for. What has no annotation stays as it is, as do
    the words of a Literal, whose function knows better what to say of a wrong one.

    Args:
        where: the key of the options, for the message.

    Raises:
        OptionsError: a value of another type.
    """
    try:
        hints = typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except Exception:  # names that only a type checker resolves
        return dict(options)
    found = {}
    for name, value in options.items():
        hint = _loose(hints[name]) if name in hints else Any
        try:
            found[name] = TypeAdapter(hint, config=_config(hint)).validate_python(value)
        except ValidationError as error:
            said = " or ".join(dict.fromkeys(e["msg"] for e in error.errors()))
            raise OptionsError(f"{where}.{name}: {said} (given: {value!r})") from None
    return found


def make(function: Callable[..., T], options: Mapping[str, Any], where: str) -> T:
    """What somebody's function or class makes of the options.

    Raises:
        OptionsError: it raises anything; the message says what and where.
    """
    try:
        return function(**options)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        given = f" with {dict(options)}" if options else ""
        raise OptionsError(f"{where} cannot be made{given}: {raised(error)}") from error


def _config(hint: Any) -> ConfigDict | None:
    """Models bring a configuration of their own."""
    return None if isinstance(hint, type) and hasattr(hint, "model_fields") else _STRICT_ENOUGH


def _loose(hint: Any) -> Any:
    """The hint with the types of a Literal's words in place of the words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return typing.Union[tuple({type(word) for word in arguments})]  # noqa: UP007 - made of what is found
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(_loose(argument) for argument in arguments)]  # noqa: UP007
    return hint
