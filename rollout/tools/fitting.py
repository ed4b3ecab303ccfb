"""Whether tools and format fit: found before a run starts, and not when the first call is made."""

from __future__ import annotations

from formats.base import Format
from record.trajectory import Modality
from rollout.tools.answers import role_for
from rollout.tools.registry import Tools, ToolsError
from runtime.errors import nearest


def check_fit(fmt: Format, tools: Tools | None) -> None:
    """Every role that calls has a tool, every tool a role that calls it, and errors have a role to be told in.

    A format that does not say which of its roles call (`calls`) is not checked.

    Raises:
        ToolsError: naming the tool or the role, and what would be right.
    """
    calls = getattr(fmt, "calls", None)
    if calls is None:
        return
    if not calls:
        if tools is not None:
            raise ToolsError(
                f"tools: no role of the format '{fmt.name}' calls a tool, so '{next(iter(tools.by_name))}' would never "
                "be asked; leave it out, or choose a format in which the environment speaks (look)"
            )
        return
    if tools is None:
        raise ToolsError(
            f"tools: in the format '{fmt.name}' the role '{calls[0]}' calls a tool, and there is none; name one, such "
            "as tools: [look]"
        )
    for name, config in tools.configs.items():
        for role in config.roles or ():
            if role not in calls:
                raise ToolsError(
                    f"tools.{name}.roles: '{role}' is no role of the format '{fmt.name}' that calls a tool; "
                    f"{nearest(role, calls)}"
                )
    for role in calls:
        if not tools.for_role(role):
            raise ToolsError(
                f"tools: none answers the role '{role}' of the format '{fmt.name}'; add it to the `roles` of one of "
                f"{', '.join(tools.by_name)}"
            )
        if role_for(fmt, role, Modality.TEXT, error=True) is None:
            raise ToolsError(
                f"format '{fmt.name}': after '{role}' the environment has no role for words, in which a tool's errors "
                "are told; declare one, such as Role('error', author=Author.ENVIRONMENT)"
            )
