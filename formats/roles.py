"""Keys of a recipe that are maps by role, and the check that each of their names is a role of the recipe's format.

A map says that it is one by its type, `dict[str, float]` annotated with `ByRole`; nothing else has to know of it. So
does a list of roles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from formats.base import Format
from formats.grammar import BETWEEN, END, OTHER
from record.trajectory import Author
from runtime.errors import UserError, nearest

DEFAULT = "default"  # in a map: every role that it does not name


@dataclass(frozen=True)
class ByRole:
    """Marks a map by role, or a list of roles.

    Attributes:
        besides: names that it may hold and that are no roles.
        written: it is about what the policy writes, so that roles of the environment have no place in it.
    """

    besides: tuple[str, ...] = ()
    written: bool = False


SAMPLED = ByRole((DEFAULT, BETWEEN, OTHER), written=True)  # whose turn it is while ids are sampled
RECORDED = ByRole((OTHER, END))  # which role a segment of the record has
WRITTEN = ByRole((OTHER, END), written=True)  # the same, of the policy's segments


def roles_of(fmt: Format) -> tuple[str, ...] | None:
    """The roles that a format names in its attribute `roles`; None: it has none, so that any name may be a role."""
    roles = getattr(fmt, "roles", None)
    return None if roles is None else tuple(roles)


def check_roles(config: BaseModel, fmt: Format, where: str = "") -> None:
    """Hold every map by role in a recipe, or in a section of it, to the format.

    Args:
        where: the section's key and a point, for the message.

    Raises:
        UserError: a name that is no role, or the environment's in a map of the policy's; it would be of no effect.
    """
    for key, names, marker in _maps(config, where):
        check_names(names, fmt, key, marker.besides)
        for name in names if marker.written else ():
            if name in (roles_of(fmt) or ()) and fmt.author(name) is Author.ENVIRONMENT:
                own = [role for role in roles_of(fmt) or () if fmt.author(role) is Author.POLICY]
                raise UserError(
                    f"{key}: in the role '{name}' of the format '{fmt.name}' the environment speaks, and the policy "
                    f"writes nothing; its own roles are {', '.join(own)}"
                )


def check_names(names: Iterable[Any], fmt: Format, where: str, besides: Sequence[str] = ()) -> None:
    """Raises UserError for a name that is neither a role of the format nor one of `besides`."""
    roles = roles_of(fmt)
    for name in names if roles is not None else ():
        known = (*(roles or ()), *besides)
        if name not in known:
            raise UserError(f"{where}: the format '{fmt.name}' has no role '{name}'; {nearest(str(name), known)}")


def _maps(config: BaseModel, where: str) -> Iterator[tuple[str, Iterable[Any], ByRole]]:
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from _maps(value, f"{where}{name}.")
        elif (marker := marker_of(field)) is not None and value:
            yield f"{where}{name}", value, marker


def marker_of(field: FieldInfo) -> ByRole | None:
    return next((item for item in field.metadata if isinstance(item, ByRole)), None)
