"""Formats by name: the built-in ones, those registered by a user, and any by dotted path."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from formats.base import Format
from formats.declared import DeclaredFormat
from formats.direct import direct
from formats.look import look
from formats.self_critique import self_critique
from formats.strokes import strokes
from formats.subgoals import subgoals
from runtime.errors import UserError, nearest
from runtime.loading import load_object
from runtime.options import checked, make

Factory = Callable[..., Format]

_BUILT_IN: tuple[Factory, ...] = (strokes, subgoals, self_critique, look, direct)
_FORMATS: dict[str, Factory] = {
    "strokes": strokes,
    "subgoals": subgoals,
    "self_critique": self_critique,
    "look": look,
    "direct": direct,
}


def register(name: str, factory: Factory) -> None:
    """Make `get_format(name, **options)` call `factory(**options)`."""
    if name in _FORMATS and _FORMATS[name] is not factory:
        raise UserError(f"format '{name}' is registered already; choose another name")
    _FORMATS[name] = factory


def names() -> list[str]:
    return list(_FORMATS)


def get_format(name: str, /, **options: Any) -> Format:
    """A format by its registered name or by the dotted path of a factory.

    Raises:
        UserError: there is no such format, or it does not take an option; names the nearest.
    """
    factory = _FORMATS.get(name) or (_imported(name) if "." in name or ":" in name else None)
    if factory is None:
        raise UserError(f"format.name: no '{name}'; {nearest(name, _FORMATS)}, or the dotted path of your own")
    known = _options(factory)
    for option in options:
        if known is not None and option not in known:
            raise UserError(f"format.options: '{name}' has no '{option}'; {nearest(option, known)}")
    if factory in _BUILT_IN:
        options = checked(DeclaredFormat.__init__, options, "format.options")
    fmt = make(factory, options, f"format.name: '{name}'")
    if not isinstance(fmt, Format):
        raise UserError(
            f"format.name: '{name}' gave a {type(fmt).__name__}, which is no Format "
            "(formats/base.py lists what it must offer)"
        )
    return fmt


def _imported(path: str) -> Factory:
    found = load_object(path, f"format.name: '{path}'")
    if not callable(found):
        raise UserError(f"format.name: '{path}' is {type(found).__name__}, which is no factory of a format")
    return found


def _options(factory: Factory) -> set[str] | None:
    """The option names that a factory takes; None: it says nothing about them."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # some built-in callables have none
        return None
    named = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        # Built-in factories hand their options on to DeclaredFormat.
        if factory not in _BUILT_IN:
            return None
        named |= {p.name for p in inspect.signature(DeclaredFormat).parameters.values() if p.kind is p.KEYWORD_ONLY}
    return named
