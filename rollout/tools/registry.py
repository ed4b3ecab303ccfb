"""From the recipe's section `tools` to tools that are built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from rollout.tools.base import Tool
from rollout.tools.config import ToolConfig
from runtime.errors import UserError, nearest
from runtime.loading import load_object
from runtime.options import make

BUILT_IN = {"look": "rollout.tools.look:Look"}


class ToolsError(UserError):
    """Tools that the recipe names and that cannot be had, or that do not fit the format."""


class Tools:
    """Built tools by the name that calls have for them, each with its limits."""

    def __init__(self, tools: Mapping[str, Tool] | Iterable[Tool], configs: Mapping[str, ToolConfig] | None = None):
        """`configs`: by the same names; those left out have the defaults. Without a mapping tools have their own names.

        Raises ToolsError for two tools of one name.
        """
        named = list(tools.items()) if isinstance(tools, Mapping) else [(tool.name, tool) for tool in tools]
        self.by_name = dict(named)
        if len(self.by_name) < len(named):
            raise ToolsError(f"tools: two are named alike in {', '.join(name for name, _ in named)}")
        self.configs = {name: (configs or {}).get(name) or ToolConfig() for name in self.by_name}

    @property
    def repeatable(self) -> bool:
        """Whether a trajectory may be written again: no call that it made left anything behind."""
        return all(tool.repeatable for tool in self.by_name.values())

    def for_role(self, role: str) -> list[str]:
        """The names of the tools that answer a role."""
        return [name for name, config in self.configs.items() if config.roles is None or role in config.roles]


def build_tools(configs: Mapping[str, ToolConfig]) -> Tools | None:
    """The tools of a recipe; None: it names none. Raises ToolsError naming the key."""
    return Tools({name: _build(name, config) for name, config in configs.items()}, configs) if configs else None


def words_of(tools: Tools | None) -> list[str]:
    """What a tokenizer that is made for a run must know beside the task's words."""
    if tools is None:
        return []
    words = ["error:", *(word for tool in tools.by_name.values() for word in getattr(tool, "words", ()))]
    return list(dict.fromkeys(words))


def _build(name: str, config: ToolConfig) -> Tool:
    path = config.tool or BUILT_IN.get(name)
    if path is None:
        raise ToolsError(
            f"tools: no tool '{name}'; {nearest(name, BUILT_IN)}. One of your own is "
            f"{name}: {{tool: package.module.Class}}, or file.py:Class"
        )
    where = f"tools.{name}" + (f".tool: '{config.tool}'" if config.tool else "")
    found = load_object(path, where)
    if not callable(found):
        raise ToolsError(f"{where} is {type(found).__name__}, which makes no tool; name a class or a function")
    tool: Tool = make(lambda: found(*_options(name, found, config.options)), {}, where)
    for part in ("open", "repeatable"):
        if not hasattr(tool, part):
            raise ToolsError(
                f"{where} gave a value of type {type(tool).__name__}, which is no Tool: it has no '{part}' "
                "(rollout/tools/base.py says what a tool offers)"
            )
    return tool


def _options(name: str, found: Any, given: dict[str, Any]) -> tuple[BaseModel, ...]:
    """What the tool is made with: its Options, or nothing. Raises ToolsError for a key or a value that it has not."""
    section = getattr(found, "Options", None)
    if section is None:
        if given:
            raise ToolsError(
                f"tools.{name}.options: the tool takes none, and {', '.join(given)} is given; leave it out"
            )
        return ()
    try:
        return (section.model_validate(given),)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (f"tools.{name}.options", *first["loc"])))
        if first["type"] == "extra_forbidden":
            raise ToolsError(f"{key}: unknown key; {nearest(str(first['loc'][-1]), section.model_fields)}") from None
        shown = f" (given: {first['input']!r})" if first["type"] != "missing" else ""
        raise ToolsError(f"{key}: {first['msg'].removeprefix('Value error, ')}{shown}") from None
